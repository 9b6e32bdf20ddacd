"""What `finetrainers sample` accepts and refuses for Latte models, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE
from framebridge_plugin.backbones.manifest import write_manifest
from framebridge_plugin.commands.sample_request import SampleRequest
from framebridge_plugin.errors import UsageError
from tests.cogvideox_files import write_model_folder
from tests.latte_files import NAMES, write_latte_folder, write_network


@pytest.fixture
def arguments(tmp_path):
    image = tmp_path / "swing.png"
    Image.effect_noise((96, 64), 50).save(image)
    model = write_latte_folder(tmp_path / "model")
    return {"model": str(model), "images": (image,), "class_names": ("GolfSwing",), "output": tmp_path / "out.mp4"}


def problems_of(arguments, **changes) -> list[str]:
    with pytest.raises(UsageError) as caught:
        SampleRequest(**arguments | changes)
    return str(caught.value).splitlines()


def test_defaults_are_the_references(arguments):
    settings = SampleRequest(**arguments).sampler_settings(LATTE_BRIDGE)
    assert settings == {"sampler": "sde", "order": 1, "eta": None, "grid": "linspace", "start": "booted"}
    changed = {"sampler": "dbim", "order": 2, "eta": 0.0, "grid": "lambda"}
    settings = SampleRequest(**arguments | changed).sampler_settings(LATTE_BRIDGE)
    assert settings == {**changed, "start": "booted"}


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": (), "labels": (0,)},
        {"class_names": ("3",)},
        {"num_frames": 16, "height": 256, "width": 256},
        {"model": "owner/latte", "class_names": ("NoSuchThing",)},  # known after the download
    ],
)
def test_right_values(arguments, changes):
    SampleRequest(**arguments | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"class_names": (), "prompts": ("a golf swing",)},
            "--prompt: a FrameBridgeLatte model takes classes, not text; give --class-name",
        ),
        (
            {"class_names": ()},
            "--class-name: give one for all images, or one for each (or give their numbers by --label)",
        ),
        ({"labels": (1,)}, "--class-name and --label: give one kind of them"),
        (
            {"class_names": ("golfswing",)},
            "--class-name golfswing: the model knows no class 'golfswing'; the nearest: GolfSwing",
        ),
        (
            {"class_names": (), "labels": (4,)},
            "--label 4: the model knows no class 4: its labels run from 0 to 3",
        ),
        (
            {"class_names": (), "labels": (-1,)},
            "--label -1: the model knows no class -1: its labels run from 0 to 3",
        ),
        (
            {"class_names": tuple(NAMES[:2])},
            "--class-name: give one for all, or one for each of the 1 images, not 2",
        ),
        ({"num_frames": 17}, "--num-frames: this model was trained on 16 and takes no other, not 17"),
        ({"height": 64}, "--height: this model was trained on 256 and takes no other, not 64"),
        ({"use_dynamic_cfg": True}, "--use-dynamic-cfg: is for models of text"),
        ({"transformer": "x/y"}, "--transformer: is for a model of text, such as CogVideoX; name the whole folder"),
        ({"data_rows": (0,)}, "--data-index: the images come from files or from the data set; leave it out"),
        ({"images": ()}, "--image: give at least one, or rows of the run's data set by --data-index"),
        ({"images": (Path("nowhere.mp4"),)}, "--image nowhere.mp4: no such file"),
    ],
)
def test_wrong_values(arguments, changes, message):
    assert problems_of(arguments, **changes)[0].startswith(message)


def test_classes_are_not_for_cogvideox(arguments, tmp_path):
    model = str(write_model_folder(tmp_path / "video", in_channels=32))
    for changes, option in (({}, "--class-name"), ({"class_names": (), "labels": (1,)}, "--label")):
        (problem,) = problems_of(arguments, model=model, **changes)
        assert problem == f"{option}: a CogVideoX model takes text, not classes; give --prompt"
    (problem,) = problems_of(arguments, model=model, class_names=())
    assert problem == "--prompt: give one for all images, or one for each"


def test_a_neural_prior_has_no_sampler(arguments, tmp_path):
    model = str(write_latte_folder(tmp_path / "prior", "neural_prior"))
    SampleRequest(**arguments | {"model": model})
    (problem,) = problems_of(arguments, model=model, steps=50)
    assert problem == "--steps: this model gives its video in one call, without a sampler; leave it out"
    (problem,) = problems_of(arguments, model=model, grid="trailing", guidance_scale=2.0)
    assert problem.startswith("--grid, --guidance-scale: this model gives")
    assert "this model was trained on 16" in problems_of(arguments, model=model, num_frames=9)[0]


def test_parts_that_do_not_fit(arguments, tmp_path):
    """The rules of the parts are asked: their table is in tests/backbones/test_latte_rules.py."""
    model = write_latte_folder(tmp_path / "both", "bridge_neural_prior", neural_prior={"num_frames": 8})
    (problem,) = problems_of(arguments, model=str(model))
    assert problem.startswith(f"--model {model / 'neural_prior'} does not fit the bridge: it has 8 frames, not 16")


def test_a_damaged_model(arguments, tmp_path):
    weights = tmp_path / "model/transformer/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (problem,) = problems_of(arguments)
    assert problem.startswith(f"--model {weights} has ")
    (tmp_path / "model/model_index.json").write_text('{"_class')
    (problem,) = problems_of(arguments)
    assert "model_index.json is not readable JSON" in problem
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (problem,) = problems_of(arguments)
    assert problem.endswith("model holds a FluxPipeline, which is no FrameBridge model")


# Runs


@pytest.mark.parametrize("where", ["model", "checkpoints/step_000900/model"])
def test_the_model_of_a_run(arguments, tmp_path, where):
    run = tmp_path / "run"
    write_latte_folder(run / where, bridge={"num_frames": 8})
    write_manifest((run / where).parent)
    for model in (run, run / where):
        SampleRequest(**arguments | {"model": str(model), "num_frames": 8})
        assert "trained on 8" in problems_of(arguments, model=str(model), num_frames=16)[0]


def test_rows_of_a_runs_data(arguments, tmp_path):
    run = tmp_path / "run"
    model = write_latte_folder(run / "checkpoints/step_000900/model")
    write_manifest(model.parent)
    rows = {"images": (), "class_names": (), "data_rows": (0, 5)}
    for place in (run, model.parent, model):
        (problem,) = problems_of(arguments, model=str(place), **rows)
        assert (
            problem == f"--data-index: {place} is not in the folder of a run with a dataset_config.json; give --image"
        )
    (run / "dataset_config.json").write_text("{}")
    for place in (run, model.parent, model):
        request = SampleRequest(**arguments | rows | {"model": str(place)})
        assert request.data_file() == run / "dataset_config.json"
        assert [request.condition_of(number) for number in range(2)] == [None, None]
    SampleRequest(**arguments | rows | {"model": str(run), "labels": (0, 1)})
    assert "not 3" in problems_of(arguments, model=str(run), **rows | {"labels": (0, 1, 2)})[0]
    assert problems_of(arguments, model=str(run), **rows | {"data_rows": (-1,)}) == [
        "--data-index: should be 0 or more"
    ]


def test_a_hub_id_has_no_run(arguments, tmp_path, monkeypatch):
    (tmp_path / "dataset_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert problems_of(arguments, model="owner/name", images=(), data_rows=(0,))[0].startswith("--data-index: ")


# LoRA


@pytest.fixture
def lora(tmp_path):
    """A function that writes a Latte LoRA's folder."""

    def write(network: str = "transformer", **info) -> str:
        folder = tmp_path / "run" / "lora"
        folder.mkdir(parents=True, exist_ok=True)
        info = {"pipeline_class": "FrameBridgeLattePipeline", "network_name": network, **info}
        (folder / "framebridge.json").write_text(json.dumps(info))
        layer = {f"{network}.proj_out.lora_{name}.weight": np.zeros((4, 4), np.float32) for name in "AB"}
        save_file(layer, folder / "pytorch_lora_weights.safetensors")
        return str(tmp_path / "run")

    return write


