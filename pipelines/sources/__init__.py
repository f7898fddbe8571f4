"""Sources of images: each knows their sizes and labels, and reads the bytes of image i."""
