"""Clips per second through a `DataLoader`, as a run reads them."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from clip_rates import read_whole_video
from torch.utils.data import DataLoader, IterableDataset

from framebridge_plugin.data import ClipError, ClipIndex, ClipSettings, ClipStream, read_clip

WORKERS = (0, 1, 2)
WHOLE_VIDEO_SHARE = 8
_TICKS = os.sysconf("SC_CLK_TCK")


class WholeVideos(IterableDataset):
    """The same file again and again, each time read whole."""

    def __init__(self, path: Path, settings: ClipSettings) -> None:
        self.path, self.settings = path, settings

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield read_whole_video(self.path, self.settings)


def measure_loader(path: Path, settings: ClipSettings, repetitions: int, clips: int) -> dict[str, Any]:
    """Reads a video through loaders with 0, 1 and 2 workers, in turns.

    Returns:
        For every way and number of workers the median rate of clips by the clock, and the processor time per clip of
        all processes together, which depends less on what else the machine does.
    """
    index = ClipIndex(datasets.Dataset.from_dict({"path": [str(path)], "caption": [""]}), "caption")
    ways: dict[str, tuple[Any, int]] = {"pyav": (ClipStream([(index, settings)], seed=0), clips)}
    try:
        with_decord = ClipSettings(**settings.model_dump() | {"decoder": "decord"})
        read_clip(str(path), with_decord, torch.Generator().manual_seed(0))
        ways["decord"] = (ClipStream([(index, with_decord)], seed=0), clips)
    except ClipError:
        pass
    ways["whole video"] = (WholeVideos(path, settings), max(clips // WHOLE_VIDEO_SHARE, 2))

    runs: dict[str, dict[int, list[tuple[float, float]]]] = {
        name: {workers: [] for workers in WORKERS} for name in ways
    }
    for _ in range(repetitions):
        for workers, (name, (stream, count)) in itertools.product(WORKERS, ways.items()):
            runs[name][workers].append(_run(stream, workers, count))
    return {
        name: {
            f"{workers} workers": {
                "clips_per_second": round(statistics.median(1 / wall for wall, _ in pairs), 2),
                "cpu_ms_per_clip": round(statistics.median(cpu for _, cpu in pairs) * 1000, 1),
            }
            for workers, pairs in by_workers.items()
        }
        for name, by_workers in runs.items()
    }


def _run(stream: IterableDataset, workers: int, clips: int) -> tuple[float, float]:
    """Seconds by the clock and of processor time per clip, the start of the processes left out."""
    samples = iter(DataLoader(stream, batch_size=None, num_workers=workers))
    for _ in range(max(workers, 1)):
        next(samples)
    processes = [os.getpid(), *(worker.pid for worker in getattr(samples, "_workers", ()))]
    used, started = _cpu_seconds(processes), time.perf_counter()
    for _ in range(clips):
        next(samples)
    wall, cpu = time.perf_counter() - started, _cpu_seconds(processes) - used
    return wall / clips, cpu / clips


def _cpu_seconds(processes: list[int]) -> float:
    # Fields 14 and 15, after the name in brackets, which may hold spaces.
    fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes]
    return sum(int(values[11]) + int(values[12]) for values in fields) / _TICKS


def print_loader(name: str, loader: dict[str, Any]) -> None:
    """Prints one video's table."""
    print(f"\nLoader, {name}: clips per second by the clock (ms of CPU per clip)")
    for way, by_workers in loader.items():
        cells = (
            f"{workers}: {row['clips_per_second']:.1f} ({row['cpu_ms_per_clip']:.0f})"
            for workers, row in by_workers.items()
        )
        print(f"  {way:14}{'   '.join(cells)}")
