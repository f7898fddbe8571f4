"""The error that sources and loaders raise for data that a user must repair."""


class DataError(ValueError):
    """Missing, empty or damaged data; the message is one line that names the file and says what to do."""
