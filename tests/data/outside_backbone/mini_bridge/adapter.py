"""The model as training and sampling ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from transformers import T5EncoderModel, T5Tokenizer

from framebridge_plugin.backbones.adapter import BackboneAdapter, Network
from mini_bridge.facts import MINI
from mini_bridge.network import MiniTransformer


class MiniAdapter(BackboneAdapter):
    """A Mini, whose captions are encoded as those of CogVideoX."""

    facts = MINI
    text_pipeline_class = CogVideoXPipeline
    network_class = MiniTransformer
    vae_class = AutoencoderKLCogVideoX
    tokenizer_class = T5Tokenizer
    text_encoder_class = T5EncoderModel
    text_layer = "blocks.0.text"

    @classmethod
    def max_sequence_length(cls, network_config: Mapping[str, Any]) -> int:
        """As the network was trained."""
        return 16

    @classmethod
    def bind(
        cls, network: Any, conditions: Mapping[str, Any], image_latents: torch.Tensor, prior: torch.Tensor, **call: Any
    ) -> Network:
        """The network with text and image bound."""
        text, image = conditions["encoder_hidden_states"], image_latents.expand_as(prior)

        def bound(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            shown = torch.cat([latents, image], dim=2).to(text.dtype)
            return network(shown.transpose(1, 2), time, text).transpose(1, 2).float()

        return bound
