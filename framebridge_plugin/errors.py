"""The kinds of errors that a user sees, with an exit code each, and how names that others chose are shown."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import TextIO

_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{34,}")  # shorter, or with more _ in it, is a name
_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})[^\s/?#]+(?=@)", re.IGNORECASE)  # a path has one of the slashes
_SIGNED = re.compile(
    r"([?&;#](?:[\w.-]*(?:token|secret|password|passwd|signature|credential)|(?:[\w.-]*[_-])?(?:(?:api|access)[_-]?key"
    r"|key|sig|pwd|pass))=)[^\s&;#'\"]+",
    re.IGNORECASE,
)
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST_TOKEN = 8  # what is shorter would be found in other words

# Control characters, which a terminal obeys; line ends, which forge lines; what turns the direction of writing; and
# bytes of file names that are no text.
_NOT_SHOWN = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class FrameBridgeError(ValueError):
    """Something that a run needs is missing or broken; the command ends with exit code 1.

    The message is one line: what is wrong, where, and the remedy. Of several, each is an argument of its own; what
    they hold is shown as `escaped` has it.
    """

    exit_code = 1

    def __str__(self) -> str:
        return "\n".join(escaped(line) for line in self.args)


class UsageError(FrameBridgeError):
    """The recipe or the command line is wrong; the command ends with exit code 2."""

    exit_code = 2


class FinishedRunError(FrameBridgeError):
    """A run is trained and saved, and something after that failed; the command ends with exit code 3."""

    exit_code = 3


def escaped(text: object) -> str:
    r"""One `masked` line that a terminal only shows: line ends as `\n`, control characters and bytes as `\x1b`."""
    return _NOT_SHOWN.sub(_escape, masked(str(text)))


def masked(text: str) -> str:
    """The text with `***` for tokens of the hub, for those in the environment, and for what opens a URL: user,
    password, token or signature.
    """
    for value in filter(None, map(os.environ.get, _TOKEN_VARIABLES)):
        text = text.replace(value, "***") if len(value) >= _SHORTEST_TOKEN else text
    for secret in (_LOGIN, _SIGNED):
        text = secret.sub(r"\1***", text)
    return _TOKEN.sub("***", text)


def print_line(line: object = "", *, file: TextIO | None = None) -> None:
    """Prints one `escaped` line, at once: the one way to standard output, or to another stream."""
    # With its end in one piece: several processes write to one terminal or file.
    print(f"{escaped(line)}\n", end="", file=file, flush=True)


def print_lines(text: str, *, file: TextIO | None = None) -> None:
    """Prints text whose line ends are our own, each line as `print_line` does."""
    for line in text.removesuffix("\n").split("\n"):
        print_line(line, file=file)


def say(line: object = "") -> None:
    """Says something to the user, in one `escaped` line of the error stream."""
    print_line(line, file=sys.stderr)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte of a name
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode()


def first_line(error: object) -> str:
    """The first line of what an error says, for a message of one line; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_one_line(error: object) -> str:
    """All that an error says, its lines and spaces joined."""
    return " ".join(str(error).split())


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, whose messages are one line each, `escaped`."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape_message)
    return logger


def _escape_message(record: logging.LogRecord) -> bool:
    record.msg, record.args = escaped(record.getMessage()), ()
    return True
