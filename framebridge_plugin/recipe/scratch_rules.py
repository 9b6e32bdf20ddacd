"""Rules for a network from scratch: the data that it is built for, and what it needs in place of a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.facts import Config
from framebridge_plugin.backbones.folders import read_json
from framebridge_plugin.data.ucf101_classes import ucf101_class_names
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.schema import Recipe

_PRETRAINED = "model.pretrained_model_name_or_path"


def scratch_problems(recipe: Recipe) -> Iterator[Problem]:
    """Checks what a recipe says where there is no whole trained model."""
    model = recipe.model
    if model.pretrained_model_name_or_path is None:
        if model.vae_id is None:
            message = f"is required without {_PRETRAINED}: an AutoencoderKL, such as stabilityai/sd-vae-ft-ema"
            yield Problem("model.vae_id", message)
        if recipe.training.training_type == "lora":
            message = f"lora needs a trained model to adapt: give {_PRETRAINED}, or set full-finetune"
            yield Problem("training.training_type", message)
    if recipe.is_from_scratch and any(root is None for root in _class_roots(recipe)):
        where = "dataset.dataset_config" if recipe.framebridge.data is None else "framebridge.data"
        yield Problem(where, "a network from scratch takes its classes from folders: give class_root")


def size_problems(recipe: Recipe, network: Config) -> Iterator[Problem]:
    """Checks the size that a recipe names beside a trained network, whose config may not be to be seen."""
    size, where = recipe.framebridge.latte_size, "framebridge.latte_size"
    if recipe.is_from_scratch or size is None or recipe.backbone.scratch_config is None:
        return
    if recipe.framebridge.start_from is None:
        yield Problem(where, "has no effect: the trained network has its size; remove it")
    wanted = recipe.backbone.scratch_config(size, {}, None, None, frozenset())
    is_other = bool(network) and any(network.get(name) != value for name, value in wanted.items())
    if recipe.framebridge.start_from is not None and is_other:
        remedy = "remove it, or start from one of that size"
        yield Problem(where, f"the trained network has another size than {size}: {remedy}")


def data_class_names(recipe: Recipe) -> list[str] | None:
    """The classes of the data, in the order of their labels, which a network from scratch is built for; None if the
    data is not in class folders, or not to be seen.
    """
    roots = _class_roots(recipe)
    if not roots or not all(isinstance(root, str) for root in roots):
        return None
    try:
        return sorted({name for root in roots for name in ucf101_class_names(root)})
    except FrameBridgeError:
        return None  # reported with the data


def data_clip_shape(recipe: Recipe) -> tuple[int, int, int] | None:
    """Frames, height and width of the clips, which a network from scratch is built for; None if they are not to be
    seen.
    """
    data = recipe.framebridge.data
    if data is not None:
        return data.num_frames, data.height, data.width
    try:
        entry = _dataset_entries(str(recipe.dataset.dataset_config))[0]
        num_frames, height, width = entry["video_resolution_buckets"][0]
        return int(num_frames), int(height), int(width)
    except (LookupError, TypeError, ValueError):
        return None  # reported with the data


def _class_roots(recipe: Recipe) -> list[Any]:
    """The folder of the class folders of every data set, None for one that is named in another way."""
    if recipe.framebridge.data is not None:
        return [recipe.framebridge.data.class_root]
    return [entry.get("class_root") for entry in _dataset_entries(str(recipe.dataset.dataset_config))]


def _dataset_entries(path: str) -> list[dict[str, Any]]:
    try:
        entries = read_json(Path(path)).get("datasets")
    except ValueError:
        return []  # reported with the data
    return entries if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) else []
