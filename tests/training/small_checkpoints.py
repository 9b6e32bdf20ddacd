"""A run without its data: a small network, a real optimizer and a real `Checkpointer`, in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.backbones.manifest import write_manifest
from framebridge_plugin.backbones.tensor_files import write_tensors
from framebridge_plugin.training.checkpoints import Checkpointer, TrainingState
from framebridge_plugin.training.ema import WeightAverage


class SmallRun:
    """Trains a network of two layers.

    Args:
        output_dir: The run's folder.
        ema: Whether it averages the weights.
        limit: Of its checkpoints.
        settings: What a resume compares.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        ema: bool = False,
        limit: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.average = WeightAverage(self.network, 0.5) if ema else None
        self.step, self.output_dir = 0, output_dir
        self.checkpointer = Checkpointer(
            root=output_dir / "checkpoints",
            model=self.network,
            optimizer=self.optimizer,
            export=self._export,
            trainable_only=False,
            limit=limit,
            settings=settings or {"seed": {"seed": 7}},
            average=self.average,
            network_name="transformer",
            is_main_process=True,
        )

    def _export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        network = folder / "model/transformer"
        network.mkdir(parents=True)
        (network / "config.json").write_text('{"_class_name": "Small"}')
        (folder / "model/model_index.json").write_text("{}")
        facts = write_tensors(network / "diffusion_pytorch_model.safetensors", weights)
        write_manifest(folder / "model", {"transformer/diffusion_pytorch_model.safetensors": facts})

    def train_to(self, step: int) -> SmallRun:
        """Makes updates, each with a line of metrics and a checkpoint."""
        while self.step < step:
            self.step += 1
            loss = self.network(torch.full((3, 4), float(self.step))).square().mean()
            loss.backward()
            self.checkpointer.mark_finite()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update(self.step)
            self.output_dir.mkdir(exist_ok=True)
            with (self.output_dir / "metrics.jsonl").open("a") as file:
                file.write(f'{{"step": {self.step}, "loss": {loss.item()!r}}}\n')
            self.checkpointer.save(TrainingState(self.step, 2 * self.step))
        return self

    def resume(self, which: int | str | None) -> int | None:
        """Resumes; returns the step, None for a start anew."""
        state = self.checkpointer.resume(which)
        self.step = 0 if state is None else state.step
        return None if state is None else state.step

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a resume restores."""
        found = {f"weights {name}": tensor.detach().clone() for name, tensor in self.network.named_parameters()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer {number} {name}": value.clone() for name, value in state.items()}
        if self.average is not None:
            found |= {f"average {name}": tensor.clone() for name, tensor in self.average.tensors.items()}
        return found

    def steps(self) -> set[int]:
        """The steps of the checkpoints that are there."""
        return {int(path.name.removeprefix("step_")) for path in (self.output_dir / "checkpoints").glob("step_*")}


def assert_equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