def test_a_lora_takes_classes_and_shapes_of_its_base_model(arguments, lora, tmp_path):
    run = lora(base_model=arguments["model"])
    SampleRequest(**arguments | {"model": run, "num_frames": 16})
    assert "trained on 16" in problems_of(arguments, model=run, num_frames=8)[0]
    assert "knows no class 'x'" in problems_of(arguments, model=run, class_names=("x",))[0]
    assert "--transformer: is for a model of text" in problems_of(arguments, model=run, transformer="x/y")[0]
    other = str(write_network(tmp_path / "other", stage="bridge", num_frames=8))
    run = lora(base_model=arguments["model"], replaced_components={"transformer": other})
    SampleRequest(**arguments | {"model": run, "num_frames": 8})
    prior = write_latte_folder(tmp_path / "prior", "neural_prior")
    run = lora("neural_prior", base_model=str(prior))
    SampleRequest(**arguments | {"model": run})
    assert "without a sampler" in problems_of(arguments, model=run, steps=2)[0]


@pytest.mark.parametrize(
    "info, message",
    [
        ({"base_model": "/nowhere"}, "its base model: no such folder: /nowhere"),
        ({"network": "neural_prior"}, "is a model of latte_bridge, not of latte_neural_prior"),
        ({"replaced_components": {"vae": "/nowhere"}}, "its vae: no such folder: /nowhere"),
        ({"base_model": 3}, "framebridge.json: is not as it was written"),
    ],
)
def test_a_damaged_lora(arguments, lora, info, message):
    (problem,) = problems_of(arguments, model=lora(**{"base_model": arguments["model"], **info}))
    assert message in problem


def test_a_lora_on_a_neural_prior_that_does_not_fit(arguments, lora, tmp_path):
    base = write_latte_folder(tmp_path / "base", "bridge_neural_prior")
    other = write_network(tmp_path / "other", stage="neural_prior", num_frames=8)
    run = lora(base_model=str(base), replaced_components={"neural_prior": str(other)})
    (problem,) = problems_of(arguments, model=run)
    assert f"its neural_prior: {other} does not fit the bridge: it has 8 frames, not 16" in problem
