"""`finetrainers sample` on what Latte runs leave behind, from the first command to the video."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from framebridge_plugin import media
from framebridge_plugin.cli import main
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.media import read_image
from framebridge_plugin.schedulers import FrameBridgeScheduler
from tests.backbones.test_sampling import Sampled, read_video
from tests.tiny_models import CLASS_NAMES, make_clips, make_tiny_latte, moving_square, write_video
from tests.training.conftest import LAUNCH_VARIABLES

FRAMES, SIZE = 4, 64


def train(folder: Path, name: str, base: str, **sections: dict) -> Path:
    """Trains for two updates by a recipe of its own."""
    model_name = "latte_neural_prior" if base == "neural_prior" else "latte_bridge"
    data = {"class_root": str(folder / "clips"), "num_frames": FRAMES, "height": SIZE, "width": SIZE}
    recipe = {
        "model": {"model_name": model_name, "pretrained_model_name_or_path": str(folder / base)},
        "training": {"training_type": "full-finetune", "batch_size": 2, **sections.pop("training", {})},
        "optimization": {"train_steps": 2, "lr": 0.01},
        "precision": {"transformer_dtype": "fp32", "vae_dtype": "fp32"},
        "checkpoints": {"output_dir": str(folder / name), "checkpointing_steps": 2},
        "tracking": {"report_to": "none"},
        "framebridge": {
            "ema_decay": 0.5,
            "data": None if "dataset" in sections else data,
            **sections.pop("framebridge", {}),
        },
        **sections,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        for variable in LAUNCH_VARIABLES:
            patch.delenv(variable, raising=False)
        assert main(["train", "--recipe", str(folder / f"{name}.yaml")]) == 0
    return folder / name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of four classes, a picture, and runs: `full`, `prior`, `on_prior`, `baseline`, `lora`, `lora_prior`."""
    folder = tmp_path_factory.mktemp("latte")
    for label, name in enumerate(CLASS_NAMES):
        (folder / "clips" / name).mkdir(parents=True)
        for number in range(2):
            frames = moving_square(2 * label + number, FRAMES, SIZE, SIZE)
            write_video(folder / "clips" / name / f"{number}.mp4", frames)
    Image.fromarray(moving_square(9, 1, SIZE, SIZE + 8)[0]).save(folder / "picture.png")
    for base in ("bridge", "neural_prior", "bridge_neural_prior", "diffusion"):
        make_tiny_latte(folder / base, base)
    train(folder, "full", "bridge")
    train(folder, "prior", "neural_prior")
    train(folder, "on_prior", "bridge_neural_prior", framebridge={"neural_prior": str(folder / "prior")})
    entry = {"class_root": str(folder / "clips"), "video_resolution_buckets": [[FRAMES, SIZE, SIZE]]}
    (folder / "data.json").write_text(json.dumps({"datasets": [entry]}))
    dataset = {"dataset_config": str(folder / "data.json")}
    train(folder, "baseline", "diffusion", framebridge={"objective": "diffusion"}, dataset=dataset)
    lora = {"training": {"training_type": "lora"}, "lora": {"rank": 4, "lora_alpha": 8}}
    train(folder, "lora", "bridge", **lora)
    train(folder, "lora_prior", "neural_prior", **lora)
    return folder


@pytest.fixture
def sample(inputs, tmp_path, capsys):
    """Runs the command on the picture with two steps, unless it is told otherwise."""
    count = 0

    def run(model: str | Path, *options: str, image: str | None = "picture.png", steps: int | None = 2) -> Sampled:
        nonlocal count
        folder = tmp_path / f"sampled{count}"
        count += 1
        arguments = ["sample", "--model", str(inputs / model), "--output", str(folder / "video.mp4")]
        if image is not None:
            arguments += ["--image", str(inputs / image)]
        if steps is not None:
            arguments.append(f"--steps={steps}")
        capsys.readouterr()
        code = main([*arguments, *options])
        return Sampled(code, capsys.readouterr().err, folder)

    return run


@pytest.mark.parametrize(
    "model", ["full", "full/model", "full/checkpoints/step_000002", "on_prior", "baseline", "lora", "lora/lora"]
)
def test_runs(sample, model):
    result = sample(model, "--class-name", "up")
    (video,) = result.videos()
    assert video.shape == (FRAMES, SIZE, SIZE, 3)
    assert ("a diffusion model: sampled with its CogVideoXDDIMScheduler" in result.said) == (model == "baseline")


@pytest.mark.parametrize("model", ["prior", "prior/checkpoints/step_000002/model", "lora_prior"])
def test_the_run_of_a_neural_prior(sample, model):
    result = sample(model, "--class-name", "up", steps=None)
    assert result.videos()[0].shape == (FRAMES, SIZE, SIZE, 3)
    assert "a neural prior: one call of the network per video" in result.said
    result = sample(model, "--class-name", "up")
    assert result.code == 2
    assert result.errors == ["error: --steps: this model gives its video in one call, without a sampler; leave it out"]


