"""What `tools.report` shows: runs as they are in their folders, curves, and what their models do with images."""
