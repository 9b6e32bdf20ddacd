"""Stored inputs and outputs of the authors' implementation (float32, CPU), for comparison by the tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"


def load_vectors(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and the description stored under a name."""
    return load_file(DATA / f"{name}.safetensors"), json.loads((DATA / f"{name}.json").read_text())


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude of what is expected."""
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())
