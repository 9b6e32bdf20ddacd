"""The bridge as a process with its alignment: what `FrameBridgeScheduler` does without a grid of times."""

from __future__ import annotations

from typing import Any

import torch

from framebridge_plugin.bridge.alignment import Alignment, NoAlignment
from framebridge_plugin.bridge.schedule import BridgeSchedule, Index
from framebridge_plugin.bridge.targets import compute_target, sample_bridge
from framebridge_plugin.errors import FrameBridgeError


def times_of_batch(time: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """A time, [] or [B], for each sample of a batch [B, ...] and on its device, without a wait if it is on the CPU."""
    if time.ndim == 0 and time.device.type == "cpu":
        return torch.full((len(batch),), time.item(), dtype=time.dtype, device=batch.device)
    return time.to(batch.device).expand(len(batch))


class BridgeProcess:
    """The methods of `FrameBridgeScheduler` that do not depend on a grid of times.

    Attributes:
        schedule: The bridge.
        alignment: What the network is shown instead of z_t and its index.
        config: The scheduler's settings, "target" among them.
    """

    schedule: BridgeSchedule
    alignment: Alignment
    config: Any
    _prior: torch.Tensor | None = None

    def add_noise(self, z_0: torch.Tensor, prior: torch.Tensor, noise: torch.Tensor, index: Index) -> torch.Tensor:
        """Draw from the bridge, z_t = a z_0 + b prior + c noise, of the shape and dtype of `z_0`: video latents z_0,
        prior latents z_T and standard normal noise, all [B, ...], at real-valued indices in [0, N - 1], a scalar or
        [B].
        """
        return sample_bridge(z_0, prior, noise, self.schedule.coefficients(index))

    def align(self, z_t: torch.Tensor, prior: torch.Tensor | None, index: Index) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what the network is shown instead of z_t [B, ...] and its index, real-valued, a scalar or [B]: a
        latent input of the shape and dtype of `z_t` and a time, float32 [B]; a prior of None is that of `set_prior`.
        """
        time = times_of_batch(self.alignment.timestep(index), z_t)
        if not isinstance(self.alignment, NoAlignment):
            z_t = self.alignment.latent(z_t, self._prior_of(z_t, prior), index)
        return z_t, time

    def get_target(
        self, z_0: torch.Tensor, z_t: torch.Tensor, prior: torch.Tensor, noise: torch.Tensor, index: Index
    ) -> torch.Tensor:
        """Compute what the network is trained to return, of the shape and dtype of `z_0`: `z_t` is what `add_noise`
        made of the other three, all [B, ...], at the index, real-valued, a scalar or [B].
        """
        return compute_target(self.config["target"], z_0, z_t, prior, noise, self.schedule.coefficients(index))

    def set_prior(self, prior: torch.Tensor | None) -> None:
        """Set the end point z_T [B, ...] of the bridge once for the calls that are given none; None forgets it."""
        self._prior = prior

    def scale_model_input(self, sample: torch.Tensor, timestep: Index) -> torch.Tensor:
        """Compute the network's latent input, of the shape and dtype of `sample`, with the prior of `set_prior`; its
        time is `alignment.timestep`. The sample is [B, ...], or [k B, ...] for the prior's B, as guidance doubles it.
        """
        return self.align(sample, None, timestep)[0]

    def _prior_of(self, sample: torch.Tensor, prior: torch.Tensor | None) -> torch.Tensor:
        """The prior given, or else the one set, repeated for a batch that guidance has doubled."""
        if prior is not None:
            return prior
        if self._prior is None:
            raise FrameBridgeError(
                "FrameBridgeScheduler: a bridge has an end point; call set_prior, or give the prior"
            )
        copies = max(1, len(sample) // len(self._prior))
        repeated = torch.cat([self._prior] * copies).to(sample.device)
        if repeated.shape != sample.shape:
            raise FrameBridgeError(
                f"FrameBridgeScheduler: the prior has the shape {list(self._prior.shape)}, the latents "
                f"{list(sample.shape)}; set the prior of these latents"
            )
        return repeated
