"""The error for a file that is not what it says."""


class BadFileError(ValueError):
    """A file is damaged, holds something else, or belongs to another run; the message names it and says what to do."""
