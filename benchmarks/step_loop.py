"""What the training loop costs besides the forward and backward passes that it is there for."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from random_models import make_trainer, write_run
from step_measures import clock

from framebridge_plugin.training import FrameBridgeTrainer

SKIPPED = 3
"""Updates of each that are not counted."""


def measure_loop(clip: tuple[int, int, int], changes: Any, updates: int) -> dict[str, Any]:
    """Trains a CogVideoX by `FrameBridgeTrainer`, and a copy of it by a bare loop, an update of each in turn.

    Reading and encoding the clips counts for neither. The bare loop draws index and noise, calls the same
    `loss_terms`, goes back, clips, steps, and reads its loss; ours also guards, logs and can be resumed and stopped.

    Returns:
        Medians of milliseconds, and of the ratio of neighbours.
    """
    with tempfile.TemporaryDirectory(prefix="train-loop-") as folder:
        said = (
            "training.batch_size=1",
            "training.gradient_checkpointing=false",
            f"optimization.train_steps={updates}",
        )
        recipe = write_run("cogvideox_bridge", Path(folder), clip, changes, *said)
        trainer = make_trainer(recipe, Path(folder), _TimedTrainer)
        trainer.run()
    ours, bare = (times[SKIPPED:] for times in (trainer.turns.ours, trainer.turns.bare))
    return {
        "updates": len(bare),
        "ours_ms": round(1e3 * statistics.median(ours), 2),
        "bare_ms": round(1e3 * statistics.median(bare), 2),
        "ratio": round(statistics.median(own / other for own, other in zip(ours, bare, strict=False)), 3),
    }


class _TimedTrainer(FrameBridgeTrainer):
    """Trains a copy of its network between its own updates."""

    def _batches(self) -> Any:
        self.turns = _Turns(super()._batches(), self)
        return self.turns


class _Turns(Iterator):
    """The trainer's batches. Its update lasts from when it is given one until it asks for the next."""

    def __init__(self, batches: Any, trainer: FrameBridgeTrainer) -> None:
        self._batches, self._trainer = batches, trainer
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._began: float | None = None
        self._network = copy.deepcopy(trainer.transformer)
        self._parameters = [p for p in self._network.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-5, fused=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __next__(self) -> Any:
        device = self._trainer.state.parallel_backend.device
        if self._began is not None:
            self.ours.append(clock(device) - self._began)
        batch = next(self._batches)
        began = clock(device)
        self._update(batch, device)
        self._began = clock(device)
        self.bare.append(self._began - began)
        return batch

    def _update(self, batch: Any, device: torch.device) -> float:
        trainer, (conditions, latents) = self._trainer, batch
        size = len(latents["latents"])
        index = torch.randint(trainer.scheduler.config.num_train_timesteps, (size,), device=device)
        prediction, target = trainer.model_specification.loss_terms(
            self._network, trainer.scheduler, conditions, latents, index
        )
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()
