"""The pretrained model's own process: its scheduler, the bridge's alignment to it, and its own training loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch

from framebridge_plugin.bridge.alignment import (
    Alignment,
    FlowMatchingAlignment,
    NoAlignment,
    VariancePreservingAlignment,
)
from framebridge_plugin.bridge.schedule import (
    BridgeCoefficients,
    BridgeSchedule,
    Index,
    as_float64,
    broadcast,
    on_device,
    widen,
)
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.settings.choices import AlignmentName, is_flow_matching


def build_backbone(config: Mapping[str, Any] | None) -> Any:
    """Build the backbone's own diffusers scheduler from its config with "_class_name"; None for no backbone."""
    if config is None:
        return None
    name = config.get("_class_name")
    scheduler_class: Any = getattr(diffusers, str(name), None)
    if not hasattr(scheduler_class, "set_timesteps"):
        raise FrameBridgeError(
            f"backbone config: _class_name={name!r} is not a scheduler of diffusers {diffusers.__version__}; "
            "give the content of the model's scheduler/scheduler_config.json"
        )
    for name, setting in inspect.signature(scheduler_class.__init__).parameters.items():
        if isinstance(setting.default, int | float) and isinstance(config.get(name), str):
            raise FrameBridgeError(f"backbone config: {name} is {config[name]!r}; it should be a number")
    try:
        return scheduler_class.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise FrameBridgeError(f"backbone config: {error}; give the model's own scheduler_config.json") from error


