"""Runs of our specification in this process, whose trainer the tests can look into afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from framebridge_plugin.training import CogVideoXBridgeSpecification
from framebridge_plugin.training.finetrainers.registration import register
from framebridge_plugin.training.objective import ObjectiveSettings
from tests.tiny_models import make_clips, make_tiny_cogvideox
from tests.training.conftest import LAUNCH_VARIABLES

SIZE = 32
TRAINING_TYPES = {"full": "full-finetune", "lora": "lora"}


def parse(argv: Sequence[str]) -> Any:
    """finetrainers' arguments, as a program such as its train.py gets them."""
    register()
    from finetrainers import BaseArgs
    from finetrainers.trainer.sft_trainer import SFTFullRankConfig, SFTLowRankConfig

    args = BaseArgs()
    is_lora = not {"lora", "--training_type=lora"}.isdisjoint(argv)
    args.register_args(SFTLowRankConfig() if is_lora else SFTFullRankConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *argv])
        return args.parse_args()


def make_specification(
    model: Path, objective: ObjectiveSettings | None = None, **kwargs: Any
) -> CogVideoXBridgeSpecification:
    """A specification in float32, by default with the reference's objective."""
    precision = dict.fromkeys(("text_encoder_dtype", "transformer_dtype", "vae_dtype"), torch.float32)
    return CogVideoXBridgeSpecification(
        str(model), objective=objective or ObjectiveSettings(), **{**precision, **kwargs}
    )


def make_inputs(folder: Path) -> Path:
    """Writes a tiny model, four clips and an image to validate with."""
    make_tiny_cogvideox(folder / "model", sample_size=SIZE)
    clips = make_clips(folder / "clips", count=4, frames=9, size=SIZE)
    dataset = {"data_root": str(clips), "dataset_type": "video", "video_resolution_buckets": [[9, SIZE, SIZE]]}
    (folder / "data.json").write_text(json.dumps({"datasets": [dataset]}))
    Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(folder / "red.png")
    columns = "caption,image_path,num_inference_steps,num_frames\n"
    (folder / "validation.csv").write_text(f"{columns}a red square,{folder / 'red.png'},1,9\n")
    return folder


def run_trainer(trainer_class: Any, inputs: Path, output: Path, kind: str, *options: str, **settings: Any) -> Any:
    """Trains for two steps, in this process alone.

    Returns:
        The trainer of `make_trainer`, after its run.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCH_VARIABLES:
            patch.delenv(name, raising=False)
        trainer = make_trainer(trainer_class, inputs, output, kind, *options, **settings)
        trainer.run()
    return trainer


def make_trainer(
    trainer_class: Any,
    inputs: Path,
    output: Path,
    kind: str,
    *options: str,
    specification_class: Any = CogVideoXBridgeSpecification,
    transformer_dtype: str = "fp32",
) -> Any:
    """Prepares a run of two steps.

    Args:
        trainer_class: finetrainers' trainer or ours.
        inputs: What `make_inputs` wrote.
        output: The run's folder.
        kind: `full` or `lora`.
        *options: More of finetrainers' arguments.
        specification_class: The specification.
        transformer_dtype: Precision of the network.

    Returns:
        The trainer.
    """
    args = parse(
        [
            "--model_name=cogvideox_bridge",
            f"--pretrained_model_name_or_path={inputs / 'model'}",
            f"--dataset_config={inputs / 'data.json'}",
            f"--output_dir={output}",
            f"--training_type={TRAINING_TYPES[kind]}",
            "--train_steps=2",
            "--checkpointing_steps=2",
            "--batch_size=2",
            "--seed=3",
            "--lr=1e-2",
            "--lr_scheduler=constant",
            "--text_encoder_dtype=fp32",
            "--vae_dtype=fp32",
            f"--transformer_dtype={transformer_dtype}",
            *(["--rank=4", "--lora_alpha=8"] if kind == "lora" else []),
            *options,
        ]
    )
    specification = specification_class(
        args.pretrained_model_name_or_path,
        text_encoder_dtype=torch.float32,
        vae_dtype=torch.float32,
        transformer_dtype=args.transformer_dtype,
        transformer_id=args.transformer_id,
        vae_id=args.vae_id,
    )
    return trainer_class(args, specification)
