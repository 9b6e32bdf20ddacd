"""What a run has gone back from: checkpoints and metrics that are not of its history any more.

<output_dir>/abandoned/2-after-step-300/    the second time, back to step 300
    step_000400/, step_000500/              checkpoints that came after it, or were not whole
    metrics.jsonl                           the lines of later steps
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from framebridge_plugin.backbones.copying import remove_folder, sync
from framebridge_plugin.backbones.manifest import step_folders

METRICS_FILE = "metrics.jsonl"


def set_aside(output_dir: Path, step: int, checkpoints: Sequence[Path]) -> Path | None:
    """Moves checkpoints, and the metrics after a step, into a new folder; None if there are neither."""
    kept, later = _split_metrics(output_dir / METRICS_FILE, step)
    if not checkpoints and not later:
        return None
    parent = output_dir / "abandoned"
    number = max((_number(folder) for folder in parent.glob("*-after-step-*")), default=0) + 1
    folder = parent / f"{number}-after-step-{step}"
    folder.mkdir(parents=True)
    if later:
        _write(folder / METRICS_FILE, later)
        partial = output_dir / f".{METRICS_FILE}.partial"
        _write(partial, kept)
        partial.rename(output_dir / METRICS_FILE)
    # The newest first: after a kill in between, the newest that is left is nearer to the step.
    for checkpoint in checkpoints:
        shutil.move(checkpoint, folder / checkpoint.name)  # a mount may be another disk
    for path in (folder, parent, output_dir):
        sync(path)
    return folder


def remove_abandoned(output_dir: Path, keep: int) -> None:
    """Removes all abandoned checkpoints but the `keep` newest."""
    folders = sorted((output_dir / "abandoned").glob("*-after-step-*"), key=_number, reverse=True)
    found = [checkpoint for folder in folders for _, checkpoint in sorted(step_folders(folder).items(), reverse=True)]
    for checkpoint in found[keep:]:
        remove_folder(checkpoint)


def _number(folder: Path) -> int:
    first = folder.name.partition("-")[0]
    return int(first) if first.isdecimal() else 0


def _split_metrics(path: Path, step: int) -> tuple[list[bytes], list[bytes]]:
    """The lines of a file up to a step, and all others; a line that a kill cut short is one of these."""
    kept: list[bytes] = []
    later: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        (kept if _step_of(line) <= step else later).append(line)
    return kept, later


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _write(path: Path, lines: Sequence[bytes]) -> None:
    path.write_bytes(b"".join(lines))
    sync(path)
