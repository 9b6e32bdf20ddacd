"""Weights in 8 bits of what is not trained, and float8 products of what is; by torchao."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from framebridge_plugin.errors import UsageError

FLOAT8_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}
"""CUDA compute capability from which on a GPU has the products of a recipe of torchao."""


@dataclass(frozen=True, kw_only=True)
class QuantizedParts:
    """Which parts of a model are stored in few bits or multiply in float8, as `PrecisionSection` has it."""

    transformer_quantization: str | None = None
    text_encoder_quantization: str | None = None
    float8_training: str | None = None

    @classmethod
    def names(cls) -> list[str]:
        """The names of these settings."""
        return [field.name for field in dataclasses.fields(cls)]

    def convert_network(self, network: nn.Module) -> None:
        """Converts a network whose trained parameters, those of LoRA layers among them, are chosen."""
        if self.transformer_quantization is not None:
            quantize_blocks(network, self.transformer_quantization)
        if self.float8_training is not None:
            use_float8_products(network, self.float8_training)

    def with_text_encoder(self, models: dict[str, Any]) -> dict[str, Any]:
        """Converts the text encoder among models that are loaded, if there is one; returns them."""
        if self.text_encoder_quantization is not None and "text_encoder" in models:
            quantize_blocks(models["text_encoder"].requires_grad_(False), self.text_encoder_quantization)
        return models

    def text_facts(self) -> dict[str, str]:
        """What stored embeddings depend on; nothing for a text encoder as it is."""
        kind = self.text_encoder_quantization
        return {} if kind is None else {"text_encoder_quantization": kind}

    def check_training(self, training_type: str) -> None:
        """Refuses a training that has no frozen weights to quantise."""
        if self.transformer_quantization is not None and training_type != "lora":
            raise UsageError("transformer_quantization: weights in few bits cannot be trained; take lora")


def block_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yields the linear layers of a model's repeated blocks by their names.

    Embeddings, norms, and the projections before and after the blocks, the widened one among them, are none of them.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in model.named_modules():
        if type(module) is nn.Linear and any(name.startswith(f"{block}.") for block in blocks):
            yield name, module


def quantize_blocks(model: nn.Module, kind: str) -> None:
    """Stores those weights of the `block_layers` that are not trained in int8 or float8, with a scale for each output.

    A layer computes in the precision of its input, out of weights that are unpacked for it.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    chosen = {layer for _, layer in block_layers(model) if not layer.weight.requires_grad}
    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]
    # Left to itself, torchao sets the precision of all float32 products.
    quantize_(model, config(set_inductor_config=False), filter_fn=lambda module, _: module in chosen)


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers whose weights `quantize_blocks` has stored."""
    return [layer for _, layer in block_layers(model) if is_traceable_wrapper_subclass(layer.weight)]


def stored_bytes(tensor: torch.Tensor) -> int:
    """What a tensor takes of memory: of one in 8 bits its numbers and their scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def use_float8_products(model: nn.Module, recipe: str, *, emulate: bool = False) -> None:
    """Has the `block_layers` multiply in float8, forward and backward; weights and files stay as they are.

    The kernels take multiples of 16: layers of another width are left as they are. To `emulate` takes no such GPU.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Products for the weights' gradients sum over tokens, of which there is any number.
    config = Float8LinearConfig.from_recipe_name(recipe)
    config = dataclasses.replace(config, pad_inner_dim=True, emulate=emulate)
    chosen = {layer for _, layer in block_layers(model) if not any(size % 16 for size in layer.weight.shape)}
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, _: module in chosen)


def float8_problem(recipe: str) -> str | None:
    """Why this machine has no float8 products of a recipe; None if it does."""
    least = FLOAT8_CAPABILITY[recipe]
    there = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if there is not None and there >= least:
        return None
    found = "there is none" if there is None else f"this one has {there[0]}.{there[1]}"
    return f"{recipe} needs a CUDA GPU of compute capability {least[0]}.{least[1]} or higher, and {found}; set null"
