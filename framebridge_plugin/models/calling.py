"""One call of a CogVideoX transformer: the same code for training and for sampling."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.distributed.fsdp import FSDPModule


def call_transformer(
    transformer: CogVideoXTransformer3DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Runs the network in the precision of its text input, with the time in its own.

    Args:
        transformer: The network, sharded (FSDP2) or not.
        hidden_states: Latent input [B, T, C, h, w]; cast to the precision of the text.
        timestep: The network's times [B], real-valued in float32, or integers; they reach the time embedding as they
            are given, for bfloat16 would turn 965.7 into 964.
        encoder_hidden_states: Text embeddings [B, L, D].
        image_rotary_emb: Cosines and sines of the rotary embedding, for networks that have one.
        attention_kwargs: Passed to the attention processors.

    Returns:
        The output in float32, [B, T, C, h, w].
    """
    is_sharded = isinstance(transformer, FSDPModule)
    with contextlib.ExitStack() as stack:
        if is_sharded:
            # It casts all floating-point inputs to the precision of its weights, the time too.
            hook = transformer.time_proj.register_forward_pre_hook(lambda module, args: (timestep,))
            stack.callback(hook.remove)
        return transformer(
            hidden_states=hidden_states.to(encoder_hidden_states.dtype),
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            image_rotary_emb=image_rotary_emb,
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0].float()
