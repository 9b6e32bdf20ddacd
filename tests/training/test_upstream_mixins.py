"""From finetrainers' own trainer tests, with our specifications: ten steps on four black clips of 64 x 64 x 4 frames.

As there, a specification is made without arguments, so that the precision is finetrainers' default, bfloat16.
`accelerate` with two processes is not among them: we refuse it, because it does not synchronise gradients.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import make_tiny_cogvideox, make_tiny_latte
from tests.training import mixin_runs
from tests.training.conftest import LAUNCH_VARIABLES, run_in_two_processes
from tests.training.mixin_runs import FULL, LORA, SIZE, STEPS, run, write_black_clips

MODELS = {
    "FixedCogVideoX": lambda folder: make_tiny_cogvideox(folder, sample_size=SIZE),
    "FixedLatte": make_tiny_latte,
    "FixedNeuralPrior": lambda folder: make_tiny_latte(folder, "neural_prior"),
}
PRECOMPUTED = {"enable_precomputation": True}
UPCAST = {"layerwise_upcasting_modules": ["transformer"], **PRECOMPUTED}
ACCELERATE, PTD = ({"parallel_backend": name} for name in ("accelerate", "ptd"))
# Those that differ by more than the precision from the conformance suite's runs.
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "accelerate-lora-layerwise-upcasting": ("FixedCogVideoX", {**ACCELERATE, **LORA, **UPCAST}),
    **{
        f"ptd-lora-layerwise-upcasting-batch-2-{name}": (name, {**PTD, **LORA, **UPCAST, "batch_size": 2})
        for name in MODELS
    },
    **{
        f"ptd-full-batch-2-precomputed-{name}": (name, {**PTD, **FULL, **PRECOMPUTED, "batch_size": 2})
        for name in MODELS
    },
}
# Without layerwise upcasting: gloo, which stands in for NCCL on CPUs, cannot send float8.
REPLICATED: list[dict[str, Any]] = [
    {**PTD, **LORA, "dp_degree": 2},
    {**PTD, **FULL, **PRECOMPUTED, "dp_degree": 2, "batch_size": 2},
]
SHARDED: list[dict[str, Any]] = [{**PTD, **LORA, **PRECOMPUTED, "dp_shards": 2}, {**PTD, **FULL, "dp_shards": 2}]
# How they are split is finetrainers' and our trainer's business; Latte's frozen network is the reason to shard it.
IN_TWO_PROCESSES = [
    *(("FixedCogVideoX", values) for values in (*REPLICATED, *SHARDED)),
    *(("FixedLatte", values) for values in SHARDED),
    *(("FixedNeuralPrior", values) for values in REPLICATED),
]


@pytest.fixture(scope="module")
def specifications(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The classes, each with the folder of a model of its own."""
    folder = tmp_path_factory.mktemp("models")
    classes = {name: getattr(mixin_runs, name) for name in MODELS}
    for name, make in MODELS.items():
        classes[name].folder = make(folder / name)
    return classes


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def assert_trained_and_saved(specification_class: Any, folder: Path, values: dict[str, Any], result: Any) -> None:
    # finetrainers stops after 25 samples (max_data_samples), too.
    steps = min(STEPS, math.ceil(25 / (values.get("batch_size", 1) * values.get("dp_degree", 1))))
    assert len(result["losses"]) == steps
    assert all(map(math.isfinite, result["losses"]))
    assert result["saved"] == ["000006", f"{steps:06d}"]

    specification = specification_class()
    network_name = getattr(specification, "network_name", "transformer")
    base = specification.load_diffusion_models()["transformer"]
    shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
    kind = values["training_type"]
    saved = folder / ("lora_weights" if kind == "lora" else "model_weights") / f"{steps:06d}"
    pipeline = specification.load_pipeline()
    if kind == "lora":
        pipeline.load_lora_weights(saved)
        network = getattr(pipeline, network_name)
        layers = {name: tensor for name, tensor in network.state_dict().items() if ".lora_B." in name}
        # to_q, to_k, to_v and to_out of two blocks, and the widened input projection; lora_B starts at zero.
        assert len(layers) == 8 + any("patch_embed" in name for name in layers)
        assert all(tensor.abs().sum() > 0 for tensor in layers.values())
    else:
        trained = type(base).from_pretrained(saved / network_name).state_dict()
        assert {name: tensor.shape for name, tensor in trained.items()} == shapes
        assert any(not torch.equal(tensor, base.state_dict()[name]) for name, tensor in trained.items())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ALONE)
def test_in_one_process(specifications, tmp_path, name):
    write_black_clips(tmp_path)
    specification, values = ALONE[name]
    result = run(specifications[specification], tmp_path, **values)
    assert_trained_and_saved(specifications[specification], tmp_path, values, result)


@pytest.fixture(scope="module")
def in_two_processes(specifications, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of all runs, and what they came to."""
    folder, runs = tmp_path_factory.mktemp("two"), []
    # The frozen network is whole on both processes, whatever is done with the trained one.
    on_neural_prior = make_tiny_latte(folder / "model", "bridge_neural_prior")
    for number, (name, values) in enumerate(IN_TWO_PROCESSES):
        model = on_neural_prior if name == "FixedLatte" else specifications[name].folder
        run_folder = folder / str(number)
        run_folder.mkdir()
        write_black_clips(run_folder)
        runs.append((name, str(model), str(run_folder), values))
    printed = run_in_two_processes(mixin_runs.__name__, runs, WANDB_MODE="disabled")
    (line,) = [line for line in printed.splitlines() if line.startswith('[{"losses"')]
    return folder, json.loads(line)


@pytest.mark.parametrize("number", range(len(IN_TWO_PROCESSES)))
def test_in_two_processes(specifications, in_two_processes, number):
    (folder, results), (name, values) = in_two_processes, IN_TWO_PROCESSES[number]
    cls = specifications[name]
    if name == "FixedLatte":
        cls = type("FixedLatte", (cls,), {"folder": folder / "model"})
    assert_trained_and_saved(cls, folder / str(number), values, results[number])
