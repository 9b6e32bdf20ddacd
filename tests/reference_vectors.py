"""Stored inputs and outputs of the authors' implementation (float32, CPU), for comparison by the tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from framebridge_plugin.bridge import predict_z_0

DATA = Path(__file__).parent / "data"


def load_vectors(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and the description stored under a name."""
    return load_file(DATA / f"{name}.safetensors"), json.loads((DATA / f"{name}.json").read_text())


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude of what is expected."""
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


def predicted_z_0(scheduler: Any, output: torch.Tensor, z_t: torch.Tensor, prior: torch.Tensor, index: Any) -> Any:
    """What a network's output means for a scheduler."""
    return predict_z_0(scheduler.config.target, output, z_t, prior, scheduler.schedule.coefficients(index))
