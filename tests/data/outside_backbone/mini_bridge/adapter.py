"""The model as training and sampling ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from transformers import T5EncoderModel, T5Tokenizer

from framebridge_plugin.backbones.adapter import BackboneAdapter
from mini_bridge.facts import MINI
from mini_bridge.network import MiniTransformer


def call_mini(
    network: MiniTransformer, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
) -> torch.Tensor:
    """Runs the network on [B, T, C, h, w] in the precision of its text."""
    shown = hidden_states.to(encoder_hidden_states.dtype).transpose(1, 2)
    return network(shown, timestep, encoder_hidden_states).transpose(1, 2).float()


class MiniAdapter(BackboneAdapter):
    """A Mini, whose captions are encoded as those of CogVideoX."""

    facts = MINI
    text_pipeline_class = CogVideoXPipeline
    network_class = MiniTransformer
    vae_class = AutoencoderKLCogVideoX
    tokenizer_class = T5Tokenizer
    text_encoder_class = T5EncoderModel
    call_network = staticmethod(call_mini)
    text_layer = "blocks.0.text"
    still_is_constant = True

    @classmethod
    def max_sequence_length(cls, network_config: Mapping[str, Any]) -> int:
        """As the network was trained."""
        return 16
