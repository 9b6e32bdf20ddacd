"""The two kinds of errors that a user sees: one line each, with an exit code of its own."""

from __future__ import annotations


class FrameBridgeError(ValueError):
    """Something that a run needs is missing or broken; the command ends with exit code 1.

    The message is one line: what is wrong, where, and the remedy.
    """

    exit_code = 1


class UsageError(FrameBridgeError):
    """The recipe or the command line is wrong; the command ends with exit code 2."""

    exit_code = 2


def first_line(error: object) -> str:
    """The first line of what an error says, for a message of one line; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
