"""What a run tells: its trackers, its validation, its progress, and where the model lies."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framebridge_plugin.cli import main
from framebridge_plugin.recipe import resolve_recipe
from framebridge_plugin.training.run import sample_line
from tests.training.bridge_runs import parse
from tests.training.conftest import SIZE, command_environment
from tests.training.run_results import metrics
from tests.wandb_files import read_offline_run

STEPS = 2


class Told(NamedTuple):
    folder: Path
    said: str


@pytest.fixture(scope="module")
def told(tmp_path_factory, model_folder, clips_folder, validation_file) -> Told:
    """A LoRA run in a process of its own, with Weights & Biases offline and a folder that a shell must quote."""
    folder = tmp_path_factory.mktemp("told")
    recipe = {
        "model": {"pretrained_model_name_or_path": str(model_folder)},
        "framebridge": {"data": {"data_root": str(clips_folder), "num_frames": 9, "height": SIZE, "width": SIZE}},
        "training": {"training_type": "lora"},
        "lora": {"rank": 4, "lora_alpha": 8},
        "optimization": {"train_steps": STEPS, "lr": 3e-4},
        "precision": {"transformer_dtype": "fp32", "vae_dtype": "fp32", "text_encoder_dtype": "fp32"},
        "checkpoints": {"output_dir": str(folder / "my run")},
        "validation": {"validation_dataset_file": str(validation_file), "validation_steps": 1},
        "tracking": {"report_to": "wandb"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = subprocess.run(
        [sys.executable, "-m", "framebridge_plugin", "train", f"--recipe={folder / 'recipe.yaml'}"],
        env={**command_environment(), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == ""
    return Told(folder / "my run", result.stderr)


def test_weights_and_biases_gets_the_resolved_recipe_and_the_videos(told):
    config, history = read_offline_run(told.folder)
    assert (config["lora"]["rank"], config["lora"]["lora_alpha"]) == (4, 8)
    written = yaml.safe_load((told.folder / "recipe.yaml").read_text())
    assert {name: config[name] for name in written} == written
    assert [entry["lr"] for entry in history] == [3e-4] * STEPS
    for entry, label in zip(history, ("validation", "final"), strict=True):
        assert entry[f"{label}.captions"] == ["null"]
        (video,) = entry[f"{label}.videos"]
        assert next(told.folder.rglob(Path(video["path"]).name)).stat().st_size == video["size"]


def test_tensorboard_gets_numbers_the_resolved_recipe_and_the_contact_sheets(told):
    events = EventAccumulator(str(told.folder / "tensorboard"), size_guidance={})
    events.Reload()
    for entry in metrics(told.folder)[:STEPS]:
        numbers = {name: value for name, value in entry.items() if name != "step"}
        logged = {name: events.Scalars(name)[entry["step"] - 1] for name in numbers}
        assert {event.step for event in logged.values()} == {entry["step"]}
        assert {name: event.value for name, event in logged.items()} == pytest.approx(numbers)
    (settings,) = events.Tensors("settings/text_summary")
    text = settings.tensor_proto.string_val[0].decode()
    assert json.loads(text.strip("`")) == yaml.safe_load((told.folder / "recipe.yaml").read_text())
    sheets, captions = events.Images("validation/00"), events.Tensors("validation/00/caption/text_summary")
    assert [sheet.step for sheet in sheets] == [caption.step for caption in captions] == [1, STEPS]
    assert all(caption.tensor_proto.string_val == [b"null"] for caption in captions)
    with Image.open(told.folder / "validation/final-00.png") as sheet:
        assert (sheets[-1].width, sheets[-1].height) == sheet.size
        assert sheet.convert("RGB").getpixel((20, 20)) == (200, 30, 30)  # the input image


def test_stderr_is_lines_without_load_failures(told):
    assert "\r" not in told.said
    for message in ("Failed to load", "Unable to import", "Enum subclass", "Loading weights", "examples/s"):
        assert message not in told.said
    assert "Training: 100 %, 2 of 2 [" in told.said


def test_the_last_lines_name_the_model_and_a_command_that_samples_from_it(told):
    model, command = told.said.splitlines()[-2:]
    assert model == f"model: {told.folder / 'lora'}"
    _, _, line = command.partition(": ")
    assert shlex.split(line)[:4] == ["finetrainers", "sample", "--model", str(told.folder)]
    assert shlex.split(line)[-2:] == ["--output", str(told.folder / "new_sample.mp4")]
    assert "--prompt null" in line
    script = f'finetrainers() {{ {sys.executable} -m framebridge_plugin "$@"; }}; {line} --steps 2'
    result = subprocess.run(["bash", "-c", script], env=command_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (told.folder / "new_sample.mp4").is_file()
    with Image.open(told.folder / "new_sample.png") as sheet:
        assert sheet.convert("RGB").getpixel((20, 20)) == (200, 30, 30)
    said = result.stderr.splitlines()
    assert [said[0].partition(" [")[0], *said[1:]] == [
        "Video 1 of 1: 100 %, 2 of 2",
        f"video: {told.folder / 'new_sample.mp4'}",
        f"contact sheet: {told.folder / 'new_sample.png'}",
    ]


def test_finetrainers_own_trackers_get_the_true_rank():
    argv = ["--model_name=cogvideox_bridge", "--training_type=lora", "--rank=4", "--lora_alpha=8", "--output_dir=x"]
    argv += ["--pretrained_model_name_or_path=x", f"--dataset_config={__file__}"]
    reported = parse(argv).to_dict()["additional_arguments"]["SFTLowRankConfig"]
    assert (reported["rank"], reported["lora_alpha"]) == (4, 8)


def sample_as_told(said: str) -> None:
    """Runs the line that a run ends with, in two steps where there are any."""
    program, *arguments = shlex.split(said.splitlines()[-1].partition(": ")[2])
    assert program == "finetrainers"
    one_call = main([*arguments, "--steps", "2"]) == 2  # a neural prior has no steps
    assert not one_call or main(arguments) == 0
    assert Path(arguments[arguments.index("--output") + 1]).is_file()


def test_the_command_says_the_guidance_of_the_validation_where_it_is_not_the_backbones(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    said = {}
    for scale in (1, 6):
        file = tmp_path / f"{scale}.csv"
        file.write_text(f"caption,image_path,guidance_scale\na,{tmp_path / '0.png'},{scale}\n")
        recipe, _ = resolve_recipe("cogvideox_bridge", [f"validation.validation_dataset_file={file}"])
        said[scale] = shlex.split(sample_line(recipe))
    assert said[1][said[1].index("--guidance-scale") + 1] == "1"
    assert "--guidance-scale" not in said[6]
