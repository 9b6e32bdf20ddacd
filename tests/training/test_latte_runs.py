"""Our trainer on the Latte specifications: real clips in class folders, tiny real models, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from framebridge_plugin.commands.report_runs import read_run
from framebridge_plugin.commands.report_videos import collect_rows
from framebridge_plugin.commands.sample import open_pipeline
from tests.tiny_models import CLASS_NAMES, make_clips, make_tiny_latte, moving_square, write_video
from tests.training.run_results import LORA, assert_same_weights, heldout, losses, succeeded
from tests.training.test_told import sample_as_told

KINDS = ("bridge", "neural_prior", "bridge_neural_prior")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("latte-runs"))


def write_inputs(folder: Path) -> Path:
    """Two clips for each of three classes, and a model of each kind that knows these and one more."""
    for label, name in enumerate(CLASS_NAMES[:3]):
        (folder / "clips" / name).mkdir(parents=True)
        for number in range(2):
            write_video(folder / f"clips/{name}/{number}.mp4", moving_square(2 * label + number, 8, 64, 64))
        (folder / "heldout" / name).mkdir(parents=True)
        write_video(folder / f"heldout/{name}/0.mp4", moving_square(7 + label, 8, 64, 64))
    for kind in KINDS:
        make_tiny_latte(folder / kind, kind)
    Image.new("RGB", (80, 64), (200, 30, 30)).save(folder / "red.png")
    clip = folder / f"clips/{CLASS_NAMES[0]}/0.mp4"
    rows = ["caption,image_path,video_path,num_inference_steps", f"down,{folder / 'red.png'},{clip},2"]
    (folder / "validation.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def recipe_file(inputs: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, inputs)


def write_recipe(folder: Path, inputs: Path) -> Path:
    """Four short updates of the bridge."""
    recipe = {
        "model": {"model_name": "latte_bridge", "pretrained_model_name_or_path": str(inputs / "bridge")},
        "framebridge": {
            "ema_decay": 0.9,
            "data": {"class_root": str(inputs / "clips"), "num_frames": 4, "height": 64, "width": 64},
        },
        "training": {"training_type": "full-finetune", "batch_size": 2, "seed": 7},
        "optimization": {"train_steps": 4, "lr": 1e-2, "lr_scheduler": "constant", "lr_warmup_steps": 0},
        "precision": {"transformer_dtype": "fp32", "vae_dtype": "fp32"},
        "checkpoints": {"output_dir": str(folder / "run"), "checkpointing_steps": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def options(inputs: Path, kind: str) -> tuple[str, ...]:
    name = "latte_neural_prior" if kind == "neural_prior" else "latte_bridge"
    return (f"model.model_name={name}", f"model.pretrained_model_name_or_path={inputs / kind}")


@pytest.mark.parametrize(
    ("kind", "training_type"),
    [*((kind, "full") for kind in KINDS), ("neural_prior", "lora"), ("bridge_neural_prior", "lora")],
)
def test_trains_validates_saves_and_resumes_bit_for_bit(train, inputs, tmp_path, kind, training_type):
    chosen = (*options(inputs, kind), *(LORA if training_type == "lora" else ()))
    validating = (f"validation.validation_dataset_file={inputs / 'validation.csv'}", "validation.validation_steps=3")
    measuring = (f"validation.heldout.class_root={inputs / 'heldout'}", "validation.heldout.clips=1")
    result = train(*chosen, *validating, *measuring, output="whole")
    assert succeeded(result)
    sample_as_told(result.stderr)
    assert succeeded(train(*chosen, "optimization.train_steps=2", output="parts"))
    assert succeeded(train(*chosen, *measuring, "checkpoints.resume_from_checkpoint=latest", output="parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4
    measured = heldout(tmp_path / "whole")
    assert list(measured) == [0, 3, 4]
    assert len(measured[0]) == (3 if kind == "neural_prior" else 23)
    assert heldout(tmp_path / "parts") == {4: measured[4]}
    assert measured[4]["heldout/x0_error"] != measured[3]["heldout/x0_error"]

    name = "lora" if training_type == "lora" else "model"
    assert_same_weights(tmp_path / "whole" / name, tmp_path / "parts" / name)
    videos = sorted(path.stem for path in (tmp_path / "whole/validation").glob("*.mp4"))
    assert videos == ["final-00", "step000003-00"]
    pipeline = open_pipeline(str(tmp_path / "whole"))
    result = pipeline(image=Image.open(inputs / "red.png"), class_label="down", num_inference_steps=1)
    assert [frame.size for frame in result.frames[0]] == [(64, 64)] * 4
    if (kind, training_type) == ("bridge", "full"):
        report = read_run(tmp_path / "parts", "parts")
        assert report.summary["state"] == "done"
        assert report.summary["begun"].endswith(", started 2 times")
        assert list(report.series["loss"]) == [1, 2, 3, 4]
        rows, notes = collect_rows([read_run(tmp_path / "whole", "whole"), report])
        assert [[item.label for item in row.samples["whole"]] for row in rows] == [
            ["update 3", "at the end, update 4"]
        ]
        assert [[item.label for item in row.given] for row in rows] == [["input", "truth"]]
        assert notes == ["parts: no validation has written a video"]


def test_a_resume_on_another_neural_prior_is_refused(train, inputs, tmp_path):
    """Under the same name: the checkpoint does not hold it."""
    prior = make_tiny_latte(tmp_path / "prior", "neural_prior")
    chosen = (*options(inputs, "bridge_neural_prior"), f"framebridge.neural_prior={prior}")
    resume = ("checkpoints.resume_from_checkpoint=latest", "optimization.train_steps=3")
    assert succeeded(train(*chosen, "optimization.train_steps=2"))
    file = prior / "neural_prior/diffusion_pytorch_model.safetensors"
    changed = {name: tensor + 0.01 for name, tensor in load_file(file).items()}
    file.unlink()  # a hard link of it is part of the run's model
    save_file(changed, file)
    refused = train(*chosen, *resume)
    assert refused.returncode == 1
    assert "it was trained with neural_prior 'of digest " in refused.stderr.strip().splitlines()[-1]


def test_a_resume_of_another_stage_is_refused(train, inputs):
    resume = ("checkpoints.resume_from_checkpoint=latest", "optimization.train_steps=2")
    assert succeeded(train(*options(inputs, "bridge"), "optimization.train_steps=1"))
    for kind, message in (
        ("neural_prior", "it was trained with model_name 'latte_bridge'"),
        ("bridge_neural_prior", "it was trained without neural_prior;"),
    ):
        refused = train(*options(inputs, kind), *resume)
        assert refused.returncode == 1
        assert message in refused.stderr.strip().splitlines()[-1]


def test_labels_and_latents_can_be_precomputed(train, inputs, tmp_path):
    chosen = options(inputs, "bridge_neural_prior")
    assert succeeded(train(*chosen, output="plain"))
    assert succeeded(
        train(*chosen, "dataset.enable_precomputation=true", "dataset.precomputation_items=4", output="precomputed")
    )
    assert losses(tmp_path / "precomputed") == losses(tmp_path / "plain")
    assert_same_weights(tmp_path / "precomputed/model", tmp_path / "plain/model")


def test_a_class_that_the_model_does_not_know_ends_the_run_before_any_step(train, tmp_path):
    """In captions, which nothing looks at before the clips are listed."""
    clips = make_clips(tmp_path / "clips", count=2, frames=4, captions=("up", "upwards"))
    result = train("framebridge.data.class_root=null", f"framebridge.data.data_root={clips}")
    assert result.returncode == 1
    assert "data set 0: the model knows no class 'upwards'" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_an_unknown_class_in_the_validation_file_ends_the_run_before_any_step(train, inputs, tmp_path):
    rows = ["caption,image_path", f"sideways,{inputs / 'red.png'}"]
    (tmp_path / "validation.csv").write_text("\n".join(rows) + "\n")
    result = train(f"validation.validation_dataset_file={tmp_path / 'validation.csv'}")
    assert result.returncode != 0
    assert "'sideways'" in result.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
