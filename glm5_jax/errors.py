"""The one error that is the user's to fix."""


class InputError(ValueError):
    """Something given from outside is wrong: a file, a value, a tensor.

    The message names the thing, its value and what was expected, on one line. Commands print it
    and exit with status 2; every other exception is a defect of this package and keeps its
    traceback.
    """


class Missing(InputError):
    """There is nothing under a name that something was expected under."""
