"""Wan 2.1 text-to-video (1.3B and 14B), a flow-matching backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts, ClipShapeRule

_WANTED = "use a Wan 2.1 text-to-video checkpoint such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def clip_rule(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> ClipShapeRule:
    """The compression of the autoencoder, which drops other frames without a word, times the network's patch."""
    patch = max(transformer.get("patch_size", (1, 2, 2))[1:])
    return ClipShapeRule(vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8) * patch)


def config_problem(part: str, config: Mapping[str, Any]) -> str | None:
    """That a model is an image-to-video Wan, or a Wan 2.2."""
    if part == "transformer":
        inputs, outputs = config.get("in_channels"), config.get("out_channels")
        if config.get("image_dim") is not None or (outputs and inputs not in (outputs, 2 * outputs)):
            return f"is an image-to-video Wan ({inputs} input channels), which needs no bridge; {_WANTED}"
    if config.get("boundary_ratio") is not None or config.get("expand_timesteps") or config.get("is_residual"):
        return f"is a Wan 2.2, which is not supported; {_WANTED}"
    return None


WAN = BackboneFacts(
    name="wan_bridge",
    title="Wan",
    adapter="framebridge_plugin.backbones.wan.adapter:WanAdapter",
    pipeline="framebridge_plugin.backbones.wan.pipeline:FrameBridgeWanPipeline",
    parts={
        "transformer": "WanTransformer3DModel",
        "vae": "AutoencoderKLWan",
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": None,
    },
    clip_rule=clip_rule,
    process="flow_matching",
    predictions=("flow_prediction",),
    input_projection="patch_embedding",
    defaults={
        "target": "flow",
        "lora.target_modules": ["blocks.*(to_q|to_k|to_v|to_out.0)"],
    },
    sampling={"num_inference_steps": 50, "guidance_scale": 5.0, "grid": "trailing"},
    plain={"target": "flow", "num_frames": 81, "height": 480, "width": 832, "fps": 16.0},
    config_problem=config_problem,
)
