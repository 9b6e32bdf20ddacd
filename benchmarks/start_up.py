"""Time to the first batch, and memory, of a run on a table of millions of clips; each time in a new process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 8
WORKERS = 2
CACHED_RUNS = 3
SMALL_ROWS = 1000


def measure_start(table: Path, root: Path, rows: int, samples: int) -> dict[str, Any]:
    """Starts on the table before its index is built, then from the cache, and from the cache with few of its rows.

    Returns:
        What `start` returns for each; from the cache, medians.
    """
    small = table.with_name("small.csv")
    with table.open(encoding="utf-8") as lines, small.open("w", encoding="utf-8") as file:
        file.writelines(line for line, _ in zip(lines, range(SMALL_ROWS + 1), strict=False))
    results: dict[str, Any] = {"rows": rows, "table_mb": round(table.stat().st_size / 1e6), "samples": samples}
    with tempfile.TemporaryDirectory(prefix="data-loading-cache-") as cache:
        results["cold"] = _in_new_process(table, root, 0, cache)
        results["cached"] = _median_of_new_processes(table, root, samples, cache)
        _in_new_process(small, root, 0, cache)
        results[f"cached, {SMALL_ROWS} rows"] = _median_of_new_processes(small, root, samples, cache)
    return results


def _median_of_new_processes(table: Path, root: Path, samples: int, cache: str) -> dict[str, float]:
    runs = [_in_new_process(table, root, samples, cache) for _ in range(CACHED_RUNS)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _in_new_process(table: Path, root: Path, samples: int, cache: str) -> dict[str, float]:
    command = [sys.executable, __file__, str(table), str(root), str(samples)]
    environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def start(table: str, root: str, samples: int) -> dict[str, float]:
    """Does in this process what a run does until its first batch, and reads on.

    Args:
        table: WebVid's table.
        root: Folder of the videos.
        samples: Clips that each worker then reads.

    Returns:
        Seconds: `import_s` for torch and `datasets`, `index_s` until the rows are there, `first_batch_s` for all of
        it. Megabytes: `peak_mb` of this process; for the largest worker its share of all memory that it sees, mapped
        files included (`worker_pss_mb`), and the memory that belongs to no file (`worker_anonymous_mb`), after the
        first batch and at the end.
    """
    began = time.perf_counter()
    from torch.utils.data import DataLoader

    from framebridge_plugin.data import ClipIndex, ClipSettings, ClipStream, load_webvid

    imported = time.perf_counter()
    index = ClipIndex(load_webvid(table, root), "name")
    indexed = time.perf_counter()
    settings = ClipSettings(num_frames=16, height=48, width=64)
    loader: Any = iter(DataLoader(ClipStream([(index, settings)], seed=0), batch_size=None, num_workers=WORKERS))
    for _ in range(BATCH):
        next(loader)
    batch = time.perf_counter()
    workers = [worker.pid for worker in loader._workers]
    first = _memory_mb(workers)
    for _ in range(samples * WORKERS):
        next(loader)
    last = _memory_mb(workers)
    return {
        "import_s": round(imported - began, 3),
        "index_s": round(indexed - imported, 3),
        "first_batch_s": round(batch - began, 3),
        "peak_mb": round(_peak_mb()),
        "worker_pss_mb": round(first["Pss"]),
        "worker_anonymous_mb": round(first["Anonymous"]),
        "worker_pss_mb_at_end": round(last["Pss"]),
        "worker_anonymous_mb_at_end": round(last["Anonymous"]),
    }


def _peak_mb() -> float:
    # Unlike getrusage's maximum, this does not count the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def _memory_mb(processes: list[int]) -> dict[str, float]:
    # The largest of the processes. Anonymous memory counts pages that a fork still shares with its parent, too.
    values: dict[str, float] = {"Pss": 0.0, "Anonymous": 0.0}
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, amount = line.partition(":")
            if name in values:
                values[name] = max(values[name], int(amount.split()[0]) / 1000)
    return values


def print_start(results: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"\nStart on a table of {results['rows']} rows ({results['table_mb']} MB)")
    for name, row in results.items():
        if isinstance(row, dict):
            print(f"  {name:18}{', '.join(f'{key} {value:g}' for key, value in row.items())}")


if __name__ == "__main__":
    print(json.dumps(start(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
