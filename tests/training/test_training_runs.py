"""The trainer on real clips with a tiny real model, as a user runs it."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import wandb
import yaml

from framebridge_plugin import progress
from framebridge_plugin.backbones.cogvideox.adapter import load_bridge_transformer
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.media import read_image, to_uint8
from framebridge_plugin.randomness import derive_seed
from tests.tiny_models import make_clips
from tests.training.conftest import command_environment
from tests.training.run_results import (
    CONSTANT_RATE,
    LORA,
    assert_same_weights,
    first_sampled_frame,
    heldout,
    losses,
    metrics,
    succeeded,
)
from tests.training.test_told import sample_as_told


@pytest.fixture(scope="module")
def dropout_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that draws from torch's global generator while it trains, and only then."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("dropout") / "model")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | {"dropout": 0.2}))
    return folder


@pytest.mark.parametrize("backend", ["ptd", "accelerate"])
@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_trains_saves_and_resumes_bit_for_bit(train, dropout_model, tmp_path, kind, backend):
    model = f"model.pretrained_model_name_or_path={dropout_model}"
    options = (*kind, model, f"parallelism.parallel_backend={backend}")
    result = train(*options, output="whole")
    assert succeeded(result)
    sample_as_told(result.stderr)
    name = "lora" if kind else "model"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert len(metrics(whole)) == 4
    assert (whole / "recipe.yaml").is_file()
    assert (whole / "versions.json").is_file()
    assert (whole / "loss.png").is_file()
    assert list((whole / "tensorboard").iterdir())

    # A checkpoint of step 2 alone, as a run leaves it that was killed before step 4.
    parts.mkdir()
    subprocess.run(["cp", "-r", whole / "checkpoints", parts / "checkpoints"], check=True)
    subprocess.run(["rm", "-r", parts / "checkpoints" / "step_000004"], check=True)
    (parts / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    assert succeeded(train(*options, "checkpoints.resume_from_checkpoint=latest", output="parts"))
    assert losses(parts) == losses(whole)
    assert [entry["lr"] for entry in metrics(parts)] == [entry["lr"] for entry in metrics(whole)]
    assert_same_weights(whole / name, parts / name)
    assert_same_weights(whole / "checkpoints/step_000004/trainer", parts / "checkpoints/step_000004/trainer")


def test_ctrl_c_leaves_the_last_checkpoint_usable(train, recipe_file, tmp_path):
    command = [sys.executable, "-m", "framebridge_plugin", "train", f"--recipe={recipe_file}"]
    process = subprocess.Popen(
        [*command, "optimization.train_steps=5000"],
        env=command_environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background hands on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/step_000002").is_dir() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert succeeded(train("checkpoints.resume_from_checkpoint=2", "optimization.train_steps=3"))
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_validation_changes_nothing_and_writes_videos(train, dropout_model, validation_file, tmp_path):
    model = f"model.pretrained_model_name_or_path={dropout_model}"
    assert succeeded(train(model, output="without"))
    options = (f"validation.validation_dataset_file={validation_file}", "validation.validation_steps=1")
    clips = make_clips(tmp_path / "heldout", count=1, frames=9, size=32)
    assert succeeded(train(model, *options, f"validation.heldout.data_root={clips}", output="with"))
    assert list(heldout(tmp_path / "with")) == [0, 1, 2, 3, 4]
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert_same_weights(tmp_path / "with/model", tmp_path / "without/model")
    videos = {path.name for path in (tmp_path / "with/validation").glob("*.mp4")}
    assert videos == {"step000001-00.mp4", "step000002-00.mp4", "step000003-00.mp4", "final-00.mp4"}
    with av.open(str(tmp_path / "with/validation/final-00.mp4")) as container:
        assert container.streams.video[0].average_rate == 12, "not the rate of the training clips"


@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_the_final_validation_uses_the_trained_weights(train, model_folder, validation_file, tmp_path, kind):
    options = (f"validation.validation_dataset_file={validation_file}", "optimization.lr=1e-2")
    assert succeeded(train(*kind, *options))
    pipeline = open_pipeline(str(tmp_path / "run"))
    with validation_file.open() as file:
        row = next(csv.DictReader(file))

    def frames() -> np.ndarray:
        generator = torch.Generator().manual_seed(derive_seed("validation", 7, 0))
        call = {"image": read_image(row["image_path"]), "prompt": row["caption"], "num_inference_steps": 2}
        return to_uint8(pipeline(**call, generator=generator, output_type="pil").frames[0]).astype(int)

    first = first_sampled_frame(tmp_path / "run/validation/final-00.png")
    assert np.abs(first - frames()[0]).max() <= 1
    pipeline.transformer = load_bridge_transformer(str(model_folder), subfolder="transformer")
    assert np.abs(first - frames()[0]).max() > 1


@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_precomputation_gives_the_same_run(train, tmp_path, kind, monkeypatch):
    kind = (*kind, f"validation.heldout.data_root={make_clips(tmp_path / 'heldout', count=1, frames=9, size=32)}")
    assert succeeded(train(*kind, output="direct"))
    options = ("dataset.enable_precomputation=true", "dataset.precomputation_items=3")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    result = train(*kind, *options, output="precomputed")
    assert succeeded(result)
    lines = [line.partition(" [")[0] for line in result.stderr.splitlines() if line.startswith("Encoding")]
    done = ("33 %, 1 of 3", "67 %, 2 of 3", "100 %, 3 of 3")
    block = [f"Encoding {what}: {share}" for what in ("captions", "clips") for share in done]
    assert lines == block * 3
    assert losses(tmp_path / "precomputed") == losses(tmp_path / "direct")
    assert heldout(tmp_path / "precomputed") == heldout(tmp_path / "direct")


def test_a_run_that_precomputes_once_resumes_where_it_stopped(train, tmp_path):
    once = ("dataset.enable_precomputation=true", "dataset.precomputation_items=3", "dataset.precomputation_once=true")
    options = (*once, *CONSTANT_RATE)
    assert succeeded(train(*options, output="whole"))
    # It stops at the second of the three items.
    assert succeeded(train(*options, "optimization.train_steps=2", output="parts"))
    assert succeeded(train(*options, "checkpoints.resume_from_checkpoint=latest", output="parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "parts/model", tmp_path / "whole/model")


def test_processes_wait_for_each_other_as_long_as_either_limit_says(train, monkeypatch):
    limits, init_process_group = [], torch.distributed.init_process_group

    def noting(*args, **kwargs):
        limits.append(kwargs["timeout"].total_seconds())
        init_process_group(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, "init_process_group", noting)
    for init, nccl in ((60, 1234), (1234, 60)):
        limit = (f"parallelism.init_timeout={init}", f"parallelism.nccl_timeout={nccl}")
        assert succeeded(
            train("parallelism.parallel_backend=ptd", *limit, "optimization.train_steps=1", output=str(init))
        )
    assert limits == [1234, 1234]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ((*LORA, "lora.target_modules=[nonsense]"), "error: lora.target_modules: "),
        (("validation.enable_model_cpu_offload=true",), "error: enable_model_cpu_offload: there is no accelerator"),
        (("tracking.report_to=wandb",), "error: tracking.report_to: wandb has no login here"),
        (("hub.push_to_hub=true",), "error: hub.push_to_hub: "),
        (("validation.heldout.data_root={clips}",), "error: validation.heldout: 5 of its 5 clips are trained on, "),
    ],
)
def test_a_dry_run_refuses_what_the_start_would(train, clips_folder, tmp_path, monkeypatch, overrides, message):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # which keeps the mode of an earlier run of this process
    result = train("--dry-run", *(override.format(clips=clips_folder) for override in overrides))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(message)
    assert yaml.safe_load(result.stdout)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_a_hub_id_is_loaded_from_the_cache(train, model_folder, tmp_path, kind):
    cache, commit = tmp_path / "hub", "0123456789" * 4
    repository = cache / "models--tiny--cogvideox"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    model = ("model.pretrained_model_name_or_path=tiny/cogvideox", f"model.cache_dir={cache}")
    assert succeeded(train(*kind, *model, "optimization.train_steps=1"))
    if not kind:
        assert (tmp_path / "run/model/text_encoder/model.safetensors").is_file()
        assert (tmp_path / "run/model/tokenizer/spiece.model").is_file()
