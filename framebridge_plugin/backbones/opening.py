"""Opening a model wherever a run or a user left it: what `from_pretrained` and `finetrainers sample` share."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from framebridge_plugin.backbones.examination import SavedModel, examine
from framebridge_plugin.backbones.facts import BackboneFacts, working_backbones
from framebridge_plugin.backbones.files import read_json
from framebridge_plugin.backbones.folders import LORA_FILE, find_saved_model
from framebridge_plugin.backbones.hub import local_folder
from framebridge_plugin.backbones.lora_folders import adapter_settings
from framebridge_plugin.backbones.sampling_loop import check_scheduler
from framebridge_plugin.errors import FrameBridgeError, say
from framebridge_plugin.files import local_path
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.schedulers.backbone import build_backbone

HUB_SETTINGS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def find_model(
    name_or_path: str | os.PathLike,
    kinds: Container[BackboneFacts] | None,
    settings: dict[str, Any],
    *,
    base_model: str | os.PathLike | None = None,
    allow_other_base: bool = False,
) -> SavedModel:
    """Finds and examines what a `from_pretrained` is to open (a run, a checkpoint, a model, a LoRA or a hub id, or
    what is known of it already), and refuses what is wrong with it.

    The settings for the hub are taken out of `settings`; a component that is given there is not looked for.
    """
    hub = {name: settings.pop(name) for name in HUB_SETTINGS if name in settings}
    names = set().union(*({*facts.parts, *facts.optional_parts} for facts in working_backbones()))
    given: dict[str, Path | None] = dict.fromkeys(name for name in settings if name in names)
    if isinstance(name_or_path, SavedModel):
        saved = dataclasses.replace(name_or_path, components={**name_or_path.components, **given})
        problems: list[str | None] = []
    else:
        folder = find_folder(name_or_path, **hub)
        base = None if base_model is None else os.fspath(base_model)
        saved = examine(folder, locate=functools.partial(_locate, hub), base=base, components=given)
        if saved.info is None and (base is not None or allow_other_base):
            raise FrameBridgeError(f"{folder} is a whole model, not a LoRA: it has no base model; leave that out")
        findings = sorted(saved.findings(), key=lambda finding: not finding.is_other)
        problems = [finding.message for finding in findings]
        if not problems and not allow_other_base:
            problems = [saved.other_base_problem()]
    if kinds is not None and saved.facts not in kinds:
        raise FrameBridgeError(f"{os.fspath(saved)} is for a {saved.facts.title}, not for this pipeline")
    if problem := next(filter(None, problems), None):
        raise FrameBridgeError(problem)
    if saved.info is not None and not saved.info.fingerprint and not isinstance(name_or_path, SavedModel):
        say(f"{saved.lora} does not say how to know the model that it was trained on: {saved.base} is taken for it")
    _check_scheduler(saved, settings)
    return saved


def _locate(hub: Mapping[str, Any], source: str, revision: str | None) -> Path | None:
    if (path := local_path(source)) is not None:
        return path
    hub = {name: value for name, value in hub.items() if name != "revision"}  # that of the LoRA
    return local_folder(source, **hub) if revision is None else local_folder(source, revision=revision, **hub)


def _check_scheduler(saved: SavedModel, given: Mapping[str, Any]) -> None:
    """Refuses a scheduler of another kind than that of the model whose network it is to go with."""
    own = Path(saved.lora or saved.base or "") / "scheduler" / "scheduler_config.json"
    if "scheduler" in given and "transformer" not in given and own.is_file():
        name = saved.read(own).get("_class_name")
        check_scheduler(given["scheduler"], saved.facts, was_bridge=name == FrameBridgeScheduler.__name__)


def find_folder(name_or_path: str | os.PathLike, **hub_settings: Any) -> Path:
    """The folder of the model or the LoRA that a folder holds, or that a hub id stands for."""
    folder = local_folder(os.fspath(name_or_path), **hub_settings)
    found = find_saved_model(folder)
    if found is None:
        raise FrameBridgeError(
            f"{folder} is no model: it has no model_index.json, and no model/, lora/ or checkpoints/ of a run; give a "
            "run's folder or a model in diffusers format"
        )
    if found.parent.parent.name == "checkpoints" and folder not in (found, found.parent):
        say(f"the run has not ended: its newest checkpoint {found.parent} is used")
    return found


def load_components(
    saved: SavedModel, loaders: Mapping[str, Callable[..., Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads the components that are taken in place of the base model's, each in the precision that the settings of a
    `from_pretrained` ask for, and a LoRA's scheduler.
    """
    dtypes = settings.get("dtype") or settings.get("torch_dtype")
    components = {}
    for name, folder in saved.components.items():
        if folder is None:
            if name not in settings:
                raise FrameBridgeError(f"{os.fspath(saved)}: its {name} is not on this machine; give its folder or id")
            continue
        dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
        precision = {} if name == "tokenizer" else {"dtype": dtype or torch.float32, "use_safetensors": True}
        load = getattr(loaders[name], "from_pretrained", loaders[name])
        components[name] = load(folder, **precision)
    if saved.lora is not None and "scheduler" in saved.facts.parts:
        components["scheduler"] = settings.get("scheduler") or load_scheduler(saved.lora / "scheduler")
    return components


def load_lora(pipeline: Any, folder: Path, network: str) -> None:
    """Loads the layers of a LoRA folder into the network that they were trained on."""
    settings = {f"{network}.{name}": value for name, value in adapter_settings(folder, network).items()}
    layers = load_file(folder / LORA_FILE)
    getattr(pipeline, network).load_lora_adapter(
        layers, prefix=network, metadata=settings, low_cpu_mem_usage=True, _pipeline=pipeline
    )


def load_scheduler(folder: Path) -> Any:
    """The scheduler of a saved model: a bridge, or a diffusion baseline's, which its pipeline examines."""
    config = read_json(folder / "scheduler_config.json")
    if config.get("_class_name") == FrameBridgeScheduler.__name__:
        return FrameBridgeScheduler.from_pretrained(folder)
    return build_backbone(config)
