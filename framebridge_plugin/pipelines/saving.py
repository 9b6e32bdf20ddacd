"""Writing and opening what a training run leaves behind: diffusers folders, and LoRA files with what belongs to them.

A model folder is complete, so that the pipeline's `from_pretrained` opens it alone. The parts that training does not
change are hard links to the files that they came from where the file system allows it, copies elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, SchedulerMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.model_folders.checks import LORA_INFO_FILE
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.models.widening import load_bridge_transformer

COGVIDEOX_COMPONENTS = {
    "tokenizer": ("transformers", "T5Tokenizer"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLCogVideoX"),
}
"""What training of a CogVideoX leaves as it is: library and class of each component."""

EXTRA_WEIGHTS_FILE = "extra_weights.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"


def local_folder(
    name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None, patterns: list[str] | None = None
) -> Path:
    """The folder of a model: a path as it is, a hub id downloaded (or found in the cache).

    Args:
        name_or_path: A folder or a hub id.
        revision: Branch, tag or commit on the hub.
        cache_dir: Cache of the hub's files.
        patterns: Files wanted, as glob patterns; by default all.

    Returns:
        An existing folder.

    Raises:
        FrameBridgeError: If there is no such folder and the hub does not answer for the id.
    """
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
            )
        )
    except (OSError, HFValidationError, ValueError) as error:
        raise FrameBridgeError(
            f"model {name_or_path!r} is neither a folder nor to be had from the hub ({_first_line(error)}); "
            "check the name, or download it and give the folder"
        ) from error


def save_model_folder(
    directory: str | os.PathLike,
    *,
    pipeline_class: str,
    network_name: str,
    network_class: Any,
    network_config: Mapping[str, Any],
    network_state_dict: Mapping[str, torch.Tensor],
    scheduler: SchedulerMixin | None,
    linked_components: Mapping[str, tuple[str, str, Path]],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a complete diffusers folder, which the pipeline's `from_pretrained` opens.

    Args:
        directory: Where to write; made if needed.
        pipeline_class: Name of the pipeline, such as "FrameBridgeCogVideoXPipeline".
        network_name: The trained network's folder and name in the pipeline: "transformer" or "neural_prior".
        network_class: Its class, a diffusers model.
        network_config: Its config.
        network_state_dict: Its weights, whole tensors.
        scheduler: The scheduler that it was trained with; None for a network that has none.
        linked_components: The components that were not trained, by name: the library and the name of their class, as
            `model_index.json` gives them, and their folder.
        settings: Further arguments of the pipeline, for `model_index.json`.
    """
    folder = Path(directory)
    with torch.device("meta"):
        network = network_class.from_config(dict(network_config))
    network.load_state_dict(dict(network_state_dict), strict=True, assign=True)
    network.save_pretrained(folder / network_name)
    index = {"_class_name": pipeline_class, "_diffusers_version": diffusers.__version__}
    for name, (library, class_name, source) in linked_components.items():
        link_or_copy_tree(source, folder / name)
        index[name] = [library, class_name]
    index[network_name] = [_library_of(network_class), network_class.__name__]
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = [_library_of(type(scheduler)), type(scheduler).__name__]
    index |= settings or {}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_lora_folder(
    directory: str | os.PathLike,
    *,
    pipeline_class: str,
    network_name: str,
    lora_state_dict: Mapping[str, torch.Tensor],
    adapter_metadata: Mapping[str, Any],
    extra_state_dict: Mapping[str, torch.Tensor],
    scheduler: SchedulerMixin | None,
    base_model: str,
    replaced_components: Mapping[str, str] | None = None,
    clip_shape: tuple[int, int, int] | None = None,
) -> None:
    """Writes a LoRA file that diffusers loads, other trained weights beside it, the scheduler, and where it came from.

    Args:
        directory: Where to write; made if needed.
        pipeline_class: Name of the pipeline that the base model and the LoRA make together.
        network_name: The trained network's name in it, "transformer" or "neural_prior"; the names in the LoRA file
            begin with it.
        lora_state_dict: LoRA weights with the names that peft gives them.
        adapter_metadata: Rank, alpha and target modules; they go into the file's header.
        extra_state_dict: Trained weights that are no LoRA layers, such as a widened input projection, under the
            network's own names; may be empty.
        scheduler: The scheduler that it was trained with; None for a network that has none.
        base_model: Folder or hub id of the model that was fine-tuned.
        replaced_components: Folders or hub ids of the components that did not come from it, by name.
        clip_shape: (frames, height, width) that it was trained on.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    header = {f"{network_name}.{key}": value for key, value in adapter_metadata.items()}
    save_file(
        {f"{network_name}.{name}": tensor.contiguous() for name, tensor in lora_state_dict.items()},
        folder / LORA_FILE,
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(header, indent=2, sort_keys=True)},
    )
    if extra_state_dict:
        extra = {name: tensor.contiguous() for name, tensor in extra_state_dict.items()}
        save_file(extra, folder / EXTRA_WEIGHTS_FILE)
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    num_frames, height, width = clip_shape or (None, None, None)
    info = {
        "pipeline_class": pipeline_class,
        "network_name": network_name,
        "base_model": _absolute(base_model),
        "replaced_components": {name: _absolute(source) for name, source in (replaced_components or {}).items()},
        "num_frames": num_frames,
        "height": height,
        "width": width,
    }
    (folder / LORA_INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")


def load_lora_base(info: Mapping[str, Any], torch_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Loads what a LoRA was trained on and its base model lacks: the widened transformer, and replaced components.

    Args:
        info: Content of the `framebridge.json` that `save_lora_folder` wrote.
        torch_dtype: Precision of the weights; float32 by default.

    Returns:
        Components by name, for the `from_pretrained` of the pipeline.
    """
    sources = dict(info["replaced_components"])
    dtype = torch_dtype or torch.float32
    if "transformer" in sources:
        transformer = load_bridge_transformer(sources["transformer"], dtype=dtype)
    else:
        transformer = load_bridge_transformer(info["base_model"], subfolder="transformer", dtype=dtype)
    components = {"transformer": transformer}
    if "vae" in sources:
        components["vae"] = AutoencoderKLCogVideoX.from_pretrained(sources["vae"], dtype=dtype)
    if "text_encoder" in sources:
        components["text_encoder"] = T5EncoderModel.from_pretrained(sources["text_encoder"], dtype=dtype)
    if "tokenizer" in sources:
        components["tokenizer"] = T5Tokenizer.from_pretrained(sources["tokenizer"])
    return components


