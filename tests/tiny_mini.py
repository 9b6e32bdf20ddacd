"""Builds a complete but tiny folder of the backbone in tests/data/outside_backbone, which must be importable."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import framebridge_plugin  # noqa: F401  (it repairs torchvision)
from tests.tiny_models import make_tiny_cogvideox


def make_tiny_mini(folder: Path) -> Path:
    """Writes a plain Mini with random weights, with text encoder and autoencoder of a tiny CogVideoX."""
    from mini_bridge.network import MiniTransformer

    make_tiny_cogvideox(folder)
    for part in ("transformer", "scheduler"):
        shutil.rmtree(folder / part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MiniTransformer().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "MiniPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["mini_bridge.network", "MiniTransformer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    make_tiny_mini(Path(sys.argv[1]))
