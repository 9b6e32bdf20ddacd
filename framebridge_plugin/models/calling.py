"""A network's time is real-valued under SNR alignment and needs float32: bfloat16 turns 965.7 into 964."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.distributed.fsdp import FSDPModule


@contextlib.contextmanager
def unrounded(transformer: Any, **inputs: Any) -> Iterator[None]:
    """Gives a network these of its inputs, by their names, as they are: FSDP2 casts all to the weights' precision."""
    is_sharded = isinstance(transformer, FSDPModule)
    if not is_sharded:
        yield
        return

    def give(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | inputs

    hook = transformer.register_forward_pre_hook(give, with_kwargs=True)  # after FSDP2's own, which is the first
    try:
        yield
    finally:
        hook.remove()
