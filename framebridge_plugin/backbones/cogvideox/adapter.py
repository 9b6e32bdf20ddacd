"""CogVideoX as training and sampling ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from transformers import T5EncoderModel, T5Tokenizer

from framebridge_plugin.backbones.adapter import BackboneAdapter, Network
from framebridge_plugin.backbones.cogvideox.facts import COGVIDEOX, INPUT_PROJECTION, config_problem
from framebridge_plugin.backbones.loading import ModelSource, load_config, load_weights
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.calling import unrounded
from framebridge_plugin.models.widening import widen_input_channels


def call_transformer(
    transformer: CogVideoXTransformer3DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Runs a CogVideoX network on [B, T, C, h, w] in the precision of its text [B, L, D]; times [B] stay float32."""
    with unrounded(transformer, timestep=timestep, image_rotary_emb=image_rotary_emb):
        return transformer(
            hidden_states=hidden_states.to(encoder_hidden_states.dtype),
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            image_rotary_emb=image_rotary_emb,
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0].float()


class CogVideoXAdapter(BackboneAdapter):
    """CogVideoX 1.0 (2B, or 5B with rotary embeddings)."""

    facts = COGVIDEOX
    text_pipeline_class = CogVideoXPipeline
    network_class = CogVideoXTransformer3DModel
    vae_class = AutoencoderKLCogVideoX
    tokenizer_class = T5Tokenizer
    text_encoder_class = T5EncoderModel
    call_network = staticmethod(call_transformer)
    text_layer = "patch_embed.text_proj"
    still_is_constant = True
    # CogVideoX-5B names the DPM scheduler; its noise schedule is the same, and finetrainers knows this class.
    backbone_class = CogVideoXDDIMScheduler

    @classmethod
    def max_sequence_length(cls, network_config: Mapping[str, Any]) -> int:
        """As the network was built."""
        return network_config["max_text_seq_length"]

    @classmethod
    def bind(
        cls, network: Any, conditions: Mapping[str, Any], image_latents: torch.Tensor, prior: torch.Tensor, **call: Any
    ) -> Network:
        """The network with text, image and positions bound."""
        if network.config.use_rotary_positional_embeddings:
            call["image_rotary_emb"] = _rotary_embedding(network.config, prior)
        return super().bind(network, conditions, image_latents, prior, **call)


def _rotary_embedding(config: Any, latents_BTCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the positions, as diffusers' pipeline computes them for CogVideoX 1.0."""
    _, num_frames, _, *size = latents_BTCHW.shape
    height, width = (length // config.patch_size for length in size)
    base = config.sample_width // config.patch_size, config.sample_height // config.patch_size
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=get_resize_crop_region_for_grid((height, width), *base),
        grid_size=(height, width),
        temporal_size=num_frames,
        device=latents_BTCHW.device,
    )


def load_bridge_transformer(
    pretrained_model_name_or_path: str, *, subfolder: str | None = None, **kwargs: Any
) -> CogVideoXTransformer3DModel:
    """Loads a CogVideoX transformer and widens it where that is needed.

    Args:
        pretrained_model_name_or_path: A folder or hub id: a whole CogVideoX model (with `subfolder="transformer"`),
            plain or widened already, or a `transformer/` folder alone.
        subfolder: The folder of the transformer inside a whole model.
        **kwargs: Passed to diffusers' `from_pretrained` (`dtype`, `revision`, `cache_dir`, ...).

    Returns:
        A transformer with twice as many input as output channels.

    Raises:
        FrameBridgeError: If it is a CogVideoX 1.5, has another number of channels, or its weights lack a tensor.
    """
    source = pretrained_model_name_or_path
    model = ModelSource(source, hub={name: kwargs.pop(name) for name in ("revision", "cache_dir") if name in kwargs})
    place, expected = (source, subfolder or ""), "a CogVideoX model in diffusers format, or its transformer/ alone"
    config = load_config(CogVideoXTransformer3DModel, model, place, expected)
    if problem := config_problem("transformer", config):  # before a long download
        raise FrameBridgeError(f"{source} {problem}")
    transformer = load_weights(CogVideoXTransformer3DModel, "transformer", model, place, expected, **kwargs)
    return widen_input_channels(transformer, INPUT_PROJECTION)
