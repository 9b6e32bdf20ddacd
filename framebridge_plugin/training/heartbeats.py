"""The ranks of a run look after each other: one that hangs or is gone ends the run, instead of holding up the others.

Every rank writes how far it is into a file of the run's folder, which a thread does even while the rank waits for the
others. The first rank reads all of them, the others that of the first. What counts as silence: a rank that shows no
sign of life, or is behind the others without getting on. What may take long (the first update, saving, validation,
encoding for a precomputation) does not count.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framebridge_plugin import signals
from framebridge_plugin.files import write_whole
from framebridge_plugin.processes import is_alive, this_process
from framebridge_plugin.settings.finetrainers import ParallelismSection

HEARTBEATS = ".heartbeats"
"""Their folder in the run's."""
BEAT_S = 2.0
GONE_AFTER_S = 6.0
"""Without a sign of life, once the run is told to stop: its checkpoint would need that rank."""


class Heartbeats:
    """Within its block this rank shows its life and watches others'; with one process it does nothing.

    Args:
        folder: Where the files are.
        rank: This process.
        world_size: How many there are.
        timeout: Seconds of silence that end the run; None for none.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float | None) -> None:
        self._folder, self._rank, self._world_size, self._timeout = folder, rank, world_size, timeout
        self._me = this_process() | {"beat": 0, "marks": 0, "doing": "starting", "counts": False}
        self._seen: dict[int, tuple[dict[str, Any], float, float]] = {}
        self._ended = threading.Event()
        self._changes = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Heartbeats:
        if self._world_size > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._world_size > 1:
            self._ended.set()
            self._thread.join()
            if kind is None or issubclass(kind, signals.Interrupted):
                with contextlib.suppress(OSError):
                    self._path(self._rank).unlink()
                    self._folder.rmdir()  # of the last one

    def mark(self, doing: str, *, counts: bool = True) -> None:
        """Says that this rank has got on, and whether what it does now may be called silence."""
        with self._changes:
            is_news = counts != self._me["counts"]
            self._me |= {"marks": self._me["marks"] + 1, "doing": doing, "counts": counts}
        if is_news and self._thread.is_alive():  # it could hang before the thread's next turn
            self._write()

    @contextlib.contextmanager
    def at_leisure(self, doing: str) -> Iterator[None]:
        """What is done within the block may take as long as it likes."""
        self.mark(doing, counts=False)
        yield
        self.mark(f"after {doing}")

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.json"

    def _write(self) -> bool:
        with self._changes:
            self._me["beat"] += 1
            try:
                write_whole(self._path(self._rank), json.dumps(self._me))
            except OSError:
                return False
        return True

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._path(rank).read_text())
        except (OSError, ValueError):
            return None

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_S):
            if not self._write():
                self._seen.clear()  # the disk's fault, and perhaps for all
                continue
            told = signals.pending()
            everyone = self._rank == 0 or told is not None
            for rank in range(self._world_size) if everyone else (0,):
                problem = None if rank == self._rank else self._problem(rank, told)
                if problem is None or self._ended.is_set():
                    continue
                if told is not None:
                    message = f"{problem}; the run ends without a checkpoint of this update"
                    signals.end_at_once(signals.Interrupted(told).exit_code or 128 + signal.SIGUSR1, message)
                signals.end_at_once(1, f"error: {problem}; the run ends, and the same command goes on")

    def _problem(self, rank: int, told: int | None) -> str | None:
        """What is wrong with another rank."""
        now, record = time.monotonic(), self._read(rank)
        if record is None:
            self._seen.pop(rank, None)  # it has left in order, or is not there yet
            return None
        last, lived, got_on = self._seen.get(rank, (record, now, now))
        lived = now if record["beat"] != last["beat"] else lived
        got_on = now if record["marks"] != last["marks"] else got_on
        self._seen[rank] = record, lived, got_on
        who = f"rank {rank} (process {record['pid']} on {record['host']})"
        if told is not None:
            is_here = record["machine"] == self._me["machine"]
            if (is_here and not is_alive(record["pid"])) or (record["counts"] and now - lived > GONE_AFTER_S):
                return f"{who} is gone"
        if self._timeout is None or not record["counts"]:
            return None
        if now - lived > self._timeout:
            return f"{who} has shown no sign of life for {now - lived:.0f} s ({record['doing']})"
        if now - got_on > self._timeout and record["marks"] < self._me["marks"]:
            return f"{who} hangs: for {now - got_on:.0f} s it has been {record['doing']}, and the others wait"
        return None


def heartbeats_of(args: Any, rank: int, world_size: int) -> Heartbeats:
    """Those of a run; arguments that were not made of a recipe may lack the limit."""
    timeout = getattr(args, "heartbeat_timeout", ParallelismSection.model_fields["heartbeat_timeout"].default)
    return Heartbeats(Path(args.output_dir, HEARTBEATS), rank, world_size, timeout)
