"""Latte specifications on tiny models, as the tests use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE
from framebridge_plugin.settings.bridge import ObjectiveSettings
from framebridge_plugin.training import LatteBridgeSpecification, NeuralPriorSpecification
from tests.tiny_models import CLASS_NAMES

FRAMES, SIZE, LATENT_SIZE = 4, 64, 16
CLIP_SHAPE = (FRAMES, SIZE, SIZE)


def specification_class(kind: str) -> Any:
    """The specification that trains a model of one of `LATTE_KINDS`."""
    return NeuralPriorSpecification if kind == "neural_prior" else LatteBridgeSpecification


def latte_objective(kind: str, **given: Any) -> ObjectiveSettings:
    """The objective of a model of one of `LATTE_KINDS`, with Latte's defaults."""
    values = {name: value for name, value in LATTE_BRIDGE.defaults.items() if name in ObjectiveSettings.model_fields}
    values |= {"objective": "diffusion"} if kind == "diffusion" else {}
    return ObjectiveSettings(**{**values, **given})


def make_latte_specification(kind: str, model: Path | str = "", **kwargs: Any) -> Any:
    """A specification in float32; keywords that are fields of the objective replace those of the default one."""
    cls = specification_class(kind)
    objective = {name: kwargs.pop(name) for name in ObjectiveSettings.model_fields.keys() & kwargs.keys()}
    precision = {"transformer_dtype": torch.float32, "vae_dtype": torch.float32}
    return cls(str(model), objective=latte_objective(kind, **objective), **{**precision, **kwargs})


def make_from_scratch(kind: str, models: Path, **kwargs: Any) -> Any:
    """A specification of a network from scratch for the tests' clips and classes; `models` holds `bridge/vae`."""
    settings = {"clip_shape": CLIP_SHAPE, "class_names": CLASS_NAMES, "vae_id": str(models / "bridge/vae"), **kwargs}
    return make_latte_specification(kind, **settings)


def make_latte_batch(size: int = 2) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Conditions and latents as the trainers collate them; the labels are 0, 1, ... of four classes, the last none."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(size, FRAMES, 4, LATENT_SIZE, LATENT_SIZE, generator=generator)
    labels = [*range(size - 1), 4]
    return {"class_labels": labels}, {"latents": latents, "image_latents": latents[:, :1].clone()}


def finetrainers_loss(
    scheduler: Any, prediction: torch.Tensor, target: torch.Tensor, sigmas: torch.Tensor
) -> torch.Tensor:
    """The loss of finetrainers' training loop, one value for each sample."""
    from finetrainers import utils

    alphas = utils.get_scheduler_alphas(scheduler)
    timesteps = (sigmas.flatten() * 1000.0).long()
    weights = utils.prepare_loss_weights(
        scheduler=scheduler, alphas=alphas[timesteps] if alphas is not None else None, sigmas=sigmas
    )
    return weights.flatten().float() * (prediction - target).square().flatten(1).mean(dim=1)
