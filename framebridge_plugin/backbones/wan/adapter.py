"""Wan 2.1 as training and sampling ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from transformers import T5TokenizerFast, UMT5EncoderModel

from framebridge_plugin.backbones.adapter import BackboneAdapter
from framebridge_plugin.backbones.files import read_json
from framebridge_plugin.backbones.loading import cannot_load, loading
from framebridge_plugin.backbones.wan.facts import WAN, config_problem
from framebridge_plugin.models.calling import unrounded


def call_wan(
    transformer: WanTransformer3DModel,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Runs a Wan network on [B, T, C, h, w] in the precision of its text [B, L, D]; times [B] stay float32."""
    with unrounded(transformer, timestep=timestep):
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


class WanAdapter(BackboneAdapter):
    """Wan 2.1 text-to-video (1.3B, 14B)."""

    facts = WAN
    text_pipeline_class = WanPipeline
    network_class = WanTransformer3DModel
    vae_class = AutoencoderKLWan
    tokenizer_class = T5TokenizerFast
    text_encoder_class = UMT5EncoderModel
    call_network = staticmethod(call_wan)
    text_layer = "condition_embedder.text_embedder.linear_1"

    def read_network_config(self) -> FrozenDict:
        """The network's config; refuses a Wan 2.2 as well, whose first network looks like one of 2.1."""
        source = self.source.name_or_path
        with loading("model", source, self.expected):
            index = read_json(self.source.local(source, "", settings_only=True) / "model_index.json")
        if problem := config_problem("model_index.json", index):
            raise cannot_load("model", source, f"it {problem}", self.expected)
        return super().read_network_config()

    def load_backbone(self) -> Any:
        """The scheduler that finetrainers knows, with the shift of the released UniPC."""
        backbone = super().load_backbone()
        if backbone is None or isinstance(backbone, FlowMatchEulerDiscreteScheduler):
            return backbone
        config = backbone.config
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.get("flow_shift", 1.0))

    @classmethod
    def max_sequence_length(cls, network_config: Mapping[str, Any]) -> int:
        """As the network was trained."""
        return 512
