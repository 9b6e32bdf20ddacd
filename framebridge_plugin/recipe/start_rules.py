"""Rules for `framebridge.start_from`: the earlier run is there, of the same kind, and on the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from framebridge_plugin.backbones.lora_folders import lora_problem, lora_settings
from framebridge_plugin.backbones.starting import find_start
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import local_path
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.schema import Recipe

_WHERE = "framebridge.start_from"


def start_problems(recipe: Recipe, folders: Mapping[str, Path | None]) -> Iterator[Problem]:
    """Check what a run begins with against what it trains. What has an id on the hub is not looked at here."""
    name = recipe.framebridge.start_from
    path = None if name is None else local_path(name)
    if path is None:
        return
    start = find_start(name)
    if start is None:
        if not recipe.goes_on_without_start:
            message = f"{path} holds no saved model or LoRA: give the folder of a run that has saved one"
            yield Problem(_WHERE, message, on_disk=True)
        return
    if problem := start.kind_problem(recipe.model.model_name, recipe.training.training_type):
        yield Problem(_WHERE, problem)
        return
    if start.is_lora:
        if problem := lora_problem(start.folder, recipe.backbone) or _settings_problem(recipe, start.folder):
            yield Problem(_WHERE, problem)
            return
    elif recipe.model.transformer_id is not None:
        yield Problem(_WHERE, "excludes model.transformer_id, which replaces the same weights: remove one of them")
        return
    try:
        present = {part: folder for part, folder in folders.items() if folder is not None and folder.is_dir()}
        if problem := start.parts_problem(present):
            yield Problem(_WHERE, problem)
    except FrameBridgeError as error:
        yield Problem(_WHERE, str(error), on_disk=True)


def _settings_problem(recipe: Recipe, lora: Path) -> str | None:
    for name, value in lora_settings(lora, recipe.backbone).items():
        given = getattr(recipe.lora, name)
        if (sorted(given) if isinstance(given, list) else given) != value:
            text = json.dumps(value)
            return f"{lora} has the {name} {text}, this run {json.dumps(given)}: set lora.{name}={text}"
    return None
