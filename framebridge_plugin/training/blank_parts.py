"""Parts of a run that have shapes and no data, and what counts the memory that they take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding

from framebridge_plugin.backbones.memory import Allocations


class CountedUpdate(Allocations):
    """Counts gradients that stay apart."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients = self.peak_beside_gradients = 0

    def keep(self, parameter: torch.Tensor) -> None:
        """Counts a parameter's gradient, when it is whole."""
        self.gradients += 0 if parameter.grad is None else parameter.grad.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Makes a call of an operator, and counts what it allocated."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak_beside_gradients = max(self.peak_beside_gradients, self.live - self.gradients)
        return result


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Attention takes what it takes on a device; without data PyTorch would make the matrix of all pairs."""
    original = nn.functional.scaled_dot_product_attention

    def flash(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    # A mode would not do: checkpointed blocks are computed anew in a thread of the backward pass.
    nn.functional.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


class BlankTokenizer:
    """Makes of every caption as many tokens as it is asked for."""

    model_max_length = 512

    def __call__(self, text: Any, max_length: int = 512, **settings: Any) -> BatchEncoding:
        """As many tokens as there may be."""
        tokens = torch.ones(1, max_length, dtype=torch.int64)
        return BatchEncoding({"input_ids": tokens, "attention_mask": tokens})

    def batch_decode(self, tokens: torch.Tensor) -> list[str]:
        """No text."""
        return [""] * len(tokens)


def remade(module: Any, dtype: torch.dtype | None, device: torch.device) -> Any:
    """A module with tensors without data of a precision (None: as they are) on a device; tied weights stay tied."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    made[id(tensor)] = torch.empty(tensor.shape, dtype=kind, device=device)
                    if isinstance(tensor, nn.Parameter):
                        made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
                tensors[name] = None if tensor is None else made[id(tensor)]
    return module
