"""What a run does outside its own folder: what it sends, reads from the network, and writes elsewhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framebridge_plugin.data.validation_rows import read_validation_rows
from framebridge_plugin.errors import FrameBridgeError, escaped
from framebridge_plugin.files import is_web_address, local_path
from framebridge_plugin.recipe.schema import Recipe

SENT, FETCHED, WRITTEN = "sends", "reads from the network", "writes outside output_dir"


def outside_effects(recipe: Recipe, *kinds: str) -> Iterator[str]:
    """Lines such as `sends: hub.push_to_hub: ...`.

    Args:
        recipe: A checked recipe, whether or not its files are there.
        *kinds: `SENT`, `FETCHED`, `WRITTEN`; all of them if none is given.

    Yields:
        A line for each thing that the run would do.
    """
    found = {SENT: _sent, FETCHED: _fetched, WRITTEN: _written}
    for kind in kinds or found:
        for line in found[kind](recipe):
            yield escaped(f"{kind}: {line}")


def _sent(recipe: Recipe) -> Iterator[str]:
    if recipe.hub.push_to_hub:
        hub, folder = recipe.hub, recipe.result_folder
        if recipe.training.training_type == "lora":
            folder = folder.with_name("lora-to-share")  # which names no place of this machine
        owner = "" if "/" in recipe.hub_repository else ", of the login's account"
        seen_by = "private" if hub.private else "PUBLIC"
        yield f"hub.push_to_hub: at the end {folder} to the {seen_by} repository {recipe.hub_repository}{owner}"
    if recipe.tracking.report_to == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        what = "the recipe, the metrics, validation videos and facts about this machine"
        yield f"tracking.report_to: {what} to Weights & Biases, project {recipe.tracking.tracker_name}"


def _fetched(recipe: Recipe) -> Iterator[str]:
    for where, name in _hub_ids(recipe):
        revision = (
            f", revision {recipe.model.revision}" if recipe.model.revision and where.startswith("model.") else ""
        )
        yield f"{where}: {name}{revision}, from the hub, unless its cache has it"
    for number, row in enumerate(_validation_rows(recipe), start=1):
        for name in ("image_path", "video_path"):
            if is_web_address(str(row.get(name))):
                yield f"validation.validation_dataset_file: row {number}: {row[name]}"


def _written(recipe: Recipe) -> Iterator[str]:
    output_dir = Path(recipe.checkpoints.output_dir).absolute()
    bad_files = _dataset_config(recipe).get("bad_files")
    places = {
        "the quarantine of bad files": bad_files.get("quarantine_file") if isinstance(bad_files, dict) else None,
        "dataset.precomputation_dir": recipe.dataset.precomputation_dir,
    }
    for what, place in places.items():
        if place is not None and not Path(place).absolute().is_relative_to(output_dir):
            yield f"{what}: {place}"
    if any(_hub_ids(recipe)):
        cache = recipe.model.cache_dir or os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME")
        yield f"downloads: {cache or '~/.cache/huggingface'}"
    if any(entry.get("csv") for entry in _datasets(recipe)):
        cache = os.environ.get("HF_DATASETS_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        yield f"the index of the csv: {cache}"
    if recipe.compile.compile_modules:
        yield f"compiled code: {os.environ.get('TORCHINDUCTOR_CACHE_DIR') or tempfile.gettempdir()}"


def _hub_ids(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model, ours = recipe.model.model_dump(), recipe.framebridge.model_dump()
    parts = ("pretrained_model_name_or_path", "tokenizer_id", "text_encoder_id", "transformer_id", "vae_id")
    named = [(f"model.{name}", model[name]) for name in parts]
    named += [(f"framebridge.{name}", ours[name]) for name in ("start_from", "neural_prior")]
    data = "dataset.dataset_config" if recipe.framebridge.data is None else "framebridge.data.data_root"
    named += [(data, entry.get("data_root")) for entry in _datasets(recipe)]
    if recipe.validation.heldout is not None:
        named.append(("validation.heldout.data_root", recipe.validation.heldout.data_root))
    for where, name in named:
        if isinstance(name, str) and local_path(name) is None:
            yield where, name


def _datasets(recipe: Recipe) -> list[dict[str, Any]]:
    entries = _dataset_config(recipe).get("datasets")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _dataset_config(recipe: Recipe) -> dict[str, Any]:
    try:
        return recipe.dataset_config()
    except ValueError:
        return {}  # reported with the data


def _validation_rows(recipe: Recipe) -> list[dict[str, Any]]:
    file = recipe.validation.validation_dataset_file
    try:
        return [] if file is None else [*map(dict, read_validation_rows(Path(file)))]
    except (FrameBridgeError, OSError):
        return []  # reported with the file
