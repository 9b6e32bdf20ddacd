"""Short runs as finetrainers' own trainer tests make them: arguments filled in by hand, a specification without any.

Also a program for torchrun, which makes several runs in the same processes: each is given by the name of a
specification below, the folder of its model, a folder for the run, and arguments.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framebridge_plugin import register
from tests.tiny_models import write_video
from tests.training.two_processes import runs_on_their_ports

register()

from finetrainers import BaseArgs, SFTTrainer  # noqa: E402

from framebridge_plugin.training import (  # noqa: E402
    CogVideoXBridgeSpecification,
    LatteBridgeSpecification,
    NeuralPriorSpecification,
)

CLIPS, FRAMES, SIZE, STEPS = 4, 4, 64, 10
LORA = {"training_type": "lora", "rank": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
FULL = {"training_type": "full-finetune"}


class FixedCogVideoX(CogVideoXBridgeSpecification):
    folder: Path

    def __init__(self) -> None:
        super().__init__(str(self.folder))


class FixedLatte(LatteBridgeSpecification):
    folder: Path

    def __init__(self) -> None:
        super().__init__(str(self.folder))


class FixedNeuralPrior(NeuralPriorSpecification):
    folder: Path

    def __init__(self) -> None:
        super().__init__(str(self.folder))


def write_black_clips(folder: Path) -> Path:
    """Writes the clips with their captions, and the dataset config that names them; returns the latter."""
    black_FHWC = np.zeros((FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    for number in range(CLIPS):
        write_video(folder / f"{number}.mp4", black_FHWC, fps=2)
    with open(folder / "metadata.csv", "w", newline="") as file:
        rows = [(f"{number}.mp4", f"a cat looks out of window {number}") for number in range(CLIPS)]
        csv.writer(file).writerows([("file_name", "caption"), *rows])
    dataset = {
        "data_root": str(folder),
        "dataset_type": "video",
        "id_token": "TEST",
        "video_resolution_buckets": [[FRAMES, SIZE, SIZE]],
        "reshape_mode": "bicubic",
    }
    config = folder / "dataset_config.json"
    config.write_text(json.dumps({"datasets": [dataset]}))
    return config


def run(specification_class: Any, folder: Path, **values: Any) -> dict[str, Any]:
    """Makes one run in a folder of its own, where data and results lie side by side.

    Args:
        specification_class: Its constructor takes no arguments.
        folder: An existing folder, the same on all processes.
        **values: finetrainers' arguments.

    Returns:
        "losses", and "saved": the files below the run's folders of weights.
    """
    args = BaseArgs()
    common = {
        "dataset_config": str(folder / "dataset_config.json"),
        "output_dir": str(folder),
        "precomputation_dir": str(folder / "precomputed"),
        "precomputation_items": CLIPS,
        "train_steps": STEPS,
        "max_data_samples": 25,
        "checkpointing_steps": 6,
        "gradient_checkpointing": True,
    }
    for name, value in {**common, **values}.items():
        setattr(args, name, value)
    trainer = SFTTrainer(args, specification_class())
    trainer.run()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    saved = [path.relative_to(folder).parts for path in folder.glob("*_weights/*/**/*.safetensors")]
    return {"losses": trainer.state.train_state.global_avg_losses, "saved": sorted({parts[1] for parts in saved})}


def main() -> None:
    results = []
    for name, model, folder, values in runs_on_their_ports():
        specification_class = globals()[name]
        specification_class.folder = Path(model)
        results.append(run(specification_class, Path(folder), **values))
    if os.environ["RANK"] == "0":
        print(json.dumps(results))


if __name__ == "__main__":
    main()
