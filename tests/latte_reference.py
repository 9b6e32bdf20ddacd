"""The authors' tiny Latte networks, as checkpoint files of theirs and as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.backbones.latte.reference_checkpoints import read_reference_checkpoint
from framebridge_plugin.models.latte import LatteTransformer
from tests.reference_vectors import load_vectors
from tests.tiny_models import latte_config

HEADS = 4
STAGES = ("bridge", "bridge_neural_prior", "nwarp")


def reference_weights(stage: str) -> dict[str, torch.Tensor]:
    """Return the weights of a stage under the authors' names."""
    tensors, description = load_vectors("latte_model")
    return {name: tensors[stored] for name, stored in description["state_dict_map"][stage].items()}


def write_checkpoint(path: Path, state_dict: dict[str, Any], key: str = "ema", **more: Any) -> Path:
    """Write a checkpoint file as the authors do."""
    torch.save({key: state_dict, **more}, path)
    return path


def reference_network(stage: str, folder: Path) -> LatteTransformer:
    """Return our network with the authors' weights of a stage, read from a checkpoint file of theirs."""
    file = write_checkpoint(folder / f"{stage}.pt", reference_weights(stage))
    (read,) = read_reference_checkpoint(file, num_attention_heads=HEADS).networks.values()
    network = LatteTransformer(**read.config)
    network.load_state_dict(read.state_dict)
    return network


def full_size_network(stage: str) -> LatteTransformer:
    """Return a network from scratch of the size that the authors trained, S/2 on UCF-101."""
    config = latte_config(
        "S/2",
        sample_height=32,
        sample_width=32,
        num_frames=16,
        num_classes=101,
        takes_neural_prior=stage == "bridge_neural_prior",
        stage="neural_prior" if stage == "nwarp" else "bridge",
    )
    return LatteTransformer.from_scratch(config, seed=0)
