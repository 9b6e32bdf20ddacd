"""Which run a folder belongs to: `<output_dir>/run.json`, a random id and the settings that make it that run.

Files alone say nothing: a folder without it, with whatever else in it, is a new run's, unless checkpoints of ours are
there (of a version that wrote no run.json), which have their settings themselves, or a model that would be replaced.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.starting import goes_on
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import read_regular, write_whole
from framebridge_plugin.training.resume_settings import Groups, setting_differences, settings_refusal

RUN_FILE = "run.json"
_CHANGES_FILE = "allowed.jsonl"
_LARGEST = 64 << 20
"""Bytes of either file."""

logger = logging.getLogger(__name__)


def check_run(output_dir: Path, settings: Groups, allowed: Collection[str]) -> set[str]:
    """Refuses a run with other settings in the folder of one, and a model there that is of no run.

    Args:
        output_dir: The run's folder, which need not exist.
        settings: The run's `run_settings`.
        allowed: Groups of them in which it may differ.

    Returns:
        The groups in which its checkpoints may differ: those, and in which it has been another before.

    Raises:
        FrameBridgeError: In one line, with the settings that differ.
    """
    run = _read(output_dir)
    if run is not None:
        refusal = settings_refusal(setting_differences(run["settings"], settings), allowed)
        if refusal is not None:
            raise FrameBridgeError(
                f"cannot resume from {output_dir}, the folder of run {run['id'][:8]}: {refusal}, or choose "
                "another checkpoints.output_dir for a new run"
            )
    elif not goes_on(output_dir, "auto"):
        for name in ("model", "lora"):
            if (output_dir / name).exists():
                raise UsageError(
                    f"checkpoints.output_dir: {output_dir / name} is of no run that could go on, and a run here would "
                    "replace it; choose another folder"
                )
    return {*allowed, *_noted_groups(output_dir)}


def write_run(output_dir: Path, settings: Groups) -> None:
    """Makes the folder the run's, which keeps the id that it has."""
    run = _read(output_dir) or {"id": uuid.uuid4().hex}
    write_whole(output_dir / RUN_FILE, json.dumps(run | {"settings": dict(settings)}, indent=2) + "\n")


def note_changes(output_dir: Path, progress: Mapping[str, Any], changes: Mapping[str, str]) -> None:
    """Notes in `allowed.jsonl` in which groups of settings the run has been another until now."""
    for group, text in changes.items():
        logger.warning("--allow %s: up to update %s it was trained %s", group, progress["step"], text)
    if changes:
        with (output_dir / _CHANGES_FILE).open("a") as file:
            file.write(json.dumps({**progress, **changes}) + "\n")


def _noted_groups(output_dir: Path) -> set[str]:
    """The groups of settings in which the run has been another before, as `note_changes` wrote them."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        lines = read_regular(output_dir / _CHANGES_FILE, _LARGEST).splitlines()
        return {name for line in lines for name in json.loads(line)}
    return set()


def _read(output_dir: Path) -> dict[str, Any] | None:
    path = output_dir / RUN_FILE
    if not path.exists():
        return None
    try:
        run = json.loads(read_regular(path, _LARGEST))
        if isinstance(run["id"], str) and isinstance(run["settings"], dict):
            return run
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UsageError(f"{path} is not readable; choose another folder, or remove that file if the run is this one")
