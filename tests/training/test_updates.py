"""What an update of the trainer is: its loss, clipping, precision, optimizer and rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.run_results import (
    CONSTANT_RATE,
    LORA,
    assert_same_weights,
    expected_update,
    losses,
    metrics,
    succeeded,
    weights,
    write_one_clip,
)


@pytest.fixture
def one_clip(clips_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    return write_one_clip(clips_folder, tmp_path / "one clip")


def test_an_update_is_the_mean_over_its_micro_steps_and_is_clipped_once(train, one_clip, model_folder, tmp_path):
    # With this learning rate the network stays as it is.
    options = (*one_clip, *CONSTANT_RATE, "optimization.lr=1e-12", "training.gradient_accumulation_steps=2")
    assert succeeded(train(*options, "optimization.train_steps=9", "training.max_data_samples=5", output="loose"))
    entries = metrics(tmp_path / "loose")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert [entry["samples_seen"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        loss, norm = expected_update(tmp_path / "loose", model_folder, entry["step"], 2)
        assert entry["loss"] == pytest.approx(loss, rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4)
    # The norm is that of the whole update: with clipping after each half it would depend on the limit.
    tight = ("optimization.max_grad_norm=1e-6", "optimization.train_steps=1")
    assert succeeded(train(*options, *tight, output="tight"))
    assert metrics(tmp_path / "tight")[0]["grad_norm"] == entries[0]["grad_norm"] > 1e-3


def test_clipping_starts_at_the_given_update(train, tmp_path):
    options = (
        *("optimization.lr_scheduler=constant", "optimization.lr_warmup_steps=0", "optimization.train_steps=3"),
        *("optimization.max_grad_norm=1e-3", "checkpoints.checkpointing_steps=1"),
    )

    def run(start_step: int) -> Path:
        output = f"after{start_step}"
        assert succeeded(train(*options, f"framebridge.max_grad_norm_start_step={start_step}", output=output))
        return tmp_path / output

    late, never, always = run(2), run(3), run(0)
    for step in (1, 2):
        assert_same_weights(
            late / f"checkpoints/step_00000{step}/model", never / f"checkpoints/step_00000{step}/model"
        )
    assert losses(late) == losses(never)
    # The norm is logged as it was, clipped or not; the moments have the clipped gradient.
    assert [entry["grad_norm"] for entry in metrics(late)] == [entry["grad_norm"] for entry in metrics(never)]
    assert metrics(late)[0]["grad_norm"] == metrics(always)[0]["grad_norm"] > 1e-3
    final = "checkpoints/step_000003/trainer/optimizer.safetensors"
    unclipped, clipped = load_file(never / final), load_file(late / final)
    assert any(not torch.equal(tensor, clipped[name]) for name, tensor in unclipped.items())
    first = "checkpoints/step_000001/trainer/optimizer.safetensors"
    moments = load_file(always / first)
    squares = [tensor.double().square().sum() for name, tensor in moments.items() if name.endswith("exp_avg")]
    # One update with beta1 .9 leaves a tenth of the gradient there.
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_bfloat16_lora_with_checkpointing_and_offline_wandb(
    train, one_clip, model_folder, validation_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = (
        *one_clip,
        *("precision.transformer_dtype=bf16", "precision.vae_dtype=bf16", "precision.text_encoder_dtype=bf16"),
        *("training.gradient_checkpointing=true", "training.enable_slicing=true"),
        *("tracking.report_to=wandb", f"validation.validation_dataset_file={validation_file}"),
    )
    assert succeeded(train(*LORA, *options))
    # The layers start at zero, and the latents stay in float32, whatever the network computes in.
    expected, _ = expected_update(tmp_path / "run", model_folder, 1, 1, torch.bfloat16)
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)
    assert list((tmp_path / "run/logs/wandb").glob("offline-run-*"))
    assert (tmp_path / "run/validation/final-00.mp4").is_file()
    saved = weights(tmp_path / "run/lora")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in saved.items())


@pytest.mark.parametrize("optimizer", ["adamw-torchao-8bit", "adamw-bnb-8bit"])
def test_8bit_optimizers_resume_and_the_diffusion_baseline_trains(train, tmp_path, optimizer):
    # A constant rate, so that a run of two updates is the first half of one of four.
    options = (
        *("framebridge.objective=diffusion", f"optimization.optimizer={optimizer}"),
        *("optimization.lr_scheduler=constant", "optimization.lr_warmup_steps=0"),
    )
    assert succeeded(train(*options, output="whole"))
    config = json.loads((tmp_path / "whole/model/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "CogVideoXDDIMScheduler"
    assert succeeded(train(*options, "optimization.train_steps=2", output="part"))
    assert succeeded(train(*options, "checkpoints.resume_from_checkpoint=2", output="part"))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_before_the_update(train, tmp_path):
    options = ("optimization.lr=1e30", "optimization.lr_warmup_steps=0", "optimization.lr_scheduler=constant")
    result = train(*options)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: step 2: the loss is")
    assert "Traceback" not in result.stderr
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1]


def test_cosine_decays_to_zero(train, tmp_path):
    options = ("optimization.lr_scheduler=cosine", "optimization.lr_warmup_steps=0", "optimization.lr=1e-3")
    assert succeeded(train(*options))
    rates = [entry["lr"] for entry in metrics(tmp_path / "run")]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 2e-4
