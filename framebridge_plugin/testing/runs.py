"""Runs of finetrainers' own SFTTrainer: five steps, and what it saved at the end against what it had trained."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.testing.checks import differing_tensors
from framebridge_plugin.testing.outcome import Check, require
from framebridge_plugin.testing.saving import RANK, check_saved_lora, check_saved_model, plain_state_dict
from framebridge_plugin.testing.subject import SEED, Subject

STEPS = 5
_STEPS_BETWEEN = 3  # saving and validation: once on the way, and at the end
_TRAINING_TYPES = {"lora": "lora", "full": "full-finetune"}
_SAVED = {"lora": "lora_weights", "full": "model_weights"}


def check_run(subject: Subject, kind: str, backend: str, precomputed: bool) -> None:
    """What the stock trainer saved after five steps, with gradient checkpointing, is what was trained."""
    folder, specification = subject.new_folder("run"), subject.specification()
    args = _arguments(subject, folder, kind, backend, precomputed)
    network, scheduler, losses = _train(specification, args)

    require(len(losses) == STEPS, f"the run ended after {len(losses)} of {STEPS} steps")
    require(all(map(math.isfinite, losses)), f"a loss is not finite: {losses}")
    wrapped = any("_checkpoint_wrapped_module" in name for name, _ in network.named_modules())
    blocks = "transformer_blocks, blocks or layers"
    require(wrapped, f"gradient checkpointing does nothing: finetrainers finds blocks by the names {blocks}")
    for stage in ("validation", "final"):
        # validation-STEP-RANK-NUMBER-...: numbers 0 and 1 are the image and the video of the row, written again.
        numbers = {int(path.name.split("-")[3]) for path in folder.glob(f"{stage}-*-*-*-*")}
        require(numbers - {0, 1}, f"no {stage} sample was written")

    saved = folder / _SAVED[kind] / f"{STEPS:06d}"
    require(saved.is_dir(), f"nothing was saved in {_SAVED[kind]} after the last step")
    trained = plain_state_dict(network)
    if kind == "lora":
        check_saved_lora(subject, specification, network, scheduler, saved)
        return
    before = subject.specification().load_diffusion_models()["transformer"].state_dict()
    require(differing_tensors(before, trained), "training changed no weight")
    check_saved_model(specification, network, trained, saved)


def _arguments(subject: Subject, folder: Path, kind: str, backend: str, precomputed: bool) -> Any:
    """finetrainers' arguments, filled in as a program does that parses none."""
    from finetrainers import BaseArgs

    args = BaseArgs()
    values: dict[str, Any] = {
        "model_name": subject.model_name,
        "parallel_backend": backend,
        "training_type": _TRAINING_TYPES[kind],
        "dataset_config": str(_write_dataset_config(folder, subject)),
        "output_dir": str(folder),
        "train_steps": STEPS,
        "batch_size": 1,
        "seed": SEED,
        "gradient_checkpointing": True,
        "checkpointing_steps": _STEPS_BETWEEN,
        "validation_dataset_file": str(_write_validation_file(folder, subject)),
        "validation_steps": _STEPS_BETWEEN,
        "enable_precomputation": precomputed,
        "precomputation_items": 4,
        "precomputation_dir": str(folder / "precomputed"),
        "lr": 1e-2 if kind == "lora" else 1e-3,
        "lr_scheduler": "constant",
        "report_to": "none",
        "verbose": 0,
        **dict.fromkeys(("text_encoder_dtype", "transformer_dtype", "vae_dtype"), torch.float32),
    }
    if kind == "lora":
        values |= {"rank": RANK, "lora_alpha": RANK, "target_modules": subject.target_modules}
    for name, value in values.items():
        setattr(args, name, value)
    return args


def _write_dataset_config(folder: Path, subject: Subject) -> Path:
    config = {"data_root": str(subject.dataset), "dataset_type": subject.dataset_type, **subject.dataset_options}
    path = folder / "dataset.json"
    path.write_text(json.dumps({"datasets": [config]}))
    return path


def _write_validation_file(folder: Path, subject: Subject) -> Path:
    """One row: a video goes with it, whose first frame an image-to-video model can take."""
    frames, height, width = subject.clip_shape
    row = {"caption": subject.captions[0], "num_inference_steps": 2, "height": height, "width": width}
    if not subject.is_image_model:
        row |= {"num_frames": frames, "video_path": subject.dataset / "0.mp4"}
    path = folder / "validation.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    return path


def _train(specification: Any, args: Any) -> tuple[Any, Any, list[float]]:
    """Runs the stock trainer; returns the network as it was trained, its scheduler and the losses."""
    from finetrainers import SFTTrainer

    class Trainer(SFTTrainer):
        def _validate(self, step: int, final_validation: bool = False) -> None:
            if final_validation:
                # The trainer drops it next, and loads it again from what was saved.
                self.trained = self.transformer, self.scheduler
            super()._validate(step, final_validation)

    trainer = Trainer(args, specification)
    trainer.run()
    network, scheduler = trainer.trained
    return network.to("cpu"), scheduler, trainer.state.train_state.global_avg_losses


def _checks() -> Iterator[Check]:
    for kind, backend, precomputed in itertools.product(_TRAINING_TYPES, ("accelerate", "ptd"), (False, True)):
        name = f"run-{kind}-{backend}" + ("-precomputed" if precomputed else "")
        yield Check(name, functools.partial(check_run, kind=kind, backend=backend, precomputed=precomputed))


CHECKS = tuple(_checks())
