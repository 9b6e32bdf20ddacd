"""LTX-Video 0.9.x text-to-video, a flow-matching backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts, ClipShapeRule

FRAMES_PER_LATENT, PIXELS_PER_LATENT = 8, 32
FRAME_RATE = 25.0
"""Which diffusers' pipeline takes by default; the network's positions are in seconds."""


def config_problem(part: str, config: Mapping[str, Any]) -> str | None:
    """That a model is none of the released ones, which all compress alike and have one token for each latent pixel."""
    halvings = sum(config.get("spatio_temporal_scaling", (True, True, True, False)))
    patch = config.get("patch_size_t", 1), config.get("patch_size", 4 if part == "vae" else 1)
    if (part == "vae" and (halvings, *patch) != (3, 1, 4)) or (part == "transformer" and patch != (1, 1)):
        return "is none of LTX-Video 0.9; use a checkpoint such as Lightricks/LTX-Video"
    return None


LTX = BackboneFacts(
    name="ltx_bridge",
    title="LTX",
    adapter="framebridge_plugin.backbones.ltx.adapter:LTXAdapter",
    pipeline="framebridge_plugin.backbones.ltx.pipeline:FrameBridgeLTXPipeline",
    parts={
        "transformer": "LTXVideoTransformer3DModel",
        "vae": "AutoencoderKLLTXVideo",
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": None,
    },
    clip_rule=lambda vae, transformer: ClipShapeRule(FRAMES_PER_LATENT, PIXELS_PER_LATENT),
    process="flow_matching",
    schedulers=("FlowMatchEulerDiscreteScheduler",),  # whose shift by resolution its baseline needs
    predictions=("flow_prediction",),
    input_projection="proj_in",
    defaults={"target": "flow"},
    sampling={"num_inference_steps": 50, "guidance_scale": 3.0, "grid": "trailing"},
    plain={"target": "flow", "num_frames": 161, "height": 512, "width": 704, "fps": FRAME_RATE},
    config_problem=config_problem,
)
