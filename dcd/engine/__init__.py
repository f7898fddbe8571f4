"""The training loop and what it needs. It is handed built models and loaders, and imports neither."""
