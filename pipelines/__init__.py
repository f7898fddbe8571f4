"""Data: one plan of each epoch, and loaders that execute it. Nothing here imports `dcd`."""
