"""Writing and opening what a training run leaves behind: diffusers folders, and LoRA files with what belongs to them.

A model folder is complete, so that the pipeline's `from_pretrained` opens it alone, and shares no file with the model
that it came from. Models and LoRAs carry a manifest of their files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards

from framebridge_plugin.backbones.copying import copy_tree, link_run_copy
from framebridge_plugin.backbones.fingerprint import component_fingerprint
from framebridge_plugin.backbones.folders import LORA_FILE
from framebridge_plugin.backbones.lora_folders import TARGETS_KEY, LoraInfo
from framebridge_plugin.backbones.manifest import FileFacts, write_manifest
from framebridge_plugin.backbones.tensor_files import write_tensors
from framebridge_plugin.files import hub_snapshot


def save_model_folder(
    directory: str | os.PathLike,
    *,
    pipeline_class: str,
    network_name: str,
    network_class: Any,
    network_config: Mapping[str, Any],
    network_state_dict: Mapping[str, torch.Tensor],
    scheduler: SchedulerMixin | None,
    components: Mapping[str, tuple[str, str, Path]],
    are_run_copies: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a complete diffusers folder, which the pipeline's `from_pretrained` opens.

    The `components`, by name their library, class and folder, are copied, or linked if they are each a `run_copy`.
    """
    folder = Path(directory)
    # Where the network was loaded from says where somebody keeps their models.
    config = {name: value for name, value in network_config.items() if name != "_name_or_path"}
    with torch.device("meta"):
        network = network_class.from_config(config)
    network.load_state_dict(dict(network_state_dict), strict=True, assign=True)
    known = _save_network(network, folder / network_name)
    index = {"_class_name": pipeline_class, "_diffusers_version": diffusers.__version__}
    for name, (library, class_name, source) in components.items():
        files = (link_run_copy if are_run_copies else copy_tree)(source, folder / name)
        known |= {f"{name}/{file}": facts for file, facts in files.items()}
        index[name] = [library, class_name]
    index[network_name] = [_library_of(network_class), network_class.__name__]
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = [_library_of(type(scheduler)), type(scheduler).__name__]
    index |= settings or {}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_manifest(folder, known)


def _save_network(network: Any, folder: Path) -> dict[str, FileFacts]:
    """What diffusers' `save_pretrained` writes of a network; returns what a manifest says of the files of weights."""
    network.save_config(folder)
    tensors = network.state_dict()
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(tensors, max_shard_size="10GB", filename_pattern=pattern)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {
        f"{folder.name}/{file}": write_tensors(
            folder / file, {name: tensors[name] for name in names}, {"format": "pt"}
        )
        for file, names in split.filename_to_tensors.items()
    }


def save_lora_folder(
    directory: str | os.PathLike,
    *,
    info: LoraInfo,
    lora_state_dict: Mapping[str, torch.Tensor],
    adapter_metadata: Mapping[str, Any],
    scheduler: SchedulerMixin | None,
) -> None:
    """Writes a LoRA file that diffusers loads, the scheduler, and where the LoRA came from."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_lora_file(folder / LORA_FILE, info.network_name, lora_state_dict, adapter_metadata)
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    info.write(folder)
    write_manifest(folder)


def save_lora_file(
    file: Path, network_name: str, state_dict: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> None:
    """Writes LoRA layers as diffusers does, with the settings of their `LoraConfig` in the header."""
    # Names, whatever the recipe says: a reader should have no pattern to match.
    layers = sorted({name.rpartition(".lora_")[0] for name in state_dict})
    prefixed = {f"{network_name}.{key}": value for key, value in {**settings, "target_modules": layers}.items()}
    header = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True),
        TARGETS_KEY: json.dumps(settings["target_modules"]),
    }
    if settings["lora_alpha"] != settings["r"]:
        exceptions = "".join(f", except {name}: by 1" for name in settings.get("rank_pattern", {}))
        header["scale"] = (
            f"multiply B A by lora_alpha / r = {settings['lora_alpha']} / {settings['r']}{exceptions}; a reader that "
            f"ignores {LORA_ADAPTER_METADATA_KEY} loads another network"
        )
    tensors = {f"{network_name}.{name}": tensor.contiguous() for name, tensor in state_dict.items()}
    # Not safetensors' own writer, which puts the header in another order each time.
    write_tensors(file, tensors, header)


def describe_base(base_model: str, components: Mapping[str, tuple[str, Path]]) -> dict[str, Any]:
    """What a LoRA remembers of the model that it is trained on."""
    downloaded = {name: folder for name, (source, folder) in components.items() if not os.path.isdir(source)}
    commits = {name: found.name for name, folder in downloaded.items() if (found := hub_snapshot(folder.absolute()))}
    replaced = {name: source for name, (source, _) in components.items() if source != base_model}
    return {
        "base_model": _absolute(base_model),
        "revision": next((commit for name, commit in commits.items() if name not in replaced), None),
        "replaced_components": {name: _absolute(source) for name, source in replaced.items()},
        "replaced_revisions": {name: commits[name] for name in replaced if name in commits},
        "fingerprint": {name: component_fingerprint(folder) for name, (_, folder) in components.items()},
    }


def _absolute(source: str) -> str:
    """A folder's whole path, since a relative one would mean another folder elsewhere; a hub id as it is."""
    return str(Path(source).resolve()) if os.path.isdir(source) else source


def _library_of(component_class: type) -> str:
    """The name under which diffusers imports a component's class."""
    module = component_class.__module__
    return "diffusers" if module.startswith("diffusers.") else module
