"""What finetrainers has no argument for when it prepares a network: sharding, replicas, checkpointing, arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import finetrainers.parallel.ptd as ptd
import finetrainers.utils as utils
import torch
from finetrainers.utils._common import DIFFUSERS_TRANSFORMER_BLOCK_NAMES
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from framebridge_plugin.errors import UsageError
from framebridge_plugin.training.quantization import quantized_layers

AUTOCAST_DTYPES = {"bf16": torch.bfloat16}


@contextlib.contextmanager
def prepared_as_said(args: Any) -> Iterator[None]:
    """Within the block finetrainers shards, replicates and checkpoints networks as `args` say beyond its own."""
    ours = {
        (ptd, "apply_ddp"): _replicate,
        (ptd, "apply_fsdp2"): functools.partial(shard, AUTOCAST_DTYPES.get(args.autocast)),
        (utils, "apply_activation_checkpointing"): functools.partial(
            _checkpoint, utils.apply_activation_checkpointing, args.gradient_checkpointing_every
        ),
    }
    theirs = {place: getattr(*place) for place in ours}
    try:
        for place, function in ours.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in theirs.items():
            setattr(*place, function)


def _replicate(model: torch.nn.Module, dp_mesh: Any) -> None:
    # The gradients lie in the buckets that are exchanged, where finetrainers has both. Weights in 8 bits cannot be
    # sent, and need not be: every process has loaded the same.
    kept = quantized_layers(model)
    replicate(model, ignored_modules=kept, device_mesh=dp_mesh, bucket_cap_mb=100, gradient_as_bucket_view=True)


def shard(dtype: torch.dtype | None, model: Any, mesh: Any, param_dtype: torch.dtype, *precisions: Any) -> None:
    """Shards a network as finetrainers does (FSDP2), whose weights are gathered in `dtype`, if it is given."""
    policy = MixedPrecisionPolicy(dtype or param_dtype, *precisions[:2])
    # What a block is given the network has computed: rotary positions among it, which are to keep their digits.
    inside = dataclasses.replace(policy, cast_forward_inputs=False)
    for name in DIFFUSERS_TRANSFORMER_BLOCK_NAMES:
        for block in (blocks := list(getattr(model, name, None) or ())):
            fully_shard(block, mesh=mesh, mp_policy=inside, reshard_after_forward=block is not blocks[-1])
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _checkpoint(original: Any, every: int, network: torch.nn.Module, **kind: Any) -> torch.nn.Module:
    blocks = max(len(getattr(network, name, ())) for name in DIFFUSERS_TRANSFORMER_BLOCK_NAMES)
    if every > max(blocks, 1):
        raise UsageError(f"gradient_checkpointing_every={every}: the network has {blocks} blocks; give at most that")
    return original(network, checkpointing_type="block_skip", n_layer=every)


def autocast_calls(network: torch.nn.Module, args: Any, device: torch.device) -> None:
    """Lets a network that is not sharded compute in the precision of `autocast`, in training and in validation; what a
    sharded one computes in is up to how it is sharded.
    """
    if args.autocast is not None and args.dp_shards == 1:
        network.forward = torch.autocast(device.type, AUTOCAST_DTYPES[args.autocast])(network.forward)