def test_the_newest_checkpoint_of_an_unfinished_run(sample, inputs, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(inputs / "full/checkpoints/step_000002", unfinished / "checkpoints/step_000002")
    result = sample(unfinished, "--label", "0")
    assert len(result.videos()) == 1
    assert f"its newest checkpoint {unfinished / 'checkpoints/step_000002'} is used" in result.said


def test_the_averaged_weights_are_sampled(inputs):
    """A checkpoint holds the raw ones as well, for resuming."""
    pipeline = open_pipeline(str(inputs / "full"))
    trainer = inputs / "full/checkpoints/step_000002/trainer"
    averaged, raw = load_file(trainer / "ema.safetensors"), load_file(trainer / "weights.safetensors")
    weights = pipeline.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in averaged.items())
    assert any(not torch.equal(raw[name], tensor) for name, tensor in averaged.items())


def test_the_command_does_what_the_pipeline_does(sample, inputs, tmp_path):
    options = ("--class-name", "left", "right", "--num-videos", "2", "--seed", "5", "--guidance-scale", "3")
    options += ("--batch-size", "2")  # each video by itself
    result = sample("full", *options, "--image", *[str(inputs / "picture.png")] * 2, image=None)
    assert result.code == 0
    pipeline = open_pipeline(str(inputs / "full"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FrameBridgeScheduler.from_config(pipeline.scheduler.config, grid="linspace")
    files = set()
    for number, name in enumerate(("left", "left", "right", "right")):
        video = pipeline(
            read_image(inputs / "picture.png"),
            name,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5 + number),
            output_type="pt",
        ).frames[0]
        media.write_video(video, tmp_path / "expected.mp4")
        files.add((tmp_path / "expected.mp4").read_bytes())
        assert (result.folder / f"video-{number}.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()
    assert len(files) == 4


def file_of(result: Sampled) -> bytes:
    assert result.code == 0, result.said
    return (result.folder / "video.mp4").read_bytes()


def test_defaults_are_the_references(sample):
    default = file_of(sample("full", "--class-name", "up", steps=3))
    assert file_of(sample("full", "--label", "2", "--grid=linspace", "--guidance-scale=7", steps=3)) == default
    for option in ("--grid=trailing", "--guidance-scale=6", "--start=clean_prior", "--sampler=dbim", "--seed=43"):
        assert file_of(sample("full", "--class-name", "up", option, steps=3)) != default


def test_a_lora_is_not_its_base_model(sample):
    videos = [file_of(sample(model, "--class-name", "up")) for model in ("lora", "bridge")]
    assert videos[0] != videos[1]
    videos = [file_of(sample(model, "--class-name", "up", steps=None)) for model in ("lora_prior", "neural_prior")]
    assert videos[0] != videos[1]


def test_a_hub_id_is_checked_when_it_is_there(inputs, tmp_path, monkeypatch, capsys):
    cache, commit = tmp_path / "hub", "0123456789" * 4
    repository = cache / "models--tiny--latte"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(inputs / "bridge", repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    arguments = ["sample", "--model=tiny/latte", "--image", str(inputs / "picture.png"), "--steps=2"]
    arguments += ["--output", str(tmp_path / "out/video.mp4")]
    assert main([*arguments, "--class-name", "up"]) == 0
    assert read_video(tmp_path / "out/video.mp4").shape == (FRAMES, SIZE, SIZE, 3)
    capsys.readouterr()
    assert main([*arguments, "--class-name", "upp", "--num-frames=9"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [error.split(": ")[1] for error in errors] == ["--class-name upp", "--num-frames"]


# Images out of videos and out of the run's data


@pytest.mark.parametrize("model", ["full", "on_prior/checkpoints/step_000002", "lora", "baseline"])
def test_rows_of_the_runs_data(sample, inputs, model):
    result = sample(model, "--data-index", "2", "7", "--batch-size=2", image=None)  # two clips a class, by code points
    assert result.code == 0, result.said
    rows = [(result.folder / f"video-{number}.mp4").read_bytes() for number in range(2)]
    for row, (name, clip, seed) in zip(rows, (("left", "0", 42), ("up", "1", 43)), strict=True):
        options = ("--class-name", name, f"--seed={seed}")
        assert file_of(sample(model, *options, image=f"clips/{name}/{clip}.mp4")) == row
    other = sample(model, "--data-index", "2", "--class-name", "right", image=None)
    assert file_of(other) != rows[0]


def test_the_first_frame_of_a_video_is_taken(sample, inputs):
    clip = inputs / "clips/down/0.mp4"
    Image.fromarray(read_video(clip)[0]).save(inputs / "first.png")
    options = ("full", "--class-name", "down")
    assert file_of(sample(*options, image="clips/down/0.mp4")) == file_of(sample(*options, image="first.png"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("8",), "names 8 clips, rows 0 to 7"),
        (("1", "99"), "--data-index 99: "),
        (("-1",), "--data-index: should be 0 or more"),
    ],
)
def test_rows_that_are_not_there(sample, rows, message):
    result = sample("full", "--data-index", *rows, image=None)
    assert result.code == 2
    (error,) = result.errors
    assert message in error


def test_captions_that_are_no_classes(sample, inputs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(inputs / "full/model", run / "model")
    make_clips(tmp_path / "clips", count=1, frames=FRAMES)
    entry = {"data_root": str(tmp_path / "clips"), "video_resolution_buckets": [[FRAMES, SIZE, SIZE]]}
    (run / "dataset_config.json").write_text(json.dumps({"datasets": [entry]}))
    result = sample(run, "--data-index", "0", image=None)
    assert result.code == 2
    (error,) = result.errors
    assert error.startswith("error: --data-index 0: the model knows no class 'a red square moves")
    assert sample(run, "--data-index", "0", "--class-name", "up", image=None).code == 0
    (tmp_path / "clips/0.mp4").write_bytes(b"no video")
    result = sample(run, "--data-index", "0", "--class-name", "up", image=None)
    assert (result.code, len(result.errors)) == (2, 1)
    assert "cannot read the clip" in result.errors[0]


def test_a_broken_video_is_refused_in_one_line(sample, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    result = sample("full", "--class-name", "up", image=str(tmp_path / "broken.mp4"))
    assert (result.code, len(result.errors)) == (2, 1)
    assert "--image: cannot read the clip" in result.errors[0]


# Bad input


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("full", ("--class-name", "lef"), "--class-name lef: the model knows no class 'lef'; the nearest: left"),
        ("full", ("--label", "4"), "--label 4: the model knows no class 4: its labels run from 0 to 3"),
        ("full", ("--prompt", "up"), "--prompt: a FrameBridgeLatte model takes classes, not text; give --class-name"),
        ("full", (), "--class-name: give one for all images"),
        ("full", ("--label", "0", "--num-frames=8"), "--num-frames: this model was trained on 4 and takes no other"),
        ("full/trainer", ("--label", "0"), "no such folder"),
    ],
)
def test_wrong_options_are_refused_in_one_line(sample, model, options, message):
    result = sample(model, *options)
    assert (result.code, len(result.errors)) == (2, 1)
    assert message in result.errors[0]
    assert not result.folder.exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_frames": 3}, "it has 3 frames, not 4"),
        ({"size": 32}, "it has 8 rows of its latents, not 16"),
        ({"class_names": CLASS_NAMES[:3]}, "it has 3 classes, not 4"),
    ],
)
def test_a_neural_prior_that_does_not_fit(sample, inputs, tmp_path, shape, message):
    run = tmp_path / "run"
    shutil.copytree(inputs / "on_prior/model", run / "model")
    shutil.rmtree(run / "model/neural_prior")
    other = make_tiny_latte(tmp_path / "other", "neural_prior", **shape)
    shutil.copytree(other / "neural_prior", run / "model/neural_prior")
    result = sample(run, "--label", "0")
    assert (result.code, len(result.errors)) == (2, 1)
    assert message in result.errors[0]


@pytest.mark.parametrize("how", ["truncated", "missing"])
@pytest.mark.parametrize(
    "file",
    [
        "full/model/transformer/diffusion_pytorch_model.safetensors",
        "full/model/transformer/config.json",
        "full/model/vae/config.json",
        "full/model/scheduler/scheduler_config.json",
        "full/model/model_index.json",
        "on_prior/model/neural_prior/diffusion_pytorch_model.safetensors",
        "lora/lora/pytorch_lora_weights.safetensors",
        "lora/lora/framebridge.json",
    ],
)
def test_a_damaged_file_is_said_in_one_line(sample, inputs, tmp_path, file, how):
    run, part, name = file.split("/", 2)
    shutil.copytree(inputs / run / part, tmp_path / part)
    damaged = tmp_path / part / name
    if how == "missing":
        damaged.unlink()
    else:
        os.truncate(damaged, damaged.stat().st_size // 2)
    result = sample(tmp_path, "--label", "0")
    assert result.code in (1, 2)
    assert len(result.errors) == 1, result.said
    assert "Traceback" not in result.said
    assert "--debug shows the traceback" not in result.errors[0]  # an error that nobody foresaw
