"""The training objective: what the network is shown, and what its output is compared with.

Layouts: B batch, T latent frames, C channels, H and W height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from framebridge_plugin.backbones.adapter import Network
from framebridge_plugin.bridge.targets import predict_z_0, sample_bridge
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.schedulers.backbone import backbone_at_ratio, backbone_kind, backbone_loss_terms, flow_index
from framebridge_plugin.settings.bridge import ObjectiveSettings


def build_scheduler(backbone: Any, settings: ObjectiveSettings, grid: str = "trailing") -> Any:
    """The scheduler that a model is trained with and saved with.

    Args:
        backbone: The pretrained model's own scheduler.
        settings: The objective.
        grid: The times that the saved model is sampled at by default, see `FrameBridgeScheduler`.

    Returns:
        A `FrameBridgeScheduler` over the backbone, or the backbone itself for the diffusion baseline.
    """
    if settings.objective == "diffusion":
        return backbone
    return FrameBridgeScheduler.from_backbone(
        backbone,
        beta_min=settings.beta_min,
        beta_max=settings.beta_max,
        target=settings.target,
        alignment=None if settings.snr_aligned else "none",
        alignment_edge=settings.alignment_edge,
        grid=grid,
    )


def draw_index(scheduler: Any, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Uniform indices of the objective's scheduler, int64 [B], each from a generator of its own, drawn as finetrainers
    draws them.
    """
    count = scheduler.config.num_train_timesteps
    if isinstance(scheduler, FrameBridgeScheduler):
        return torch.cat([torch.randint(count, (1,), generator=g, device=g.device) for g in generators])
    shares = torch.cat([torch.rand(1, generator=g, device=g.device) for g in generators])
    return count - 1 - (count * shares).long()  # the schedulers' own lists begin with the last index


def bridge_prediction(
    network: Network,
    scheduler: FrameBridgeScheduler,
    z_0: torch.Tensor,
    prior: torch.Tensor,
    noise: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's output and the target of the bridge loss, whose mean squared difference is minimised.

    FrameBridge (arXiv 2410.15371): z_t = a z_0 + b z_T + c eps; the network sees the aligned z_t and the aligned time.

    Args:
        network: The network with everything but latents and time bound.
        scheduler: Bridge, alignment and target.
        z_0: Latents of the video, [B, T, C, H, W].
        prior: End point z_T of the bridge, [B, T, C, H, W].
        noise: eps, standard normal, [B, T, C, H, W].
        index: Real-valued bridge indices in [0, N - 1], [B].

    Returns:
        (prediction, target), both [B, T, C, H, W].
    """
    z_t = scheduler.add_noise(z_0, prior, noise, index)
    prediction = network(*scheduler.align(z_t, prior, index))
    return prediction, scheduler.get_target(z_0, z_t, prior, noise, index)


def diffusion_prediction(
    network: Network, backbone: Any, z_0: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the diffusion baseline, whose loss is the backbone's own: see `backbone_loss_terms`."""
    noisy, time, target = backbone_loss_terms(backbone, z_0, noise, index)
    return network(noisy, time), target


def video_prediction(
    network: Network, scheduler: Any, z_0: torch.Tensor, prior: torch.Tensor, noise: torch.Tensor, ratio: torch.Tensor
) -> torch.Tensor:
    """The network's prediction of z_0, of its shape, where the weights of z_0 and noise have given ratios, [B].

    The arguments are those of `bridge_prediction`, with the scheduler of a bridge or of the diffusion baseline, which
    sees nothing of the prior.
    """
    if isinstance(scheduler, FrameBridgeScheduler):
        index = scheduler.schedule.index_of_ratio(ratio)
        target, k = scheduler.config.target, scheduler.schedule.coefficients(index)
        z_t = sample_bridge(z_0, prior, noise, k)
        output = network(*scheduler.align(z_t, prior, index))
    else:
        target, k, time = backbone_at_ratio(scheduler, ratio)
        z_t = sample_bridge(z_0, prior, noise, k)
        output = network(z_t, time.to(z_t.device))
    return predict_z_0(target, output, z_t, prior, k)


def finetrainers_terms(
    scheduler: Any, sigmas: torch.Tensor, terms: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction and target as finetrainers' loop weighs them, and the sigmas [B] that it looks its weights up with.

    `sigmas` are what it drew, of B elements: index / N, or the noise levels of a flow-matching baseline.
    """
    count = scheduler.config.num_train_timesteps
    sigmas = sigmas.flatten().double()
    if not isinstance(scheduler, FrameBridgeScheduler) and backbone_kind(scheduler) == "flow_matching":
        # Its weights are 1; its levels are those of the scheduler's own shift.
        prediction, target = terms(flow_index(scheduler, sigmas))
        return prediction, target, sigmas.float()
    index = (sigmas * count).round().clamp(0, count - 1)
    prediction, target = terms(index)
    if not isinstance(scheduler, FrameBridgeScheduler):
        # finetrainers multiplies the squared difference with 1 / (1 - alphas_cumprod): the product is the plain one.
        alphas = scheduler.alphas_cumprod.to(prediction.device)[index.long()]
        scale = (1.0 - alphas).sqrt().to(prediction.dtype).view(-1, *[1] * (prediction.ndim - 1))
        prediction, target = scale * prediction, scale * target
    # It truncates sigma * 1000 to find the weight: half a step keeps it on this index.
    return prediction, target, ((index + 0.5) / count).float()
