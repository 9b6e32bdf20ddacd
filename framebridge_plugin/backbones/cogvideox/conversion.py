"""The LoRA folders of an earlier version, whose input projection lies in a file of its own, as today's."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from framebridge_plugin.backbones.cogvideox.adapter import load_bridge_transformer
from framebridge_plugin.backbones.cogvideox.facts import INPUT_PROJECTION
from framebridge_plugin.backbones.copying import check_is_free, written_whole
from framebridge_plugin.backbones.files import component_files
from framebridge_plugin.backbones.folders import (
    EXTRA_WEIGHTS_FILE,
    LORA_FILE,
    LORA_INFO_FILE,
    find_saved_model,
    two_file_problem,
)
from framebridge_plugin.backbones.hub import local_folder
from framebridge_plugin.backbones.lora_folders import adapter_settings, read_lora_info
from framebridge_plugin.backbones.saving import describe_base, save_lora_file
from framebridge_plugin.errors import FrameBridgeError, first_line
from framebridge_plugin.models.projection_adapter import full_rank_settings, with_identity


def convert_two_file_lora(source: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Writes a LoRA folder of an earlier version, with the input projection beside the LoRA file, as one LoRA file."""
    check_is_free(Path(folder))
    found = find_saved_model(Path(source)) or Path(source)
    if two_file_problem(found) is None:
        raise FrameBridgeError(f"{found}: no LoRA in two files (it has no {EXTRA_WEIGHTS_FILE}); use it as it is")
    info = read_lora_info(found)
    names = ("transformer", "tokenizer", "text_encoder", "vae")
    sources = {name: info.replaced_components.get(name, info.base_model) for name in names}
    try:
        revisions = {name: info.replaced_revisions.get(name) for name in info.replaced_components}
        folders = {
            name: local_folder(source, revision=revisions.get(name, info.revision)) for name, source in sources.items()
        }
        folders = {name: folder / name if (folder / name).is_dir() else folder for name, folder in folders.items()}
        settings = adapter_settings(found, "transformer")
        layers = {name.removeprefix("transformer."): tensor for name, tensor in load_file(found / LORA_FILE).items()}
        trained = load_file(found / EXTRA_WEIGHTS_FILE)
        base = load_bridge_transformer(str(folders["transformer"]), dtype=torch.float32).state_dict()
        weight, bias = (
            trained[f"{INPUT_PROJECTION}.{name}"].float() - base[f"{INPUT_PROJECTION}.{name}"]
            for name in ("weight", "bias")
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise FrameBridgeError(
            f"{found}: cannot read the LoRA and its base model ({first_line(error)}); take the folder as it was "
            f"written, and correct the base model's place in its {LORA_INFO_FILE}"
        ) from error

    layer = f"{INPUT_PROJECTION}.lora_B"
    layers[f"{layer}.weight"] = weight.flatten(1)[..., *(None,) * (weight.ndim - 2)]
    layers = with_identity(layers, INPUT_PROJECTION, weight.shape[2:])
    # peft knows biases for all layers or none.
    for name in [name for name in layers if name.endswith(".lora_B.weight")]:
        layers[name.replace(".weight", ".bias")] = torch.zeros(len(layers[name]))
    layers[f"{layer}.bias"] = bias
    settings |= full_rank_settings(INPUT_PROJECTION, weight[0].numel(), settings["target_modules"])
    settings["lora_bias"] = True
    with written_whole(Path(folder)) as partial:
        (partial / "scheduler").mkdir()
        for name, file in component_files(found / "scheduler"):
            shutil.copyfile(file, partial / "scheduler" / name)
        save_lora_file(partial / LORA_FILE, "transformer", layers, settings)
        components = {name: (sources[name], folders[name]) for name in sources}
        dataclasses.replace(info, **describe_base(info.base_model, components)).write(partial)
    return found
