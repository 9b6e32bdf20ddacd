"""Latte, from scratch on classes: the bridge, and the neural prior that a bridge may start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts, ClipShapeRule

_CLASSES_NOT_TEXT = "Latte has no text encoder: the caption of a clip is the name of its class"
_NO_PIXEL_NOISE = "with Latte the first frame's one latent is condition, prior and first frame of the video"
_NO_BRIDGE = "the neural prior is the mean of the videos that begin with an image, without a bridge"
_OF_TEXT = ("model.tokenizer_id", "model.text_encoder_id", "precision.text_encoder_dtype", "framebridge.data.id_token")
_OF_NOISE = tuple(f"framebridge.{name}" for name in ("image_noise", "prior_noise", "noise_log_mean", "noise_log_std"))
_WITHOUT_EFFECT = dict.fromkeys(_OF_TEXT, _CLASSES_NOT_TEXT) | dict.fromkeys(_OF_NOISE, _NO_PIXEL_NOISE)


def clip_rule(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> ClipShapeRule:
    """Any number of frames, each encoded by itself."""
    levels = len(vae.get("block_out_channels", range(4)))
    return ClipShapeRule(frames_step=1, size_step=2 ** (levels - 1) * int(transformer.get("patch_size", 2)))


LATTE_BRIDGE = BackboneFacts(
    name="latte_bridge",
    title="FrameBridgeLatte",
    adapter="framebridge_plugin.backbones.latte.adapter:LatteAdapter",
    pipeline="framebridge_plugin.backbones.latte.pipeline:FrameBridgeLattePipeline",
    parts={"transformer": "LatteTransformer", "vae": "AutoencoderKL", "scheduler": None},
    clip_rule=clip_rule,
    condition="class",
    schedulers=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    defaults={
        "target": "eps_psi",
        "snr_aligned": False,
        "image_noise": False,
        "prior_noise": False,
        "ema_decay": 0.9999,
    },
    sampling={"num_inference_steps": 1000, "guidance_scale": 7.0, "grid": "linspace"},
    without_effect=_WITHOUT_EFFECT,
)
LATTE_NEURAL_PRIOR = dataclasses.replace(
    LATTE_BRIDGE,
    name="latte_neural_prior",
    adapter="framebridge_plugin.backbones.latte.adapter:NeuralPriorAdapter",
    parts={"neural_prior": "LatteTransformer", "vae": "AutoencoderKL"},
    network="neural_prior",
    without_effect=_WITHOUT_EFFECT
    | {
        f"framebridge.{name}": _NO_BRIDGE
        for name in ("objective", "target", "snr_aligned", "alignment_edge", "beta_min", "beta_max", "neural_prior")
    },
)
