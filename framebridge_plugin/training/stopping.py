"""How the ranks of a run agree to stop, at the same update, whichever of them was told to."""

from __future__ import annotations

import signal
from typing import Any

import torch

from framebridge_plugin import signals


class StoppedReadingError(Exception):
    """All ranks have agreed to stop where clips are read, so that the update that they are for is not made."""


class Stopping:
    """Asks the other ranks, in exchanges that they all take part in, whether one of them was told to stop."""

    def __init__(self, world_size: int, device: torch.device) -> None:
        self._world_size, self._device = world_size, device
        self.number: int | None = None
        """The signal that all ranks know of."""

    def flags(self) -> torch.Tensor:
        """What a sum over all ranks is to be taken of, one number for each signal: see `take`."""
        return torch.tensor([float(number == signals.pending()) for number in signals.STOPPING], device=self._device)

    def take(self, totals: list[float]) -> None:
        """Takes the sum of all ranks' flags."""
        told = (number for number, total in zip(signals.STOPPING, totals, strict=True) if total)
        self.number = self.number or next(told, None)

    def agreed(self) -> bool:
        """Whether the run is to stop; an exchange of its own, that every rank has to call."""
        totals = self.flags()
        if self._world_size > 1:
            torch.distributed.all_reduce(totals)
        self.take(totals.tolist())
        return self.number is not None

    def mean_loss(self, loss: torch.Tensor) -> float:
        """The mean over all ranks, and in the same exchange whether to stop."""
        shared = torch.cat([loss.detach().float().reshape(1), self.flags()])
        if self._world_size > 1:
            torch.distributed.all_reduce(shared)
        total, *flags = shared.tolist()
        self.take(flags)
        return total / self._world_size

    def raise_if_stopped(self, step: int, where: Any) -> None:
        """Ends a run that was told to stop, whose last update is saved."""
        number = self.number or signals.pending()
        if number is not None:
            name = signal.Signals(number).name
            saved = f"after update {step}, which is saved in {where}" if step else "before the first update"
            raise signals.Interrupted(number, f"stopped by {name} {saved}; the same command goes on")
