"""Which checkpoint a run goes on from, and what it says of the run that wrote it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.folders import two_file_problem
from framebridge_plugin.backbones.manifest import (
    DamagedError,
    Manifest,
    folder_problem,
    read_checked,
    read_manifest,
    step_folder,
    step_folders,
    whole_checkpoints,
)
from framebridge_plugin.errors import FrameBridgeError, first_line
from framebridge_plugin.training.resume_settings import Groups, setting_differences, settings_refusal

STATE_FILE = "trainer/state.json"
NEWEST = ("latest", "auto")


def find_checkpoints(root: Path, which: int | str) -> list[Path]:
    """The folders in `root` to resume from, the best first: of a step, or of the "latest" (or "auto") those that are
    whole as far as sizes tell; none if there are no checkpoints at all.
    """
    folders, whole = step_folders(root), list(whole_checkpoints(root))
    for folder in folders.values():
        if (problem := two_file_problem(folder / "lora")) is not None:
            raise FrameBridgeError(
                f"cannot resume from {folder}, whose optimizer is of an earlier version; sample from its LoRA, "
                f"or merge it and begin a new run on that: {problem}"
            )
    if which in NEWEST:
        if folders and not whole:
            newest = folders[max(folders)]
            raise damaged(newest, folder_problem(newest), which)
        return whole
    if int(which) not in folders:
        available = ", ".join(map(str, sorted(folders))) or "none"
        raise FrameBridgeError(
            f"no checkpoint {which!r} in {root} (steps there: {available}); give one of these steps as "
            "checkpoints.resume_from_checkpoint, or choose another checkpoints.output_dir to start anew"
        )
    folder = folders[int(which)]
    if (problem := folder_problem(folder)) is not None:
        raise damaged(folder, problem, which)
    return [folder]


def stored_settings(folder: Path) -> Groups:
    """The `run_settings` that a checkpoint was trained with."""
    try:
        return read_state(folder)[1]["settings"]
    except (DamagedError, KeyError) as error:
        raise cannot_resume(folder, error) from error


def read_state(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of a checkpoint, and what its state says; a DamagedError if they are not as they were written."""
    manifest = read_manifest(folder)
    state = json.loads(read_checked(folder, STATE_FILE, manifest))
    if folder.name != step_folder(folder.parent, state["step"]).name:
        raise DamagedError(f"{folder} is a copy of the checkpoint of update {state['step']}")
    return manifest, state


def check_settings(folder: Path, stored: Groups, settings: Groups, allowed: Collection[str] = ()) -> dict[str, str]:
    """Refuses a run that would go on with the checkpoint in `folder` with other settings than are stored in it.

    What it differs in, of the groups that are allowed, is returned: the group, and what is stored.
    """
    changes = setting_differences(stored, settings)
    if (refusal := settings_refusal(changes, allowed)) is not None:
        raise FrameBridgeError(f"cannot resume from {folder}: {refusal}")
    return changes


def damaged(folder: Path, problem: object, which: int | str) -> FrameBridgeError:
    """The error for a checkpoint that is not as it was written, which was to be the one of a step or the newest."""
    if which in NEWEST:
        remedy = "no checkpoint is whole: restore one from a copy, or start anew in another folder"
    else:
        remedy = "give another step as checkpoints.resume_from_checkpoint, or latest"
    return FrameBridgeError(f"cannot resume from {folder}: {problem}; {remedy}")


def cannot_resume(folder: Path, reason: BaseException | str) -> FrameBridgeError:
    """The error for a whole checkpoint that is not for this run."""
    return FrameBridgeError(
        f"cannot resume from {folder}: {first_line(reason)}; resume with the settings of the run's recipe.yaml"
    )
