"""A short run with an average of the weights, on several processes; each writes the average that it has.

Every sample has its noise, whichever rank it comes to, so that the run can be compared with one of a single process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from framebridge_plugin.training import CogVideoXBridgeSpecification, FrameBridgeTrainer
from framebridge_plugin.training.objective import draw_index
from tests.training.bridge_runs import make_trainer

OPTIONS = ("--parallel_backend=ptd", "--batch_size=1", "--train_steps=3", "--ema_decay=0.9")


class NoiseOfTheSample(CogVideoXBridgeSpecification):
    def prepare_latents(self, *, sample_seed: int, **kwargs: Any) -> dict[str, torch.Tensor]:
        seed = {"sample_seed": torch.tensor([sample_seed])}
        return super().prepare_latents(sample_seed=sample_seed, **kwargs) | seed

    def loss_terms(self, transformer: Any, scheduler: Any, conditions: Any, latents: Any, *draws: Any) -> Any:
        generator = torch.Generator().manual_seed(latents["sample_seed"].item())
        index = draw_index(scheduler, 1, generator)
        return super().loss_terms(transformer, scheduler, conditions, latents, index, generator)


class WithRankFiles(FrameBridgeTrainer):
    def _publish(self, checkpoint: Path, output_dir: Path) -> None:
        super()._publish(checkpoint, output_dir)
        save_file(self.average.gather(keep=True), output_dir / f"rank{self.state.parallel_backend.rank}.safetensors")


def main(inputs: str, output: str, kind: str, *options: str) -> None:
    settings = {"specification_class": NoiseOfTheSample}
    make_trainer(WithRankFiles, Path(inputs), Path(output), kind, *OPTIONS, *options, **settings).run()
