"""CogVideoX 1.0 text-to-video (2B, and 5B with rotary embeddings)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts, ClipShapeRule

INPUT_PROJECTION = "patch_embed.proj"


def clip_rule(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> ClipShapeRule:
    """Twice the VAE's temporal compression: it decodes an even number of latent frames to a wrong number of frames."""
    levels = len(vae.get("block_out_channels", range(4)))
    return ClipShapeRule(
        frames_step=2 * int(vae.get("temporal_compression_ratio", 4)),
        size_step=2 ** (levels - 1) * int(transformer.get("patch_size", 2)),
    )


def config_problem(part: str, config: Mapping[str, Any]) -> str | None:
    """That a transformer is a CogVideoX 1.5."""
    if part != "transformer" or config.get("patch_size_t") is None:
        return None
    return (
        "is a CogVideoX 1.5 (patch_size_t is set), which is not supported; use a CogVideoX 1.0 checkpoint such as "
        "THUDM/CogVideoX-2b or THUDM/CogVideoX-5b"
    )


COGVIDEOX = BackboneFacts(
    name="cogvideox_bridge",
    title="CogVideoX",
    adapter="framebridge_plugin.backbones.cogvideox.adapter:CogVideoXAdapter",
    pipeline="framebridge_plugin.backbones.cogvideox.pipeline:FrameBridgeCogVideoXPipeline",
    parts={
        "transformer": "CogVideoXTransformer3DModel",
        "vae": "AutoencoderKLCogVideoX",
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": None,
    },
    clip_rule=clip_rule,
    schedulers=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    predictions=("v_prediction",),
    input_projection=INPUT_PROJECTION,
    sampling={"num_inference_steps": 50, "guidance_scale": 6.0, "grid": "trailing"},
    plain={"target": "v", "alignment_edge": "reference", "num_frames": 17, "height": 256, "width": 256},
    config_problem=config_problem,
)
