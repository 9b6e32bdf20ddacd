"""What the network is shown instead of z_t and its index (SNR-aligned fine-tuning, FrameBridge, arXiv 2410.15371).

y = z_t - b z_T = a z_0 + c eps is a sample of an ordinary Gaussian path with signal a and noise c. A pretrained
network knows it, up to a scale, at the one time of its own whose signal-to-noise ratio is a / c.

The sampler always runs in z_t; only the network's input and its time are aligned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, get_args

import torch

from framebridge_plugin.bridge.schedule import (
    BridgeSchedule,
    Index,
    as_float64,
    broadcast,
    on_device,
    subtract_prior,
)
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.settings.choices import AlignmentEdge

EDGES = get_args(AlignmentEdge)


class Alignment(Protocol):
    """The interface of every alignment."""

    def latent(self, z_t: torch.Tensor, z_T: torch.Tensor, index: Index) -> torch.Tensor:
        """Compute the network's latent input of z_t at the index, a scalar or [B]; shape and dtype of `z_t`."""
        ...

    def timestep(self, index: Index) -> torch.Tensor:
        """Compute the network's time, of the shape of `index`; float32, as bfloat16 would turn 965.7 into 964."""
        ...


@dataclass(frozen=True)
class NoAlignment(Alignment):
    """Show the network z_t and its index as they are, for networks trained from scratch."""

    def latent(self, z_t: torch.Tensor, z_T: torch.Tensor, index: Index) -> torch.Tensor:
        """Return `z_t` itself."""
        return z_t

    def timestep(self, index: Index) -> torch.Tensor:
        """Return the index in float32."""
        return as_float64(index).to(torch.float32)


@dataclass(frozen=True, eq=False)
class VariancePreservingAlignment(Alignment):
    """Alignment to a backbone that knows x_k = alpha_k x_0 + s_k eps with alpha_k^2 + s_k^2 = 1 (CogVideoX).

    The latent is (z_t - b z_T) / sqrt(a^2 + c^2). The time is the fractional step at which the backbone's ratio
    alpha / s, taken linear between integer steps, equals a / c.

    Attributes:
        schedule: The bridge.
        alphas_cumprod: alpha_k^2 of the backbone's K steps, [K], strictly decreasing, in [0, 1).
        edge: What to do near and above the backbone's highest ratio. "exact" matches ratios up to that of step 0 and
            holds the time there beyond it. "reference" takes one line from step 1 on, as the authors' release does:
            no match of ratios, and needed only for checkpoints trained that way. Both hold the last step where the
            bridge's ratio is below the backbone's lowest.
    """

    schedule: BridgeSchedule
    alphas_cumprod: torch.Tensor
    edge: str = "exact"

    def __post_init__(self) -> None:
        if self.edge not in EDGES:
            raise FrameBridgeError(f"unknown alignment_edge {self.edge!r}: choose one of {', '.join(EDGES)}")
        alphas = self.alphas_cumprod
        if alphas.ndim != 1 or len(alphas) < 2 or not (alphas.diff() < 0).all() or alphas[0] >= 1 or alphas[-1] < 0:
            raise FrameBridgeError(
                "alignment: the backbone's alphas_cumprod must be a strictly decreasing table within [0, 1); "
                "is this a variance-preserving diffusion backbone?"
            )

    @cached_property
    def ratios(self) -> torch.Tensor:
        """The backbone's alpha / s at its integer steps, float64 [K], strictly decreasing."""
        alphas_cumprod = self.alphas_cumprod.to("cpu", torch.float64)
        return torch.sqrt(alphas_cumprod / (1 - alphas_cumprod))

    def latent(self, z_t: torch.Tensor, z_T: torch.Tensor, index: Index) -> torch.Tensor:
        """Compute (z_t - b z_T) / sqrt(a^2 + c^2)."""
        k = self.schedule.coefficients(index)
        return (subtract_prior(z_t, z_T, k) / broadcast(k.norm, z_t)).to(z_t.dtype)

    def timestep(self, index: Index) -> torch.Tensor:
        """Compute the fractional diffusion step of the same signal-to-noise ratio, in [0, K - 1]."""
        ratio = self.schedule.coefficients(index).ratio
        ratios = on_device(self.ratios, ratio.device)
        # searchsorted wants an ascending table; `right` is the first step whose ratio is not above the wanted one.
        right = torch.searchsorted(-ratios, -ratio).clamp(1, len(ratios) - 1)
        time = right - (ratio - ratios[right]) / (ratios[right - 1] - ratios[right])
        if self.edge == "reference":
            highest = ratios[0] + self.schedule.coefficients(0).ratio
            time = torch.where(ratio > ratios[1], 1 - (ratio - ratios[1]) / (highest - ratios[1]), time)
        return time.clamp(0, len(ratios) - 1).to(torch.float32)


@dataclass(frozen=True)
class FlowMatchingAlignment(Alignment):
    """Alignment to a backbone that knows x_tau = (1 - tau) x_0 + tau eps (Wan, LTX, Hunyuan).

    The latent is (z_t - b z_T) / (a + c) and the noise level tau = c / (a + c), in (0, 1). There the backbone's
    velocity eps - x_0 is the target "flow". The `shift` of a backbone's scheduler moves the levels that it samples
    at, not the time that belongs to a level: it plays no part here.

    Attributes:
        schedule: The bridge.
        time_scale: The time that the backbone counts up to, which is its scheduler's `num_train_timesteps`: 1000 for
            Wan and LTX. By default 1, where the time is tau itself; `FrameBridgeScheduler` takes the backbone's.
    """

    schedule: BridgeSchedule
    time_scale: float = 1

    def latent(self, z_t: torch.Tensor, z_T: torch.Tensor, index: Index) -> torch.Tensor:
        """Compute (z_t - b z_T) / (a + c)."""
        k = self.schedule.coefficients(index)
        return (subtract_prior(z_t, z_T, k) / broadcast(k.a + k.c, z_t)).to(z_t.dtype)

    def timestep(self, index: Index) -> torch.Tensor:
        """Compute time_scale tau, a real number."""
        return (self.time_scale * self.schedule.coefficients(index).tau).to(torch.float32)
