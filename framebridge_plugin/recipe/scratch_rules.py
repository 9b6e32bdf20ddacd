"""Rules for a network from scratch: the data that it is built for, and what it needs in place of a trained model."""

from __future__ import annotations

from collections.abc import Iterator

from framebridge_plugin.backbones.facts import Config
from framebridge_plugin.data.ucf101_classes import ucf101_class_names
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.schema import Recipe
from framebridge_plugin.settings.data import DatasetEntry, dataset_entries

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
    if not roots or None in roots:
        return None
    try:
        return sorted({name for root in roots for name in ucf101_class_names(str(root))})
    except FrameBridgeError:
        return None  # reported with the data


def data_clip_shape(recipe: Recipe) -> tuple[int, int, int] | None:
    """Frames, height and width of the clips, which a network from scratch is built for; None if they are not to be
    seen.
    """
    entries = _entries(recipe)
    return (entries[0].num_frames, entries[0].height, entries[0].width) if entries else None


def _class_roots(recipe: Recipe) -> list[str | None]:
    """The folder of the class folders of every data set, None for one that is named in another way."""
    return [entry.class_root for entry in _entries(recipe)]


def _entries(recipe: Recipe) -> list[DatasetEntry]:
    try:
        return dataset_entries(recipe.dataset_config(), "the recipe's data")
    except (ValueError, UsageError):
        return []  # reported with the data
