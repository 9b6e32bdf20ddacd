"""Opening a model wherever a run or a user left it: what `from_pretrained` and `finetrainers sample` share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.folders import (
    LORA_INFO_FILE,
    backbone_of,
    config_problem,
    find_saved_model,
    local_path,
    read_json,
)
from framebridge_plugin.backbones.lora_folders import (
    HOW_TO_SAY_BASE,
    LoraInfo,
    lora_problem,
    other_base_error,
    read_lora_info,
)
from framebridge_plugin.backbones.sampling_loop import check_scheduler
from framebridge_plugin.backbones.saving import local_folder
from framebridge_plugin.errors import FrameBridgeError, first_line
from framebridge_plugin.models.whole_weights import whole_weights
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.schedulers.backbone import build_backbone

_HUB_SETTINGS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


class SavedModel(NamedTuple):
    """Where the parts of a model are on this machine.

    Attributes:
        base: The folder of a whole model; None for a LoRA all of whose components came from elsewhere.
        components: Folders of the components that are to be taken in place of the base's.
        lora: The folder of a LoRA to load into them, if it is one.
        info: What the LoRA's folder says.
    """

    base: Path | None
    components: Mapping[str, Path] = {}
    lora: Path | None = None
    info: LoraInfo | None = None


def find_model(
    name_or_path: str | os.PathLike,
    kinds: Container[BackboneFacts | None],
    settings: dict[str, Any],
    *,
    base_model: str | os.PathLike | None = None,
    allow_other_base: bool = False,
) -> SavedModel:
    """Finds what is to be opened.

    Args:
        name_or_path: A run's folder, one of its checkpoints, a model's or a LoRA's folder, or a hub id of one.
        kinds: Which kinds of model it may be.
        settings: Arguments of a `from_pretrained`. Those for the hub are taken out of them; a component that is given
            there is not looked for.
        base_model: Where the model that a LoRA was trained on is now: as `name_or_path`, but no LoRA.
        allow_other_base: Whether that may be another model than the one that it was trained on.

    Returns:
        The folders.

    Raises:
        FrameBridgeError: If something is missing, of another kind, or a LoRA's base model is another one.
    """
    hub = {name: settings.pop(name) for name in _HUB_SETTINGS if name in settings}
    found = _saved_model(local_folder(os.fspath(name_or_path), **hub))
    info = read_lora_info(found) if (found / LORA_INFO_FILE).is_file() else None
    if backbone_of(found) not in kinds:
        name = read_json(found / "model_index.json").get("_class_name") if info is None else info.pipeline_class
        raise FrameBridgeError(f"{found} is for a {name}, not for this pipeline")
    if info is None:
        if base_model is not None or allow_other_base:
            raise FrameBridgeError(f"{found} is a whole model, not a LoRA: it has no base model; leave that out")
        saved = SavedModel(found)
    elif (problem := lora_problem(found)) is not None:
        raise FrameBridgeError(problem)
    else:
        hub.pop("revision", None)  # that of the LoRA
        saved = _find_base(found, info, settings, hub, base_model, allow_other_base)
    _check_configs(saved, settings)
    return saved


def _check_configs(saved: SavedModel, given: Mapping[str, Any]) -> None:
    """Refuses a network or a scheduler of another kind before anything is loaded."""
    own = next((folder / "scheduler" for folder in (saved.lora, saved.base) if folder is not None), Path())
    if "scheduler" in given and "transformer" not in given and (own / "scheduler_config.json").is_file():
        name = read_json(own / "scheduler_config.json").get("_class_name")
        facts = backbone_of(own.parent)
        assert facts is not None
        check_scheduler(given["scheduler"], facts, was_bridge=name == FrameBridgeScheduler.__name__)
    kind = None if saved.base is None else backbone_of(saved.base)
    if saved.base is None or kind is None:
        return
    for part, name in (("transformer", "config.json"), ("scheduler", "scheduler_config.json")):
        file = saved.base / part / name
        is_used = part in kind.parts and part not in given and part not in saved.components
        if is_used and file.is_file() and (problem := config_problem(read_json(file), part, kind)):
            raise FrameBridgeError(f"{saved.base / part} {problem}")


def _saved_model(folder: Path) -> Path:
    found = find_saved_model(folder)
    if found is None:
        raise FrameBridgeError(
            f"{folder} is no model: it has no model_index.json, and no model/, lora/ or checkpoints/ of a run; give a "
            "run's folder or a model in diffusers format"
        )
    if found.parent.parent.name == "checkpoints" and folder not in (found, found.parent):
        say(f"the run has not ended: its newest checkpoint {found.parent} is used")
    return found


def _find_base(
    lora: Path,
    info: LoraInfo,
    given: Container[str],
    hub: Mapping[str, Any],
    base_model: str | os.PathLike | None,
    allow_other_base: bool,
) -> SavedModel:
    base = None
    if base_model is not None:
        base = _saved_model(local_folder(os.fspath(base_model), **hub))
        if (base / LORA_INFO_FILE).is_file():
            raise FrameBridgeError(f"{base} is a LoRA itself; give the model that {lora} was trained on")
    elif info.base_model:
        remedy = f"say where it is now ({HOW_TO_SAY_BASE})"
        base = _part(lora, "base model", info.base_model, info.revision, remedy, hub)
    components = {}
    for name, source in info.replaced_components.items():
        if name not in given:
            remedy = f"put it back, or correct its place in {LORA_INFO_FILE}"
            folder = _part(lora, name, source, info.replaced_revisions.get(name), remedy, hub)
            # A neural prior on the hub is a model's id, its folder is the network's.
            components[name] = folder / name if (folder / name).is_dir() else folder
    compared = dict(components)
    for name in info.fingerprint:
        if base is not None and name not in info.replaced_components and name not in given:
            compared[name] = base / name
    if not info.fingerprint:
        say(f"{lora} does not say how to know the model that it was trained on: {base} is taken for it")
    elif not allow_other_base and (difference := info.other_base_problem(compared)) is not None:
        raise FrameBridgeError(other_base_error(lora, str(base), difference))
    return SavedModel(base, components, lora, info)


def _part(lora: Path, name: str, source: str, revision: str | None, remedy: str, hub: Mapping[str, Any]) -> Path:
    """The folder of something that a LoRA was trained on."""
    path = local_path(source)
    if path is not None and not path.is_dir():
        raise FrameBridgeError(f"the {name} of the LoRA {lora} is gone from {path}; {remedy}")
    return local_folder(source, **hub) if revision is None else local_folder(source, revision=revision, **hub)


@contextlib.contextmanager
def opening(source: str | os.PathLike) -> Iterator[None]:
    """Turns what diffusers, transformers and safetensors raise, or only warn of, for a damaged model into one line.

    Args:
        source: What is being opened.

    Yields:
        Nothing.

    Raises:
        FrameBridgeError: In place of their errors, and for weights that lack a tensor.
    """
    try:
        with whole_weights():
            yield
    except FrameBridgeError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise FrameBridgeError(
            f"cannot open model {str(source)!r}: {first_line(error)}; give a run's folder, or a complete model in "
            "diffusers format"
        ) from error


def load_components(
    saved: SavedModel, loaders: Mapping[str, Callable[..., Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads the components that are to be taken in place of the base model's.

    Args:
        saved: What `find_model` found.
        loaders: For each component its class, or what loads its folder.
        settings: Arguments of a `from_pretrained`, of which each loader gets its precision.

    Returns:
        The components by name, and a LoRA's scheduler.
    """
    dtypes = settings.get("dtype") or settings.get("torch_dtype")
    components = {}
    for name, folder in saved.components.items():
        dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
        precision = {} if name == "tokenizer" else {"dtype": dtype or torch.float32}
        load = getattr(loaders[name], "from_pretrained", loaders[name])
        components[name] = load(folder, **precision)
    info = saved.info
    if saved.lora is not None and info is not None and info.network_name == "transformer":
        components["scheduler"] = settings.get("scheduler") or load_scheduler(saved.lora / "scheduler")
    return components


def load_scheduler(folder: Path) -> Any:
    """The scheduler of a saved model: a bridge, or a diffusion baseline's, which its pipeline examines."""
    config = read_json(folder / "scheduler_config.json")
    if config.get("_class_name") == FrameBridgeScheduler.__name__:
        return FrameBridgeScheduler.from_pretrained(folder)
    return build_backbone(config)


def say(text: str) -> None:
    """Says to the user what was chosen for them."""
    print(text, file=sys.stderr)
