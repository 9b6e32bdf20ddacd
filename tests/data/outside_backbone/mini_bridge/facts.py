"""What a recipe and a command must know of the model before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts, ClipShapeRule


def clip_rule(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> ClipShapeRule:
    """The autoencoder compresses 4 times in time, and returns whole groups of 8 frames; 8 times in space."""
    return ClipShapeRule(frames_step=8, size_step=8)


MINI = BackboneFacts(
    name="mini_bridge",
    title="Mini",
    adapter="mini_bridge.adapter:MiniAdapter",
    pipeline="mini_bridge.pipeline:FrameBridgeMiniPipeline",
    parts={
        "transformer": "MiniTransformer",
        "vae": "AutoencoderKLCogVideoX",
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": None,
    },
    clip_rule=clip_rule,
    process="flow_matching",
    predictions=("flow_prediction",),
    input_projection="proj_in",
    defaults={"target": "flow", "lora.target_modules": ["to_q"]},
    sampling={"num_inference_steps": 4, "guidance_scale": 2.0, "grid": "trailing"},
    plain={"target": "flow", "num_frames": 9, "height": 32, "width": 32},
)
