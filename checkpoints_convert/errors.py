"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or converted: damaged, hostile, or of another network.

    Its text says what was found, what was expected and how to mend it.
    """
