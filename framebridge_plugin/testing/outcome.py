"""What a conformance check is, how it fails, and what comes out of it: one line each."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from framebridge_plugin.errors import in_one_line

if TYPE_CHECKING:
    from framebridge_plugin.testing.subject import Subject


# A launcher's variables would make finetrainers wait for the other processes.
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ConformanceFailure(AssertionError):
    """A specification does not do what finetrainers' trainers rely on; the message is one line."""


@dataclass(frozen=True)
class Check:
    """One check of the suite.

    Attributes:
        name: Its name, for `--only` and for tables of known faults.
        function: Raises `ConformanceFailure`, or anything else, where it does not hold.
    """

    name: str
    function: Callable[[Subject], None]


@dataclass(frozen=True)
class KnownFault:
    """A failure that is expected, for a reason that lies outside the specification's author's reach.

    Attributes:
        reason: Why the check fails, in one line.
        message: Regular expression that is found in the failure's message; another failure is not this fault.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class Result:
    """What came out of one check.

    Attributes:
        check: Name of the check.
        status: "ok", "known" (it failed as a table of known faults says), "repaired" (it passed although such a
            table says that it fails) or "FAILED".
        message: One line with check, specification and what is wrong; the reason of a known fault; empty for "ok".
        seconds: How long it took.
        traceback: Of the failure, empty if there is none.
    """

    check: str
    status: str
    message: str
    seconds: float
    traceback: str = ""


def fail(message: str) -> NoReturn:
    """Ends a check."""
    raise ConformanceFailure(message)


def require(condition: object, message: str) -> None:
    """Ends a check if a condition does not hold."""
    if not condition:
        fail(message)


def run_check(check: Check, subject: Subject, known_faults: Mapping[str, KnownFault]) -> Result:
    """Puts a specification through one check.

    Args:
        check: The check.
        subject: The specification.
        known_faults: Expected failures by name of the check.

    Returns:
        What came out of it. Only an interruption is raised.
    """
    fault = known_faults.get(check.name)
    started = time.perf_counter()
    try:
        with _quiet_process():
            check.function(subject)
    except Exception as error:
        seconds = time.perf_counter() - started
        reason = _one_line(error)
        trace = traceback.format_exc()
        if fault is not None and re.search(fault.message, reason):
            return Result(check.name, "known", f"known: {fault.reason}", seconds, trace)
        return Result(check.name, "FAILED", f"{check.name}: {subject.name}: {reason}", seconds, trace)
    seconds = time.perf_counter() - started
    if fault is not None:
        message = f"{check.name}: {subject.name}: passes, although this fault is known: {fault.reason}"
        return Result(check.name, "repaired", message, seconds)
    return Result(check.name, "ok", "", seconds)


def _one_line(error: Exception) -> str:
    """The message of a failure; of any other error also its type, and where in the program it was raised."""
    text = in_one_line(error)
    if isinstance(error, ConformanceFailure):
        return text
    frame: Any = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text or 'no message'} (raised in {frame.name}, {frame.filename}:{frame.lineno})"


@contextlib.contextmanager
def _quiet_process() -> Iterator[None]:
    """Hides what a check prints, and leaves the process as it was: random numbers, variables and process groups."""
    disabled = logging.root.manager.disable
    variables = {name: os.environ.pop(name) for name in _LAUNCH_VARIABLES if name in os.environ}
    # Handlers write to the stream that was there when they were made.
    logging.disable(logging.CRITICAL)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)
        os.environ.update(variables)
        if torch.distributed.is_initialized():
            # A run that stopped early leaves its process group behind.
            torch.distributed.destroy_process_group()
