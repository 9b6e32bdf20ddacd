"""One process at a time writes a folder: a lock of the operating system, with a heartbeat for other machines.

The operating system takes the lock away from a process that ends, in whatever way. Not every network file system knows
such locks, and a machine that is gone may leave one behind: so the file says who holds it and is written every 15
seconds, and counts as free after 120 seconds in which another machine has not written it. Whoever finds its lock taken
ends at once. Needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from framebridge_plugin.errors import FrameBridgeError, say
from framebridge_plugin.files import writing
from framebridge_plugin.processes import is_alive, this_process
from framebridge_plugin.signals import end_at_once

BEAT_S = 15.0
FREE_AFTER_S = 120.0

_LENGTH = 512  # of what the file holds, written in one call


class FolderLock:
    """Holds a lock file, `<folder>/.lock`, within its block; raises `FrameBridgeError` if another process does.

    It is a lock of the process (POSIX): loader workers that are forked from it hold nothing.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.folder, self._path = folder, folder / name
        self._me = this_process() | {"token": uuid.uuid4().hex}
        self._ended = threading.Event()

    def __enter__(self) -> FolderLock:
        with writing(self._path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._acquire()
            self._write()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._path.unlink()
        os.close(self._descriptor)

    def _acquire(self) -> int:
        """Waits, no longer than `FREE_AFTER_S`, for a sign of an owner on another machine; returns the open file."""
        started, seen = time.monotonic(), None
        while True:
            # Not opened a second time: closing any descriptor of the file would give the lock away.
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            is_locked = _try_to_lock(descriptor)
            if not self._is_there(descriptor):  # removed by its last owner between the two
                os.close(descriptor)
                continue
            owner = _read(descriptor)
            is_here = owner is None or owner["machine"] == self._me["machine"]
            if is_here and (is_locked or (is_locked is None and (owner is None or not is_alive(owner["pid"])))):
                return descriptor
            age = max(self._age(), time.monotonic() - started)
            if (is_here and is_locked is False) or (seen is not None and owner != seen):
                os.close(descriptor)
                who = "another process" if owner is None else f"process {owner['pid']} on {owner['host']}"
                raise FrameBridgeError(f"{self.folder} is in use by {who}; choose another folder, or end that first")
            if age >= FREE_AFTER_S:
                if is_locked is not False:
                    return descriptor
                self._path.unlink()  # a lock that a machine has left behind
            elif seen is None and owner is not None:
                say(
                    f"{self.folder}: {owner['host']} held it {age:.0f} s ago (process {owner['pid']}); waiting for a "
                    f"sign of it until {FREE_AFTER_S:.0f} s have passed"
                )
            seen = owner
            os.close(descriptor)
            time.sleep(1.0)

    def _age(self) -> float:
        """Seconds since the file was written, both times by the clock of the disk."""
        probe = self._path.with_name(f"{self._path.name}.{self._me['token']}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self._path.stat().st_mtime
        finally:
            probe.unlink()

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except OSError:
            return False

    def _is_mine(self) -> bool:
        owner = _read(self._descriptor)
        return self._is_there(self._descriptor) and owner is not None and owner["token"] == self._me["token"]

    def _write(self) -> None:
        content = json.dumps(self._me | {"time": time.time()}).encode().ljust(_LENGTH - 1) + b"\n"
        os.pwrite(self._descriptor, content, 0)
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a full disk is no reason to give the folder away
                if not self._is_mine():
                    problem = "its lock was taken, or removed, by another process"
                    end_at_once(1, f"error: {self.folder}: {problem}; this one ends, so that no two write it")
                self._write()


def _try_to_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(descriptor, _LENGTH, 0))
        return owner if {"host", "machine", "pid", "token"} <= owner.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
