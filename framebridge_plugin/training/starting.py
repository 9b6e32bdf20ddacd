"""A LoRA run that begins with the layers of an earlier one."""

from __future__ import annotations

from pathlib import Path

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.model_folders.checks import LORA_FILE
from framebridge_plugin.model_folders.fingerprint import first_difference
from framebridge_plugin.model_folders.lora import LoraInfo, read_lora_info
from framebridge_plugin.training.resume_settings import tensors_difference


def load_lora_start(network: nn.Module, folder: Path, base: LoraInfo | None) -> None:
    """Puts the layers of an earlier LoRA into those that a run is to train.

    Args:
        network: The network with its LoRA layers, whole.
        folder: The folder of the earlier LoRA.
        base: What this run's LoRA says of its base model, if it says something.

    Raises:
        UsageError: If the layers are others, or were trained on another model.
        FrameBridgeError: If a file is missing or damaged.
    """
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
