"""Finding models on the disk, and what says what a folder or a file is; `examination` puts it together.

Needs the standard library alone, so that a wrong path costs a second and not a minute.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts, working_backbones
from framebridge_plugin.backbones.files import Reader, read_if_whole, read_json
from framebridge_plugin.backbones.manifest import whole_checkpoints
from framebridge_plugin.settings.choices import is_flow_matching

LORA_INFO_FILE = "framebridge.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
EXTRA_WEIGHTS_FILE = "extra_weights.safetensors"
"""Beside the LoRA file of an earlier version: the trained input projection."""
TWO_FILE_LORA = "two-file-lora"
"""What `finetrainers convert --from` calls the LoRA folders of that version."""
_CHECKPOINTS = (".pt", ".pth", ".ckpt")
_MOST_STEPS = 100_000
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def backbone_of(folder: Path, read: Reader = read_json) -> BackboneFacts | None:
    """The backbone of a model's or a LoRA's folder; None if the folder says nothing, or names something else."""
    if (folder / LORA_INFO_FILE).is_file():
        info = read_if_whole(folder / LORA_INFO_FILE, read)
        # LoRA folders of version 0.1.0 do not say it: there was only one kind.
        class_name = info.get("pipeline_class", "FrameBridgeCogVideoXPipeline") if info else None
        networks = {info.get("network_name", "transformer")}
    else:
        index = read_if_whole(folder / "model_index.json", read)
        class_name, networks = pipeline_class(index), {part for part in index if is_present(part, index)}
    titled = [facts for facts in working_backbones() if facts.title in str(class_name)]
    return next((facts for facts in titled if facts.network in networks), titled[0] if titled else None)


def pipeline_class(index: Mapping[str, Any]) -> Any:
    """The name of the class in a `model_index.json`."""
    name = index.get("_class_name")
    return name[-1] if isinstance(name, list) and name else name


def is_present(part: str, index: Mapping[str, Any]) -> bool:
    """Whether a `model_index.json` says that a component is there."""
    entry = index.get(part)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def config_problem(config: Mapping[str, Any], part: str, facts: BackboneFacts) -> str | None:
    """What a component's configuration is instead, to be read after its place; a scheduler's may lack its class."""
    if part == "scheduler":
        return _scheduler_problem(config, facts)
    wanted, found = {**facts.parts, **facts.optional_parts}[part], config.get("_class_name")
    if wanted is not None and found != wanted:
        return f"holds a {found}, not a {wanted}"
    return facts.config_problem(part, config)


def _scheduler_problem(config: Mapping[str, Any], facts: BackboneFacts) -> str | None:
    """The bridge is aligned to one kind of process, which the backbone's own scheduler has."""
    if config.get("_class_name") == "FrameBridgeScheduler":
        if config.get("backbone") is None:
            return None
        config = config["backbone"]
    name, betas, steps = (config.get(key) for key in ("_class_name", "beta_schedule", "num_train_timesteps"))
    steps = 1000 if steps is None else steps
    prediction = config.get("prediction_type", facts.predictions[-1] if is_flow_matching(config) else "epsilon")
    process = "flow_matching" if is_flow_matching(config) else "variance_preserving"
    if name is None or (facts.schedulers and name not in facts.schedulers):
        found = "names no scheduler" if name is None else f"is for a {name}"
    elif process != facts.process:
        sign = "use_flow_sigmas" if config.get("use_flow_sigmas") else "by its class or prediction_type"
        found = f"is for flow matching ({sign})" if process == "flow_matching" else "is for a diffusion process"
    elif prediction not in facts.predictions:
        found = f"has prediction_type {prediction}"
    elif betas is not None and betas not in _BETA_SCHEDULES:
        found = f"has beta_schedule {betas}"
    elif type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        found = f"has {steps} times (num_train_timesteps)"
    else:
        return None
    known, predictions = " or ".join(facts.schedulers) or "flow-matching scheduler", " or ".join(facts.predictions)
    return (
        f"{found}; the bridge knows a {facts.title} by its {known} with prediction_type {predictions}: give the model "
        "as it was released"
    )


def file_problem(path: Path) -> str:
    """What is wrong with a file where a folder is wanted: of a checkpoint of the authors, how to convert it."""
    if path.suffix not in _CHECKPOINTS:
        return f"{path} is a file, not a folder"
    command = ("finetrainers", "convert", "--from", "reference", str(path), "--to", str(path.with_suffix("")))
    return f"{path} is a checkpoint file, not a folder: make a model folder of it and give that: {shlex.join(command)}"


def find_part(path: Path, part: str) -> Path:
    """A component's folder in its own, a model's, a run's or a checkpoint's; the given one if there is none."""
    if (path / "config.json").is_file():
        return path
    around = (path, find_saved_model(path) or path)
    return next((folder / part for folder in around if (folder / part).is_dir()), path)


def find_saved_model(folder: Path) -> Path | None:
    """The folder of the model or the LoRA to sample from: the given one, else the run's result, else its newest
    checkpoint's.
    """
    for candidate in (folder, folder / "model", folder / "lora"):
        if (candidate / "model_index.json").is_file() or (candidate / LORA_INFO_FILE).is_file():
            return candidate
    return next(map(find_saved_model, whole_checkpoints(folder / "checkpoints")), None)


def two_file_problem(folder: Path) -> str | None:
    """How to convert the LoRA folder of an earlier version, whose input projection lies in a file of its own."""
    if not (folder / EXTRA_WEIGHTS_FILE).is_file():
        return None
    source = os.path.abspath(folder)
    command = shlex.join(["finetrainers", "convert", "--from", TWO_FILE_LORA, source, "--to", f"{source}-converted"])
    return f"{folder} is a LoRA in the two files of an earlier version; make one of them first: {command}"


def place_problem(path: Path) -> str | None:
    """Why a path is not the folder of a model or of a component."""
    if not path.exists():
        return f"no such folder: {path}"
    if not path.is_dir():
        return file_problem(path)
    if not any(path.iterdir()):
        return f"{path} is empty"
    return two_file_problem(find_saved_model(path) or path)
