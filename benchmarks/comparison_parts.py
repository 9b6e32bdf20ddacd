"""The arms of benchmarks/bridge_vs_diffusion.py: what each adds to the recipe of its part, and how it is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SEEDS = (42, 43, 44)
CALLS = (2, 4, 8, 20, 50)
"""All divide 1000: CogVideoX's DDIM takes wrong steps where they do not."""
CLAMP = 3.0
"""Of z_0, whose standard deviation an autoencoder's scaling factor makes 1."""

OF_BRIDGE: Mapping[str, dict[str, Any]] = {
    "sde": {"sampler": "sde", "order": 1, "eta": None},
    "dbim 2": {"sampler": "dbim", "order": 2, "eta": None, "grid": "lambda"},
    "dbim 2, eta .5": {"sampler": "dbim", "order": 2, "eta": 0.5, "grid": "lambda"},
}
OF_DIFFUSION: Mapping[str, dict[str, Any]] = {
    "ddim": {"class": "CogVideoXDDIMScheduler"},
    "ddim, z_0 clamped": {"class": "DDIMScheduler", "clip_sample": True, "clip_sample_range": CLAMP},
    "dpm 2": {"class": "DPMSolverMultistepScheduler"},
}
OF_TEXT_DIFFUSION = {"ddim": OF_DIFFUSION["ddim"], "dpm 2": {"class": "CogVideoXDPMScheduler"}}
OF_FLOW = {"euler": {"class": "FlowMatchEulerDiscreteScheduler"}}


@dataclass(frozen=True)
class Arm:
    """What an arm adds to the recipe of its part, and how its model is sampled; without samplers, in one call."""

    overrides: Sequence[str] = ()
    samplers: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    after: str | None = None
    """The arm of the same seed whose run `{after}` in the overrides stands for."""
    is_trained: bool = True


@dataclass(frozen=True)
class Part:
    """The arms that have everything else in common."""

    recipe: str
    arms: Mapping[str, Arm]
    heldout: Mapping[str, Any]
    rates: Sequence[float]
    updates: int
    clips: int = 60
    seeds: Sequence[int] = SEEDS
    calls: Sequence[int] = CALLS
    checkpoints: int = 4
    variants: int = 1
    """Windows of each clip that are encoded."""
    overrides: Sequence[str] = ()


TWIN, BRIDGE = "framebridge.objective=diffusion", "framebridge.objective=bridge"
FULL, LORA = "training.training_type=full-finetune", "training.training_type=lora"
STILL = {"image repeated": Arm(is_trained=False)}


def of_text(twin: Mapping[str, dict[str, Any]]) -> dict[str, Arm]:
    """The arms of a pretrained text-to-video model."""
    saf, plain = "framebridge.snr_aligned=true", "framebridge.snr_aligned=false"
    arms = {}
    for name, kind in (("full", FULL), ("LoRA", LORA)):
        arms[f"diffusion, {name}"] = Arm((TWIN, kind), twin)
        arms[f"bridge without SAF, {name}"] = Arm((BRIDGE, plain, kind), OF_BRIDGE)
        arms[f"bridge with SAF, {name}"] = Arm((BRIDGE, saf, kind), OF_BRIDGE)
    return arms | STILL


LATTE_ARMS = {
    "diffusion": Arm((TWIN, "framebridge.target=noise"), OF_DIFFUSION),
    "diffusion, v": Arm((TWIN, "framebridge.target=v"), OF_DIFFUSION),
    "bridge": Arm((BRIDGE, "framebridge.target=eps_psi"), OF_BRIDGE),
    "bridge, v": Arm((BRIDGE, "framebridge.target=v"), OF_BRIDGE),
    "neural prior": Arm(("model.model_name=latte_neural_prior", "framebridge.target=null")),
    "bridge on a neural prior, v": Arm(
        (BRIDGE, "framebridge.target=v", "framebridge.neural_prior={after}"), OF_BRIDGE, after="neural prior"
    ),
    **STILL,
}
CHOICES = {
    "v": ("framebridge.target=v",),
    "eps_psi": ("framebridge.target=eps_psi",),
    "data": ("framebridge.target=data",),
    "v, unit Brownian": ("framebridge.target=v", "framebridge.beta_min=1", "framebridge.beta_max=1"),
    "v, variance 4": ("framebridge.target=v", "framebridge.beta_min=4", "framebridge.beta_max=4"),
}
PARTS = {
    "latte": Part(
        "recipes/doom_bridge.yaml",
        LATTE_ARMS,
        {"class_root": "doom-data/clips", "split": "test"},
        rates=(5e-4, 1e-3, 2e-3),
        updates=2000,
    ),
    "choices": Part(
        "recipes/doom_bridge.yaml",
        {
            name: Arm((BRIDGE, *overrides), {**OF_BRIDGE, "sde, clean prior": {"start": "clean_prior"}})
            for name, overrides in CHOICES.items()
        },
        {"class_root": "doom-data/clips", "split": "test"},
        rates=(5e-4, 1e-3, 2e-3),
        updates=2000,
    ),
    "text": Part(
        "recipes/quickstart.yaml",
        of_text(OF_TEXT_DIFFUSION),
        {"data_root": "quickstart-data/heldout"},
        rates=(1e-3, 2e-3, 4e-3),
        updates=400,
        variants=14,
        overrides=("validation.validation_dataset_file=null", "dataset=null"),
    ),
    "flow": Part(
        "recipes/wan_bridge.yaml",
        of_text(OF_FLOW),
        {"data_root": "quickstart-data/heldout"},
        rates=(1e-4, 3e-4, 1e-3),
        updates=400,
        variants=14,
        overrides=("validation.validation_dataset_file=null",),
    ),
}
