"""The weights of an earlier run, with which either trainer begins a new one."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from framebridge_plugin.backbones.fingerprint import first_difference
from framebridge_plugin.backbones.folders import LORA_FILE
from framebridge_plugin.backbones.lora_folders import lora_settings, read_lora_info
from framebridge_plugin.backbones.starting import find_start, goes_on
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.training.resume_settings import tensors_difference


def load_start(args: Any, specification: Any, network: nn.Module) -> None:
    """Begins with the layers of a LoRA; a whole model was loaded as the network's own (`transformer_id`)."""
    layers = start_layers(args, specification, network)
    if layers is not None:
        set_peft_model_state_dict(network, layers)


def start_layers(args: Any, specification: Any, network: nn.Module) -> dict[str, torch.Tensor] | None:
    """The layers of the LoRA that a run begins with, if it does; refuses what is for other layers or another model."""
    start = None if goes_on(args.output_dir, args.resume_from_checkpoint) else find_start(args.start_from)
    if start is None:
        return None
    if not start.is_lora:
        if specification.transformer_id != args.transformer_id:
            raise UsageError(
                f"start_from: the weights in {start.network} were not loaded: build the specification with "
                "transformer_id=args.transformer_id"
            )
        return None
    assert start.facts is not None
    folder, base = start.folder, getattr(specification, "_lora_info", None)
    info = read_lora_info(folder)
    if base is not None and info.fingerprint:
        difference = first_difference(info.fingerprint, base.fingerprint)
        if difference is not None:
            raise UsageError(f"start_from: {folder} was trained with another model: {difference}; take that one")
    try:
        file, prefix = load_file(folder / LORA_FILE), f"{info.network_name}."
    except (OSError, SafetensorError) as error:
        raise FrameBridgeError(
            f"start_from: cannot load {folder / LORA_FILE}: {error}; copy the folder again"
        ) from error
    stored = {name.removeprefix(prefix): tensor for name, tensor in file.items()}
    difference = tensors_difference(stored, get_peft_model_state_dict(network))
    if difference is not None:
        raise UsageError(f"start_from: the layers of {folder} are others: {difference}; take its rank and targets")
    alpha = lora_settings(folder, start.facts).get("lora_alpha", args.lora_alpha)
    if alpha != args.lora_alpha:
        raise UsageError(f"start_from: {folder} has the lora_alpha {alpha}, this run {args.lora_alpha}; take its own")
    return stored