def as_json(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Turn the numbers and arrays of a config into what JSON has."""
    if config is None:
        return None
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in config.items()}


def default_alignment(backbone: Any) -> AlignmentName:
    """Name the alignment to a backbone's scheduler; "none" for no backbone."""
    if backbone is None:
        return "none"
    return "flow_matching" if backbone_kind(backbone) == "flow_matching" else "variance_preserving"


def build_alignment(name: str, edge: str, schedule: BridgeSchedule, backbone: Any) -> Alignment:
    """Build the alignment of a bridge to a backbone's scheduler, if the backbone is of that kind."""
    if name == "none":
        return NoAlignment()
    found = None if backbone is None else backbone_kind(backbone)
    if name != found:
        what = "there is none" if backbone is None else f"not of a {type(backbone).__name__} for {found} processes"
        process = "diffusion" if name == "variance_preserving" else "flow-matching"
        raise FrameBridgeError(
            f"alignment={name!r} needs the config of the backbone's own {process} scheduler, {what}: "
            "use FrameBridgeScheduler.from_backbone, or alignment='none'"
        )
    if name == "flow_matching":
        return FlowMatchingAlignment(schedule, backbone.config.num_train_timesteps)
    return VariancePreservingAlignment(schedule, backbone.alphas_cumprod, edge)


def backbone_kind(backbone: Any) -> str:
    """Name the kind of process: "flow_matching", "variance_preserving", or "other", to which no bridge is aligned."""
    config = backbone.config
    if is_flow_matching({**config, "_class_name": type(backbone).__name__}):
        # Inverted, the noise falls while the time rises.
        return "other" if config.get("invert_sigmas") else "flow_matching"
    in_steps = hasattr(backbone, "alphas_cumprod") and config.get("timestep_type", "discrete") == "discrete"
    return "variance_preserving" if in_steps else "other"


def flow_sigmas(backbone: Any, index: Index) -> torch.Tensor:
    """Compute the noise levels at which a flow-matching backbone is trained, its scheduler's static shift included.

    With u = (index + 1) / N, sigma = shift u / (1 + (shift - 1) u): at integer indices diffusers' own table, upwards.
    A shift that depends on the resolution (`use_dynamic_shifting`) belongs to sampling and is left out, as there.

    Args:
        backbone: A diffusers scheduler for flow matching.
        index: Real-valued indices in [0, N - 1] with N = `num_train_timesteps`, a scalar or [B].

    Returns:
        sigma in (0, 1], rising with the index; float64, of the shape of `index`.
    """
    u = (as_float64(index) + 1) / backbone.config.num_train_timesteps
    shift = _static_shift(backbone)
    return shift * u / (1 + (shift - 1) * u)


def flow_index(backbone: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """Compute the real-valued indices of noise levels, the inverse of `flow_sigmas`, in [0, N - 1]."""
    shift = _static_shift(backbone)
    count = backbone.config.num_train_timesteps
    u = sigmas.double() / (shift - (shift - 1) * sigmas.double())
    return (count * u - 1).clamp(0, count - 1)


def backbone_at_ratio(backbone: Any, ratio: torch.Tensor) -> tuple[str, BridgeCoefficients, torch.Tensor]:
    """Find a backbone's own process at given ratios of signal to noise, as a bridge whose prior has no weight.

    Args:
        backbone: The backbone's own diffusers scheduler, of a kind whose own loss `backbone_loss_terms` knows.
        ratio: Ratios above 0, [B].

    Returns:
        (target, coefficients, network's time): the target by its name in `bridge.targets`; float64 coefficients [B];
        the time float32 [B]. That of a variance-preserving backbone is linear in the ratio between integer steps, as
        in SNR-aligned fine-tuning, and held at its first and last step.

    Raises:
        FrameBridgeError: The scheduler is of another kind.
    """
    kind, ratio = backbone_kind(backbone), as_float64(ratio)
    if kind == "flow_matching":
        c = 1 / (1 + ratio)
        target, a, time = "flow", 1 - c, backbone.config.num_train_timesteps * c
    elif kind == "variance_preserving":
        target = {"epsilon": "noise"}.get(backbone.config["prediction_type"], "v")
        a, c = ratio / (1 + ratio**2) ** 0.5, 1 / (1 + ratio**2) ** 0.5
        alphas = backbone.alphas_cumprod.to("cpu", torch.float64)
        known = (alphas / (1 - alphas)).sqrt().flip(0)
        steps = np.interp(ratio.cpu(), known, np.arange(len(known))[::-1])
        time = torch.from_numpy(steps)
    else:
        raise FrameBridgeError(f"the process of a {type(backbone).__name__} is of no known kind")
    return target, BridgeCoefficients(a=a, b=torch.zeros_like(a), c=c, sigma=c), time.to(torch.float32)


def _static_shift(backbone: Any) -> float:
    config = backbone.config
    return 1.0 if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift", 1.0))


def backbone_loss_terms(
    backbone: Any, z_0: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute what a backbone is shown and asked for in its own training, without a bridge.

    Flow matching: z = (1 - sigma) z_0 + sigma noise with `flow_sigmas`, time N sigma, target noise - z_0.
    Variance-preserving: z = alpha z_0 + sigma noise, time index, target noise or v = alpha noise - sigma z_0.

    Args:
        backbone: The backbone's own diffusers scheduler.
        z_0: Video latents [B, ...].
        noise: Standard normal noise, of the shape of `z_0`.
        index: Indices in [0, N - 1], [B]; the noise rises with them. Variance-preserving backbones have integer ones.

    Returns:
        (noisy latents, network's time, target): the latents of the shape and dtype of `z_0`, the time [B], float32
        for flow matching and int64 otherwise.

    Raises:
        FrameBridgeError: The scheduler is of another kind, or predicts something else.
    """
    kind, predicted = backbone_kind(backbone), backbone.config.get("prediction_type")
    wide, wide_noise = widen(z_0), widen(noise)
    if kind == "flow_matching" and predicted in (None, "flow_prediction"):
        sigmas = flow_sigmas(backbone, index)
        time = (backbone.config.num_train_timesteps * sigmas).to(torch.float32)
        sigma = broadcast(sigmas, z_0)
        noisy, target = (1 - sigma) * wide + sigma * wide_noise, wide_noise - wide
    elif kind == "variance_preserving" and predicted in ("epsilon", "v_prediction"):
        time = index.long()
        alpha_squared = broadcast(on_device(backbone.alphas_cumprod, time.device)[time], z_0)
        alpha, sigma = alpha_squared**0.5, (1 - alpha_squared) ** 0.5
        noisy = alpha * wide + sigma * wide_noise
        target = wide_noise if predicted == "epsilon" else alpha * wide_noise - sigma * wide
    else:
        raise FrameBridgeError(
            f"the own loss of a {type(backbone).__name__} for {kind} processes with prediction_type={predicted!r} is "
            "unknown: give the scheduler that the backbone was trained with"
        )
    return noisy.to(z_0.dtype), time.to(z_0.device), target.to(z_0.dtype)
