"""What signals do to a command: the first ends it in order, the second at once. Needs the standard library alone.

SIGINT and SIGTERM, and SIGUSR1 where a recipe asks for it, raise `Interrupted` in the main thread; training only notes
them (`deferred`) and looks at `pending` between its steps. A thread hears of a signal even while the main thread waits
in a library for what never comes, and ends the process then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

from framebridge_plugin.errors import say

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SECONDS_TO_END = 10.0
"""How long the end may take of what has nothing to save."""

_SECONDS_OF_ONE = 1.0  # a terminal, torchrun and a scheduler may each pass on what is one signal


class Interrupted(KeyboardInterrupt):
    """The command was told to stop; what was to be saved is saved."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.exit_code = 0 if number == signal.SIGUSR1 else 128 + number
        """130 for SIGINT, 143 for SIGTERM; 0 for SIGUSR1, after which a scheduler starts the same command again."""


class _Signals:
    """The state of the one block in a process that handles signals."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self.is_deferred = False
        self.raised = False
        self.before: dict[int, Any] = {}
        self.deadline: float | None = None
        self.first_at: float | None = None
        self.pipe = os.pipe()

    def handle(self, number: int) -> None:
        """Lets a signal stop the command, unless the process was started to ignore it (`nohup`)."""
        if number not in self.before and signal.getsignal(number) is not signal.SIG_IGN:
            self.before[number] = signal.signal(number, self._in_main_thread)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})  # what started the process may have `blocked` it

    def _in_main_thread(self, number: int, _: object) -> None:
        if self.pending is None:
            self.pending = number
        if not self.is_deferred and not self.raised:
            self.raised = True
            raise Interrupted(number)

    def listen(self) -> None:
        """What the thread does: ends the process at the second signal, and when its time is over."""
        while received := self._wait():
            for number in received:
                if number not in self.before:
                    continue
                if self.first_at is None:
                    self.pending, self.first_at = number, time.monotonic()
                elif time.monotonic() - self.first_at > _SECONDS_OF_ONE:
                    end_at_once(128 + number, "ended at once by a second signal")
            if self.first_at is not None and not self.is_deferred and self.deadline is None:
                self.deadline = time.monotonic() + SECONDS_TO_END
            if self.deadline is not None and time.monotonic() > self.deadline:
                end_at_once(Interrupted(self.pending or signal.SIGTERM).exit_code, "interrupted")

    def _wait(self) -> bytes:
        import select

        ready, _, _ = select.select([self.pipe[0]], [], [], 0.5)
        return os.read(self.pipe[0], 64) if ready else b"\0"


_current: _Signals | None = None


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """SIGINT and SIGTERM stop what is done within the block; without effect in another than the main thread."""
    global _current
    if threading.current_thread() is not threading.main_thread() or _current is not None:
        yield
        return
    signals = _current = _Signals()
    os.set_blocking(signals.pipe[1], False)
    fd_before = signal.set_wakeup_fd(signals.pipe[1], warn_on_full_buffer=False)
    thread = threading.Thread(target=signals.listen, daemon=True)
    thread.start()
    signals.handle(signal.SIGINT)
    signals.handle(signal.SIGTERM)
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in signals.before.items():
            signal.signal(number, handler)
        _current = None
        os.close(signals.pipe[1])  # ends the thread
        thread.join()
        os.close(signals.pipe[0])


@contextlib.contextmanager
def as_interruption() -> Iterator[None]:
    """Raises `Interrupted` again where a library has made another error of it, as an import may."""
    try:
        yield
    except Exception as error:
        if _current is not None and _current.raised and _current.pending is not None:
            raise Interrupted(_current.pending) from error
        raise


def ended_by(interruption: KeyboardInterrupt) -> int:
    """Says what ends the command; returns its exit code."""
    say(str(interruption) or "interrupted")
    return interruption.exit_code if isinstance(interruption, Interrupted) else 128 + signal.SIGINT


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started within the block hear of these signals only once they handle them too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, () if _current is None else _current.before)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def handle_sigusr1() -> None:
    """SIGUSR1 stops the command too, from here on."""
    if _current is not None:
        _current.handle(signal.SIGUSR1)


def pending() -> int | None:
    """The signal by which the command was told to stop."""
    return None if _current is None else _current.pending


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """The first signal within the block is only noted; the block ends in time by itself, and raises `Interrupted`."""
    if _current is None:
        yield
        return
    _current.is_deferred = True
    try:
        yield
    finally:
        _current.is_deferred = False


def end_at_once(exit_code: int, message: str) -> None:
    """Ends the process from whatever thread, with the processes that it has forked."""
    say(message)
    for child in _forked():
        child.kill()
    os._exit(exit_code)


def leave_to_main_process(worker: int = 0) -> None:
    """For a process that reads for another: a signal to the whole group is the other's affair, which ends it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def ending_forks() -> Iterator[None]:
    """Ends at its end the processes that were forked within the block: those that leave signals to this one."""
    before = set(_forked())
    try:
        yield
    finally:
        end_workers(before)


def end_workers(spared: Collection[Any] = ()) -> None:
    """Kills the processes that this one has forked: they read for it, and have nothing to lose."""
    workers = [child for child in _forked() if child not in spared]
    if workers and threading.current_thread() is threading.main_thread():
        # torch raises in this thread when one of its workers is killed.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in workers:
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, handler)


def _forked() -> Collection[Any]:
    multiprocessing: Any = sys.modules.get("multiprocessing")
    return multiprocessing.active_children() if multiprocessing is not None else ()


def _in_fork() -> None:
    # Its signals are not this process's: they would be written into the same pipe.
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        for number, handler in _current.before.items():
            signal.signal(number, handler)
        _current = None


os.register_at_fork(after_in_child=_in_fork)
