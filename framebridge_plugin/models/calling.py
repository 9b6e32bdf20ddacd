"""A network's time is real-valued under SNR alignment and needs float32: bfloat16 turns 965.7 into 964."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextlib.contextmanager
def unrounded_time(transformer: Any, embedding: nn.Module | None, timestep: torch.Tensor | None) -> Iterator[None]:
    """Gives the time's embedding the time as it is: FSDP2 casts floating-point inputs to the weights' precision."""
    if embedding is None or timestep is None or not isinstance(transformer, FSDPModule):
        yield
        return
    hook = embedding.register_forward_pre_hook(lambda module, args: (timestep,))
    try:
        yield
    finally:
        hook.remove()
