"""The one exception tree. Every message names the thing, the place, both numbers and the next step.

A `GraftError` is a mistake or a limit that the user can act on: the command line prints its message, never a
traceback, and ends with its exit code. Anything else that escapes is a defect of graft itself.
"""


class GraftError(Exception):
    """Base of all errors that are shown to the user as they are."""

    exit_code = 2


class ConfigError(GraftError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class InputError(GraftError):
    """A file, folder, model or tokenizer that was named cannot serve."""


class DataRefused(GraftError):
    """The data was read, but too much of it was rejected to train on it unasked."""

    exit_code = 3


class OutOfMemory(GraftError):
    """A row's computation does not fit into the memory of its device."""


class Diverged(GraftError):
    """The run was stopped because its numbers stopped making sense; the last good checkpoint is kept."""

    exit_code = 4


class Interrupted(GraftError):
    """The run was stopped by a signal; a checkpoint was written and the run can be resumed."""

    exit_code = 5


class Elsewhere(GraftError):
    """Another process of the run says why it ends; this one ends with the same code and says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("said by another process of the run")
        self.exit_code = exit_code


def said(error: Exception) -> str:
    """Another library's error for the user; with its class where it was not meant for one."""
    plain = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
    return first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
