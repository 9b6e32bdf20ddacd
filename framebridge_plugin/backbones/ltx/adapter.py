"""LTX-Video 0.9.x as training and sampling ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from transformers import T5EncoderModel, T5TokenizerFast

from framebridge_plugin.backbones.adapter import BackboneAdapter
from framebridge_plugin.backbones.ltx.facts import FRAME_RATE, FRAMES_PER_LATENT, LTX, PIXELS_PER_LATENT
from framebridge_plugin.models.calling import unrounded


def call_ltx(
    transformer: LTXVideoTransformer3DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    rope_interpolation_scale: tuple[float, float, float],
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Runs an LTX network on [B, T, C, h, w], a token for each latent pixel, in the precision of its text."""
    num_frames, _, height, width = hidden_states.shape[1:]
    with unrounded(transformer, timestep=timestep):
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


class LTXAdapter(BackboneAdapter):
    """LTX-Video 0.9.x text-to-video."""

    facts = LTX
    text_pipeline_class = LTXPipeline
    network_class = LTXVideoTransformer3DModel
    vae_class = AutoencoderKLLTXVideo
    tokenizer_class = T5TokenizerFast
    text_encoder_class = T5EncoderModel
    call_network = staticmethod(call_ltx)
    text_layer = "caption_projection.linear_1"
    still_is_constant = True
    embeddings: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
    }

    @classmethod
    def max_sequence_length(cls, network_config: Mapping[str, Any]) -> int:
        """As the network was trained."""
        return 128

    @classmethod
    def text_conditions(cls, encoded: tuple[Any, ...]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Embeddings and their masks."""
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return dict(zip(names, encoded[:2], strict=True)), dict(zip(names, encoded[2:], strict=True))

    @classmethod
    def call_settings(cls, frame_rate: float | None) -> dict[str, Any]:
        """The scale of the positions, by which the network knows how fast the video goes by."""
        seconds = FRAMES_PER_LATENT / (frame_rate or FRAME_RATE)
        return {"rope_interpolation_scale": (seconds, PIXELS_PER_LATENT, PIXELS_PER_LATENT)}

    @classmethod
    def baseline_times(cls, scheduler: Any, num_steps: int, shape: torch.Size) -> dict[str, Any]:
        """The levels of diffusers' pipeline, whose shift depends on the number of tokens."""
        config, tokens = scheduler.config, shape[1] * shape[3] * shape[4]
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(config[name] for name in names))
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}
