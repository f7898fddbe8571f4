"""Where models and data meet: the options, what is built of them, and the training loop, which is handed both."""
