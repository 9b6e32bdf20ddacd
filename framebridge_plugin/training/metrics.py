"""Where the numbers of a run go: JSON lines and TensorBoard always, Weights & Biases by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from framebridge_plugin.training.abandoned import METRICS_FILE
from framebridge_plugin.training.validation import ValidationVideo


class MetricsLogger:
    """Writes metrics on the main process; on the others it does nothing.

    A resumed run goes on with the same files, which are only added to: lines of steps after the checkpoint were set
    aside. `settings` is Markdown for TensorBoard.
    """

    def __init__(self, output_dir: Path, *, enabled: bool, first_step: int = 0, settings: str = "") -> None:
        self.path = output_dir / METRICS_FILE
        self._enabled = enabled
        if not enabled:
            return
        self._file = self.path.open("a")
        self._tensorboard = SummaryWriter(output_dir / "tensorboard", purge_step=first_step + 1)
        if settings:
            self._tensorboard.add_text("settings", settings, first_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of one step."""
        if not self._enabled:
            return
        self._write(step, metrics)
        # One event for all of them, where add_scalar makes one of each.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._tensorboard._get_file_writer().add_summary(Summary(value=values), step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Writes what is no number."""
        if not self._enabled:
            return
        self._write(step, {name: text})
        self._tensorboard.add_text(name, text, step)

    def _write(self, step: int, values: Mapping[str, object]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def log_validation(self, step: int, written: Sequence[ValidationVideo]) -> None:
        """Writes the contact sheets of one validation, with their captions, for TensorBoard."""
        if not self._enabled:
            return
        for item in written:
            with Image.open(item.sheet) as sheet:
                self._tensorboard.add_image(
                    f"validation/{item.number:02d}", np.asarray(sheet), step, dataformats="HWC"
                )
            self._tensorboard.add_text(f"validation/{item.number:02d}/caption", item.caption, step)
        self._tensorboard.flush()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *error: object) -> None:
        if self._enabled:
            self._file.close()
            self._tensorboard.close()
