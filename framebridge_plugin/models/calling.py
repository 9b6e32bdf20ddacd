"""One call of a network: the same code for training and for sampling.

A network's time is real-valued under SNR alignment and needs float32: bfloat16 turns 965.7 into 964.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from framebridge_plugin.models.latte import LatteTransformer


def call_transformer(
    transformer: CogVideoXTransformer3DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Runs a CogVideoX network on [B, T, C, h, w] in the precision of its text [B, L, D]; times [B] stay float32."""
    with _unrounded_time(transformer, transformer.time_proj, timestep):
        return transformer(
            hidden_states=hidden_states.to(encoder_hidden_states.dtype),
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            image_rotary_emb=image_rotary_emb,
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0].float()


def call_wan(
    transformer: WanTransformer3DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Runs a Wan network as `call_transformer` runs a CogVideoX network."""
    with _unrounded_time(transformer, transformer.condition_embedder.timesteps_proj, timestep):
        return (
            transformer(
                hidden_states=hidden_states.to(encoder_hidden_states.dtype).transpose(1, 2),
                timestep=timestep,
                encoder_hidden_states=encoder_hidden_states,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]
            .transpose(1, 2)
            .float()
        )


def call_ltx(
    transformer: LTXVideoTransformer3DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    rope_interpolation_scale: tuple[float, float, float],
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Runs an LTX network as `call_transformer` runs a CogVideoX network, on one token for each latent pixel."""
    num_frames, _, height, width = hidden_states.shape[1:]
    with _unrounded_time(transformer, transformer.time_embed.emb.time_proj, timestep):
        output = transformer(
            hidden_states=hidden_states.to(encoder_hidden_states.dtype).movedim(2, -1).flatten(1, 3),
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            encoder_attention_mask=encoder_attention_mask,
            num_frames=num_frames,
            height=height,
            width=width,
            rope_interpolation_scale=rope_interpolation_scale,
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]
    return output.unflatten(1, (num_frames, height, width)).movedim(-1, 2).float()


def call_latte(
    transformer: LatteTransformer,
    latents_BFCHW: torch.Tensor,
    timestep_B: torch.Tensor | None,
    class_labels_B: torch.Tensor,
    image_latents_B1CHW: torch.Tensor | None = None,
    neural_prior_BFCHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a Latte network in its own precision, with the time in float32; the output is float32 [B, F, C, h, w].

    The image's latent is put in front of the noisy ones, and its output dropped; the neural prior's video, for a
    network that takes it, are further input channels, in which the frame in front has the image once more. A neural
    prior is given the repeated image as `latents_BFCHW`, and neither time nor image.
    """
    inputs = latents_BFCHW
    if image_latents_B1CHW is not None:
        inputs = torch.cat([image_latents_B1CHW, inputs], dim=1)
        if neural_prior_BFCHW is not None:
            inputs = torch.cat([inputs, torch.cat([image_latents_B1CHW, neural_prior_BFCHW], dim=1)], dim=2)
    with _unrounded_time(transformer, transformer.time_proj, timestep_B):
        output = transformer(inputs.to(transformer.dtype), timestep_B, class_labels_B, return_dict=False)[0].float()
    return output[:, -latents_BFCHW.shape[1] :]


@contextlib.contextmanager
def _unrounded_time(transformer: Any, embedding: nn.Module | None, timestep: torch.Tensor | None) -> Iterator[None]:
    """Gives the time's embedding the time as it is: FSDP2 casts floating-point inputs to the weights' precision."""
    if embedding is None or timestep is None or not isinstance(transformer, FSDPModule):
        yield
        return
    hook = embedding.register_forward_pre_hook(lambda module, args: (timestep,))
    try:
        yield
    finally:
        hook.remove()
