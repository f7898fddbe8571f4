"""The error that every source and loader raises for data that a user must mend."""


class DataError(ValueError):
    """Missing, empty or damaged data; the message is one line that names the file and says what to do."""
