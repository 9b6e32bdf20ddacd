"""What a computation takes of memory, found by making it with tensors that have a shape and no data.

The figures are those of PyTorch's allocator: what it lays by, and the scratch of convolution libraries, come on top.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BatchEncoding

GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


class Allocations(TorchDispatchMode):
    """Adds up the memory of the tensors that are made inside it, of whatever device; those from before do not count.

    Attributes:
        live: Bytes of those that are still there.
        peak: The most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Makes a call of an operator, and counts what it allocated."""
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            place = storage._cdata
            if place in before or place in self._sizes:  # a view, or computed in place
                continue
            self._sizes[place] = storage.nbytes()
            self.live += self._sizes[place]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, place)
        return result

    def _freed(self, place: int) -> None:
        self.live -= self._sizes.pop(place)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def without_data(dtype: torch.dtype) -> Iterator[None]:
    """Inside it tensors have shapes alone; those whose type is not said, as a module's weights, have `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), flash_attention():
            yield
    finally:
        torch.set_default_dtype(default)


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
    """Makes of every text as many tokens as it is asked for."""

    model_max_length = 512

    def __call__(self, text: Any, max_length: int = 1, **settings: Any) -> BatchEncoding:
        """The tokens of a text or of several."""
        tokens = torch.ones(len(text) if isinstance(text, list) else 1, max_length, dtype=torch.int64, device="cpu")
        return BatchEncoding({"input_ids": tokens, "attention_mask": tokens})

    def batch_decode(self, tokens: torch.Tensor) -> list[str]:
        """No text."""
        return [""] * len(tokens)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still have on a device; for a CPU of the main memory, within its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch has laid by is its own.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit, or another system
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, max(0, limit - used + int(counts["inactive_file"])))
    return free