def load_latte_lora_base(info: Mapping[str, Any], torch_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Loads what a Latte LoRA was trained on in place of its base model's own components.

    Args:
        info: Content of the `framebridge.json` that `save_lora_folder` wrote.
        torch_dtype: Precision of the weights; float32 by default.

    Returns:
        Components by name, for the `from_pretrained` of the pipeline.
    """
    components = {}
    for name, source in info["replaced_components"].items():
        component_class: Any = AutoencoderKL if name == "vae" else LatteTransformer
        # A neural prior on the hub is a model's id, its folder is the network's.
        subfolder = "neural_prior" if name == "neural_prior" and not os.path.isdir(source) else None
        components[name] = component_class.from_pretrained(
            source, subfolder=subfolder, dtype=torch_dtype or torch.float32
        )
    return components


def load_extra_weights(network: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Puts the trained weights that lie beside a LoRA file into the network that it is for.

    Args:
        network: The network; changed in place.
        folder: The folder of the LoRA file.

    Returns:
        The weights that were replaced, by name.

    Raises:
        FrameBridgeError: If the file is missing, damaged or of another model.
    """
    file = folder / EXTRA_WEIGHTS_FILE
    try:
        extra = load_file(file)
        state = network.state_dict()
        replaced = {name: state[name].detach().clone() for name in extra}
        network.load_state_dict(extra, strict=False)
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise FrameBridgeError(
            f"{file}: cannot load the weights trained beside the LoRA layers ({_first_line(error)}); "
            "take the folder as it was written, with the base model that it names"
        ) from error
    return replaced


def link_or_copy_tree(source: Path, destination: Path) -> None:
    """Makes `destination` equal to the folder `source` by hard links, or by copies where links are not possible.

    Args:
        source: An existing folder; links in it are followed.
        destination: Made if needed; files of the same name are replaced.
    """
    for folder, _, files in os.walk(source, followlinks=True):
        target = destination / Path(folder).relative_to(source)
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            origin, copy = os.path.realpath(os.path.join(folder, file)), target / file
            if copy.exists() and os.path.samefile(origin, copy):
                continue
            copy.unlink(missing_ok=True)
            try:
                os.link(origin, copy)
            except OSError:
                shutil.copyfile(origin, copy)


def _absolute(source: str) -> str:
    """A folder's whole path, since a relative one would mean another folder elsewhere; a hub id as it is."""
    return str(Path(source).resolve()) if os.path.isdir(source) else source


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _library_of(component_class: type) -> str:
    """The name under which diffusers imports a component's class."""
    module = component_class.__module__
    return "diffusers" if module.startswith("diffusers.") else module
