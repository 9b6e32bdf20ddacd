"""Decoding in a process of its own, so that a decoder that crashes or hangs costs one clip and not the run.

Every process that reads clips keeps one such child, started at its first clip and again after each loss. It is an
ordinary program: the workers of a `DataLoader` may not start `multiprocessing` processes, and a fork would copy the
locks of running threads. It ends by itself when the process that started it is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.data.decoding.exact import Choose, Timing
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.processes import python_command

TIME_LIMIT_S = 60.0
"""A decoder that needs more than this for a clip is taken to hang."""

START_LIMIT_S = 300.0

KEPT_BYTES = 64 * 2**20
"""Shared memory that is kept from clip to clip; what large ones took is given back."""


def read_video_isolated(path: str, choose: Choose, *, time_limit_s: float | None = None, **options: Any) -> np.ndarray:
    """Do what `read_video` does in a child process; a `ClipError` may be "crashed" or, at the limit, "timeout"."""
    with _living_child() as child:
        return child.read(path, choose, options, time_limit_s or TIME_LIMIT_S)


def read_timing_isolated(path: str) -> Timing:
    """Do what `read_timing` does in a child process; raises `ClipError` as `read_video_isolated` does."""
    with _living_child() as child:
        return child.read(path, range, None, TIME_LIMIT_S)


@contextlib.contextmanager
def _living_child() -> Iterator[DecodingProcess]:
    """The child of this process, started if need be, for one caller at a time."""
    global _child
    with _lock:
        if _child is None or not _child.is_alive():
            _child = DecodingProcess()
        yield _child


class DecodingProcess:
    """The child process and the line to it; `FrameBridgeError` if it does not start."""

    def __init__(self) -> None:
        # Two pipes, of which each process holds one end only: a closed end is how it learns that the other is gone.
        requests, to_child = os.pipe()
        from_child, replies = os.pipe()
        # Frames would take long through a pipe: they are put down in memory that both processes see.
        self._frames = os.fdopen(os.memfd_create("frames"), "r+b", buffering=0)
        self._to_child = Connection(to_child, readable=False)
        self._from_child = Connection(from_child, writable=False)
        descriptors = (requests, replies, self._frames.fileno())
        command, environment = python_command("framebridge_plugin.data.decoding.child", *map(str, descriptors))
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                # One thread, because there is a child for every loader worker.
                env=environment | {"OMP_NUM_THREADS": "1"},
            )
        finally:
            os.close(requests)
            os.close(replies)
        try:
            is_ready = self._from_child.poll(START_LIMIT_S) and self._from_child.recv() == "ready"
        except EOFError:
            is_ready = False
        if not is_ready:
            self.close()
            raise FrameBridgeError(
                "the process for isolated decoding does not start; what it wrote to the standard error output says "
                "why; to do without it, leave out isolated"
            )

    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def read(self, path: str, choose: Choose, options: dict[str, Any] | None, limit: float) -> Any:
        """Have the child do `read_video` with these options, or without any `read_timing`; it ends at other errors."""
        try:
            outcome = self._ask(path, choose, options, limit)
        except TimeoutError as error:
            self.close()
            raise ClipError(path, f"its decoder did not end within {limit:g} s", "timeout") from error
        except (EOFError, OSError) as error:
            raise ClipError(path, f"its decoder crashed ({self._end()})", "crashed") from error
        except BaseException:
            # Interrupted between a question and its answer: the next answer would belong to this question.
            self.close()
            raise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _ask(self, path: str, choose: Choose, options: dict[str, Any] | None, limit: float) -> Any:
        deadline = time.monotonic() + limit
        self._to_child.send((path, options, limit))
        while True:
            if not self._from_child.poll(max(deadline - time.monotonic(), 0.0)):
                raise TimeoutError
            reply = self._from_child.recv()
            if isinstance(reply, Exception | Timing):
                return reply
            if isinstance(reply, tuple):
                with mmap.mmap(self._frames.fileno(), math.prod(reply), prot=mmap.PROT_READ) as shared:
                    pictures = np.ndarray(reply, np.uint8, shared).copy()
                if pictures.nbytes > KEPT_BYTES:
                    self._frames.truncate(0)
                return pictures
            try:
                self._to_child.send(list(choose(reply)))
            except ClipError as error:
                # The child decides what it means, since it also asks with numbers that it is not sure of.
                self._to_child.send(error)

    def _end(self) -> str:
        """Say how the child, which has closed its end of the line, ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5.0)
        code = self.process.returncode
        self.close()
        if code is None:
            return "it stopped answering"
        return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"

    def close(self) -> None:
        """End the child if it still runs."""
        self.process.kill()
        self.close_line()
        # A process that waits in the kernel for a dead disk or network share ends only when that answers.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5.0)

    def close_line(self) -> None:
        """Let go of the line, which ends an idle child."""
        self._to_child.close()
        self._from_child.close()
        self._frames.close()


_child: DecodingProcess | None = None
_lock = threading.Lock()


def _close_child() -> None:
    if _child is not None:
        _child.close()


def _forget_child() -> None:
    # In a new fork: the child belongs to the process that started it, and must see its line closed when that ends.
    global _child, _lock
    if _child is not None:
        _child.close_line()
        _child.process.returncode = 0  # Else Popen would wait for a process that is not ours.
    _child, _lock = None, threading.Lock()


atexit.register(_close_child)
os.register_at_fork(after_in_child=_forget_child)
