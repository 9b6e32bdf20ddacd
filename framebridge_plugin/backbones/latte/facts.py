"""Latte, from scratch on classes: the bridge, and the neural prior that a bridge may start from."""

from __future__ import annotations

import dataclasses

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.latte import rules

_CLASSES_NOT_TEXT = "Latte has no text encoder: the caption of a clip is the name of its class"
_NO_PIXEL_NOISE = "with Latte the first frame's one latent is condition, prior and first frame of the video"
_NO_BRIDGE = "the neural prior is the mean of the videos that begin with an image, without a bridge"
_OF_TEXT = (
    *("model.tokenizer_id", "model.text_encoder_id", "precision.text_encoder_dtype", "framebridge.data.id_token"),
    *("framebridge.text_encoder_device", "framebridge.caption_cache_gib", "framebridge.caption_cache_dir"),
    "precision.text_encoder_quantization",
)
_OF_NOISE = tuple(f"framebridge.{name}" for name in ("image_noise", "prior_noise", "noise_log_mean", "noise_log_std"))
_WITHOUT_EFFECT = dict.fromkeys(_OF_TEXT, _CLASSES_NOT_TEXT) | dict.fromkeys(_OF_NOISE, _NO_PIXEL_NOISE)


LATTE_BRIDGE = BackboneFacts(
    name="latte_bridge",
    title="FrameBridgeLatte",
    adapter="framebridge_plugin.backbones.latte.adapter:LatteAdapter",
    pipeline="framebridge_plugin.backbones.latte.pipeline:FrameBridgeLattePipeline",
    parts={"transformer": "LatteTransformer", "vae": "AutoencoderKL", "scheduler": None},
    optional_parts={"neural_prior": "LatteTransformer"},
    clip_rule=rules.clip_rule,
    condition="class",
    schedulers=(
        *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
        *("DDIMScheduler", "DPMSolverMultistepScheduler"),
    ),
    defaults={
        "target": "eps_psi",
        "snr_aligned": False,
        "image_noise": False,
        "prior_noise": False,
        "ema_decay": 0.9999,
    },
    sampling={"num_inference_steps": 1000, "guidance_scale": 7.0, "grid": "linspace"},
    without_effect=_WITHOUT_EFFECT,
    config_problem=rules.config_problem,
    parts_problems=rules.parts_problems,
    known_classes=rules.known_classes,
    scratch_config=rules.scratch_config,
)
LATTE_NEURAL_PRIOR = dataclasses.replace(
    LATTE_BRIDGE,
    name="latte_neural_prior",
    adapter="framebridge_plugin.backbones.latte.adapter:NeuralPriorAdapter",
    parts={"neural_prior": "LatteTransformer", "vae": "AutoencoderKL"},
    optional_parts={},
    network="neural_prior",
    without_effect=_WITHOUT_EFFECT
    | {
        f"framebridge.{name}": _NO_BRIDGE
        for name in ("objective", "target", "snr_aligned", "alignment_edge", "beta_min", "beta_max", "neural_prior")
    },
)
