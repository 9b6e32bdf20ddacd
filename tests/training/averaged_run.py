"""A short run with an average of the weights, on several processes; each writes the average that it has."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from framebridge_plugin.backbones.tensor_files import whole_tensor
from framebridge_plugin.training import FrameBridgeTrainer
from tests.training.bridge_runs import make_trainer

OPTIONS = ("--parallel_backend=ptd", "--batch_size=1", "--train_steps=3", "--ema_decay=0.9")


class WithRankFiles(FrameBridgeTrainer):
    def _publish(self, checkpoint: Path) -> None:
        super()._publish(checkpoint)
        whole = {name: whole_tensor(tensor) for name, tensor in self.average.tensors.items()}
        save_file(whole, self._output_dir / f"rank{self.state.parallel_backend.rank}.safetensors")


def main(inputs: str, output: str, kind: str, *options: str) -> None:
    make_trainer(WithRankFiles, Path(inputs), Path(output), kind, *OPTIONS, *options).run()
