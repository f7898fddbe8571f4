"""Where images come from: their sizes, labels and bytes, by index."""
