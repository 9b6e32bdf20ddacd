"""The average of the weights: its values, its way through checkpoints, and that it is what a run leaves behind."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.media import read_image, to_uint8
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training.ema import WeightAverage
from tests.training.conftest import command_environment
from tests.training.run_results import LORA, assert_same_weights, first_sampled_frame, losses, succeeded

CONSTANT_RATE = ("optimization.lr_scheduler=constant", "optimization.lr_warmup_steps=0")
EMA = ("framebridge.ema_decay=0.9", *CONSTANT_RATE)
KINDS = pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])


def definition(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """The average in float64; it begins as the first of the weights."""
    average = weights[0].double()
    for each in weights[1:]:
        average = decay * average + (1 - decay) * each.double()
    return average


# The average itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start_step", [0, 3])
def test_the_average_is_its_definition_in_float32(dtype, start_step):
    network = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False), torch.nn.Linear(7, 2).requires_grad_(False))
    average = WeightAverage(network.to(dtype), 0.75, start_step)
    weight, generator = network[0].weight, torch.Generator().manual_seed(1)
    walked = [weight.detach().clone()]
    for step in range(1, 8):
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=generator))
        walked.append(weight.detach().clone())
        average.update(step)
        found = average.tensors
        assert list(found) == ["0.weight"]  # what is frozen has no average
        assert found["0.weight"].dtype == torch.float32
        if step <= start_step:
            assert torch.equal(found["0.weight"], weight.float())
        expected = definition(walked[min(step, start_step) :], 0.75)
        torch.testing.assert_close(found["0.weight"].double(), expected, rtol=0, atol=1e-6)


def test_names_are_the_networks_own():
    network = torch.nn.Sequential(checkpoint_wrapper(torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))))
    assert list(WeightAverage(network, 0.5).tensors) == ["0.0.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_computes_with_the_average_and_gets_its_weights_back(dtype):
    network = torch.nn.Linear(4, 4, bias=False).to(dtype)
    before = network.weight.detach().clone()
    average = WeightAverage(network, 0.5)
    with torch.no_grad():
        network.weight.add_(1.0)
    average.update(1)
    trained = network.weight.detach().clone()
    inputs = torch.eye(4, dtype=dtype)

    def compute() -> None:
        with average.in_place_of_weights():
            mean = ((before.float() + trained.float()) / 2).to(dtype)
            assert torch.equal(network(inputs), mean.T)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute()
    assert torch.equal(network.weight, trained)
    assert network.weight.requires_grad


def test_the_average_of_another_network_is_refused():
    average = WeightAverage(torch.nn.Linear(4, 4, bias=False), 0.5)
    for stored in ({}, {"bias": torch.zeros(4, 4)}, {"weight": torch.zeros(4, 1)}):
        with pytest.raises(ValueError, match="of another network: tensor weight "):
            average.load(stored)


# In a run


def trainer_file(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step_{step:06d}/trainer/{name}.safetensors")


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """What was trained, as sampling will find it, under the names that the trainer has for it."""
    if (folder / "model").is_dir():
        return load_file(folder / "model/transformer/diffusion_pytorch_model.safetensors")
    tensors = {
        name: tensor for file in (folder / "lora").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    names = {name: name.removeprefix("transformer.") for name in tensors}
    names |= {name: own.replace(".weight", ".default.weight") for name, own in names.items() if "lora_" in name}
    # The other factor of the input projection's layer is a constant.
    del tensors["transformer.patch_embed.proj.lora_A.weight"]
    return {names[name]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "dtype"), [((), "fp32"), ((), "bf16"), (LORA, "fp32")], ids=["full", "full-bf16", "lora"]
)
def test_a_run_leaves_the_average_and_keeps_the_weights(train, tmp_path, kind, dtype):
    options = (
        *("framebridge.ema_start_step=1", "checkpoints.checkpointing_steps=1", "checkpoints.checkpointing_limit=4"),
        *("training.gradient_checkpointing=true", f"precision.transformer_dtype={dtype}"),
    )
    result = train(*EMA, *kind, *options)
    assert succeeded(result)
    assert (
        "ema_decay: after 4 updates the averaged weights, which are saved and sampled, still hold 73%" in result.stderr
    )
    run = tmp_path / "run"
    weights = {step: trainer_file(run, step, "weights") for step in range(1, 5)}
    for step in range(1, 5):
        average = trainer_file(run, step, "ema")
        assert average.keys() == weights[step].keys()
        assert {tensor.dtype for tensor in average.values()} == {torch.float32}
        for name, tensor in average.items():
            expected = definition([weights[each][name] for each in range(1, step + 1)], 0.9)
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)

        checkpoint = exported(run / f"checkpoints/step_{step:06d}")
        assert checkpoint.keys() == average.keys()
        assert all(torch.equal(tensor, average[name].to(tensor.dtype)) for name, tensor in checkpoint.items())
    final = exported(run)
    assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float32}
    assert all(torch.equal(tensor, average[name].to(tensor.dtype)) for name, tensor in final.items())
    assert any((tensor - weights[4][name]).abs().max() > 1e-4 for name, tensor in final.items())


def test_a_killed_run_resumes_bit_for_bit_before_and_after_the_average_starts(train, recipe_file, tmp_path):
    options = (*EMA, "framebridge.ema_start_step=3", "dataloader.dataloader_num_workers=1")
    assert succeeded(train(*options, "optimization.train_steps=6", output="whole"))
    command = [sys.executable, "-m", "framebridge_plugin", "train", f"--recipe={recipe_file}", *options]
    killed = subprocess.Popen(
        [*command, "optimization.train_steps=5000", f"checkpoints.output_dir={tmp_path / 'killed'}"],
        env=command_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoints/step_000004").is_dir() and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/model").exists()

    for step, starts in ((2, False), (4, True)):
        average, weights = (trainer_file(tmp_path / "killed", step, name) for name in ("ema", "weights"))
        assert any(not torch.equal(average[name], weights[name]) for name in average) == starts
        resume = (f"checkpoints.resume_from_checkpoint={step}", "optimization.train_steps=6")
        assert succeeded(train(*options, *resume, output="killed"))
        assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
        for part in ("checkpoints/step_000006/trainer", "model"):
            assert_same_weights(tmp_path / "whole" / part, tmp_path / "killed" / part)


@KINDS
def test_validation_shows_the_average_and_gives_the_weights_back(train, validation_file, tmp_path, kind):
    options = (*EMA, *kind, "optimization.lr=1e-2")
    assert succeeded(train(*options, output="without"))
    shown = (f"validation.validation_dataset_file={validation_file}", "validation.validation_steps=1")
    assert succeeded(train(*options, *shown, output="with"))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    last = "checkpoints/step_000004/trainer"
    assert_same_weights(tmp_path / "with" / last, tmp_path / "without" / last)

    pipeline = open_pipeline(str(tmp_path / "with"))
    with validation_file.open() as file:
        row = next(csv.DictReader(file))

    def first_frame() -> np.ndarray:
        generator = torch.Generator().manual_seed(derive_seed("validation", 7, 0))
        call = {"image": read_image(row["image_path"]), "prompt": row["caption"], "num_inference_steps": 2}
        return to_uint8(pipeline(**call, generator=generator, output_type="pil").frames[0])[0].astype(int)

    validated = first_sampled_frame(tmp_path / "with/validation/final-00.png")
    assert np.abs(validated - first_frame()).max() <= 1
    if not kind:
        pipeline.transformer.load_state_dict(trainer_file(tmp_path / "with", 4, "weights"))
        assert np.abs(validated - first_frame()).max() > 1


def test_another_average_is_refused_and_without_one_there_are_no_files(train, tmp_path):
    two_updates = "optimization.train_steps=2"
    assert succeeded(train(*EMA, two_updates, output="with"))
    assert succeeded(train(*CONSTANT_RATE, two_updates, output="without"))
    files = {file.name for file in (tmp_path / "without/checkpoints/step_000002/trainer").iterdir()}
    assert files == {"optimizer.safetensors", "state.json"}

    resume = "checkpoints.resume_from_checkpoint=latest"
    for output, options, message in (
        ("with", (*EMA, "framebridge.ema_decay=0.8"), "it was trained with ema_decay 0.9;"),
        ("with", (*EMA, "framebridge.ema_start_step=1"), "it was trained with ema_start_step 0;"),
        ("with", CONSTANT_RATE, "it was trained with ema_decay 0.9;"),
        ("without", EMA, "it was trained with ema_decay 0.0;"),
    ):
        refused = train(*options, resume, output=output)
        assert refused.returncode == 1
        assert message in refused.stderr.strip().splitlines()[-1]
