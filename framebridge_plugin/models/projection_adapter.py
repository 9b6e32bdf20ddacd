"""The LoRA layer of full rank by which the widened input projection is trained.

Low-rank layers elsewhere cannot teach a network to read channels that are new to it: the projection has to be trained
as a whole. As an adapter it is W x + B A x, where A is the identity over the projection's inputs (channels times
kernel) and stays frozen, and B, zero at the start, is what the projection has learned: B gets the projection's own
gradient. So a LoRA is one file of ordinary layers, which whoever knows peft's layers can load, scale and remove.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from framebridge_plugin.errors import FrameBridgeError


def full_rank_settings(projection: str, rank: int, target_modules: str | Iterable[str]) -> dict[str, Any]:
    """What adds the adapter of a projection of `rank` inputs (channels x kernel), of scale 1, to a `LoraConfig`."""
    is_pattern = isinstance(target_modules, str)
    targets = f"{target_modules}|{projection}" if is_pattern else sorted({*target_modules, projection})
    return {"target_modules": targets, "rank_pattern": {projection: rank}, "alpha_pattern": {projection: rank}}


def add_projection(config: LoraConfig, network: nn.Module, projection: str) -> None:
    """Adds the projection's adapter to a LoRA's configuration, in place; a ValueError if it names no layer that is
    there.
    """
    if not any(check_target_module_exists(config, name) for name, _ in network.named_modules()):
        # peft would say it, were it not for the projection.
        raise ValueError(f"Target modules {config.target_modules} not found in the base model")
    layer: Any = network.get_submodule(projection)
    rank = layer.weight[0].numel()
    for name, value in full_rank_settings(projection, rank, config.target_modules or ()).items():
        setattr(config, name, value)


def freeze_identity(network: nn.Module, projection: str) -> None:
    """Sets A of the projection's adapters to the identity, and trains B alone."""
    layer = network.get_submodule(projection)
    if not isinstance(layer, LoraLayer):
        raise FrameBridgeError(
            f"the LoRA leaves out {projection}, without which the network cannot see the image; add its layers "
            "by framebridge_plugin.training.finetrainers.registration.add_lora_layers"
        )
    for lora_A in layer.lora_A.values():
        weight = lora_A.weight
        with torch.no_grad():
            weight.copy_(torch.eye(len(weight)).reshape(weight.shape))
        weight.requires_grad_(False)


def with_identity(
    state_dict: Mapping[str, torch.Tensor], projection: str, kernel_size: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Completes the layers of a LoRA by the projection's A, which is not among what is trained."""
    B = state_dict[f"{projection}.lora_B.weight"]
    A = torch.eye(B.shape[1], dtype=B.dtype).reshape(B.shape[1], -1, *kernel_size)
    return {**state_dict, f"{projection}.lora_A.weight": A}
