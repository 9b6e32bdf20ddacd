"""Writing and opening what a training run leaves behind: diffusers folders, LoRA files and the projection beside them.

A model folder is complete (tokenizer, text encoder, autoencoder, transformer, scheduler), so that
`FrameBridgeCogVideoXPipeline.from_pretrained` opens it alone. The parts that training does not change are hard links
to the base model's files where the file system allows it, copies elsewhere.
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
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel, SchedulerMixin
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.folder_checks import LORA_INFO_FILE
from framebridge_plugin.models.widening import load_bridge_transformer

UNCHANGED_COMPONENTS = ("tokenizer", "text_encoder", "vae")
PROJECTION_FILE = "patch_embed_proj.safetensors"
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
    transformer_config: Mapping[str, Any],
    transformer_state_dict: Mapping[str, torch.Tensor],
    scheduler: SchedulerMixin,
    component_folders: Mapping[str, Path],
    clip_shape: tuple[int, int, int] | None = None,
) -> None:
    """Writes a complete diffusers folder for `FrameBridgeCogVideoXPipeline.from_pretrained`.

    Args:
        directory: Where to write; made if needed.
        transformer_config: The widened transformer's config.
        transformer_state_dict: Its weights, whole tensors.
        scheduler: The scheduler that it was trained with.
        component_folders: Folders of tokenizer, text encoder and autoencoder.
        clip_shape: (frames, height, width) that it was trained on, the defaults of a call.
    """
    folder = Path(directory)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(dict(transformer_config))
    transformer.load_state_dict(dict(transformer_state_dict), strict=True, assign=True)
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    for name, source in component_folders.items():
        link_or_copy_tree(source, folder / name)

    num_frames, height, width = clip_shape or (None, None, None)
    index = {
        "_class_name": "FrameBridgeCogVideoXPipeline",
        "_diffusers_version": diffusers.__version__,
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "scheduler": [_library_of(scheduler), type(scheduler).__name__],
        "num_frames": num_frames,
        "height": height,
        "width": width,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_lora_folder(
    directory: str | os.PathLike,
    *,
    lora_state_dict: Mapping[str, torch.Tensor],
    adapter_metadata: Mapping[str, Any],
    projection_state_dict: Mapping[str, torch.Tensor],
    scheduler: SchedulerMixin,
    base_model: str,
    replaced_components: Mapping[str, str] | None = None,
    clip_shape: tuple[int, int, int] | None = None,
) -> None:
    """Writes a LoRA file that diffusers loads, the trained input projection beside it, and the scheduler.

    Args:
        directory: Where to write; made if needed.
        lora_state_dict: LoRA weights with the names that peft gives them.
        adapter_metadata: Rank, alpha and target modules; they go into the file's header.
        projection_state_dict: `weight` and, if there is one, `bias` of `patch_embed.proj`.
        scheduler: The scheduler that it was trained with.
        base_model: Folder or hub id of the model that was fine-tuned.
        replaced_components: Folders or hub ids of the components that did not come from it, by name.
        clip_shape: (frames, height, width) that it was trained on.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    CogVideoXPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=dict(lora_state_dict),
        transformer_lora_adapter_metadata=dict(adapter_metadata),
        weight_name=LORA_FILE,
    )
    save_file({k: v.contiguous() for k, v in projection_state_dict.items()}, folder / PROJECTION_FILE)
    scheduler.save_pretrained(folder / "scheduler")
    num_frames, height, width = clip_shape or (None, None, None)
    info = {
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


def load_projection(transformer: CogVideoXTransformer3DModel, folder: Path) -> dict[str, torch.Tensor]:
    """Puts the trained input projection that lies beside a LoRA file into a widened transformer.

    Args:
        transformer: The widened transformer; changed in place.
        folder: The folder of the LoRA file.

    Returns:
        The weights that were replaced.

    Raises:
        FrameBridgeError: If the file is missing, damaged or of another model.
    """
    file = folder / PROJECTION_FILE
    projection = transformer.patch_embed.proj
    replaced = {name: tensor.detach().clone() for name, tensor in projection.state_dict().items()}
    try:
        projection.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FrameBridgeError(
            f"{file}: cannot load the trained input projection ({_first_line(error)}); "
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


def _library_of(component: object) -> str:
    """The name under which diffusers imports a component's class."""
    module = type(component).__module__
    return "diffusers" if module.startswith("diffusers.") else module
