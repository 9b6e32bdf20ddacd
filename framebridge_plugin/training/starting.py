"""The weights of an earlier run, with which either trainer begins a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.model_folders.checks import LORA_FILE
from framebridge_plugin.model_folders.fingerprint import first_difference
from framebridge_plugin.model_folders.lora import LoraInfo, read_lora_info
from framebridge_plugin.model_folders.starting import find_start
from framebridge_plugin.training.resume_settings import tensors_difference


def load_start(args: Any, specification: Any, network: nn.Module) -> None:
    """Begins with the layers of a LoRA; a whole model was loaded as the network's own (`transformer_id`)."""
    start = None if args.resume_from_checkpoint is not None else find_start(args.start_from)
    if start is None:
        return
    if start.is_lora:
        _load_lora(network, start.folder, getattr(specification, "_lora_info", None))
    elif specification.transformer_id != args.transformer_id:
        raise UsageError(
            f"start_from: the weights in {start.network} were not loaded: build the specification with "
            "transformer_id=args.transformer_id"
        )


def _load_lora(network: nn.Module, folder: Path, base: LoraInfo | None) -> None:
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
    set_peft_model_state_dict(network, stored)
