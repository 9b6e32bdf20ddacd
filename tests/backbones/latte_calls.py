"""Opening and calling the tiny Latte models of the pipeline's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from framebridge_plugin import FrameBridgeLattePipeline
from tests.tiny_models import moving_square


def open_folder(folder: Path) -> FrameBridgeLattePipeline:
    pipeline = FrameBridgeLattePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(index: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(moving_square(index, 1, size[1], size[0])[0])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipeline: FrameBridgeLattePipeline, **arguments: Any) -> torch.Tensor:
    call = {"image": picture(), "class_label": "left", "num_inference_steps": 2, "generator": seeded()}
    return pipeline(**{**call, **arguments}, output_type="latent").frames
