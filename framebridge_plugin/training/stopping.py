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

    def mean(self, value: torch.Tensor) -> float:
        """The mean of a number over all ranks, which agree in the same exchange whether to stop."""
        told = [float(number == signals.pending()) for number in signals.STOPPING]
        shared = torch.cat([value.detach().float().reshape(1), torch.tensor(told, device=self._device)])
        if self._world_size > 1:
            torch.distributed.all_reduce(shared)
        total, *counts = shared.tolist()
        agreed = (number for number, count in zip(signals.STOPPING, counts, strict=True) if count)
        self.number = self.number or next(agreed, None)
        return total / self._world_size

    def agreed(self) -> bool:
        """Whether the run is to stop; an exchange of its own, that every rank has to call."""
        self.mean(torch.zeros((), device=self._device))
        return self.number is not None

    def raise_if_stopped(self, step: int, where: Any) -> None:
        """Ends a run that was told to stop, whose last update is saved."""
        number = self.number or signals.pending()
        if number is not None:
            name = signal.Signals(number).name
            saved = f"after update {step}, which is saved in {where}" if step else "before the first update"
            raise signals.Interrupted(number, f"stopped by {name} {saved}; the same command goes on")
