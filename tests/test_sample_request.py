from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from framebridge_plugin.errors import UsageError
from framebridge_plugin.sample_request import SampleRequest
from tests.cogvideox_files import write_model_folder


@pytest.fixture
def arguments(tmp_path):
    image = tmp_path / "cat.png"
    Image.effect_noise((96, 64), 50).save(image)
    model = write_model_folder(tmp_path / "model")
    return {"model": str(model), "images": (image,), "prompts": ("a cat",), "output": tmp_path / "out.mp4"}


def problems_of(arguments, **changes) -> list[str]:
    with pytest.raises(UsageError) as caught:
        SampleRequest(**arguments | changes)
    return str(caught.value).splitlines()


def test_defaults(arguments):
    request = SampleRequest(**arguments)
    assert (request.steps, request.sampler, request.order, request.eta) == (50, "sde", 1, None)
    assert (request.grid, request.start, request.guidance_scale) == ("trailing", "booted", 6.0)
    assert (request.num_frames, request.height, request.width, request.num_videos) == (None, None, None, 1)
    assert request.video_paths() == [arguments["output"]]
    assert request.contact_sheet_path() == arguments["output"].with_suffix(".png")


def test_many_videos(arguments):
    request = SampleRequest(**arguments | {"images": arguments["images"] * 3, "num_videos": 4})
    names = [path.name for path in request.video_paths()]
    assert len(set(names)) == 12
    assert (names[0], names[11]) == ("out-00.mp4", "out-11.mp4")
    assert [request.prompt_of(image) for image in range(3)] == ["a cat"] * 3
    own = SampleRequest(**arguments | {"images": arguments["images"] * 2, "prompts": ("a", "b")})
    assert [own.prompt_of(image) for image in range(2)] == ["a", "b"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps 0: should be 1 to 1000"),
        ({"steps": 1001}, "--steps 1001"),
        ({"eta": 1.5, "sampler": "dbim"}, "--eta 1.5: should be 0 to 1"),
        ({"eta": float("nan"), "sampler": "dbim"}, "--eta nan: should be 0 to 1"),
        ({"eta": 0.5}, "the SDE is eta 1"),
        ({"order": 2}, "the SDE has order 1 only"),
        ({"start": "clean_prior", "sampler": "dbim"}, "--start clean_prior: needs the noise"),
        ({"guidance_scale": -1.0}, "--guidance-scale"),
        ({"guidance_scale": float("inf")}, "--guidance-scale"),
        ({"seed": -1}, "--seed"),
        ({"num_videos": 0}, "--num-videos"),
        ({"num_frames": 0}, "--num-frames 0: should be 1 or more"),
        ({"num_frames": 10}, "--num-frames: the VAE returns only 8 k + 1 frames"),
        ({"height": 100}, "--height: should be a multiple of 16"),
        ({"prompts": ("a", "b")}, "--prompt: give one for all, or one for each of the 1 images, not 2"),
        ({"output": Path("out.gif")}, "--output out.gif: should end in .mp4"),
        ({"model": "/nowhere"}, "--model /nowhere: no such folder"),
        ({"transformer": "/nowhere"}, "--transformer no such folder: /nowhere"),
        ({"images": (Path("nowhere.png"),)}, "--image nowhere.png: no such file"),
    ],
)
def test_wrong_values(arguments, changes, message):
    (problem, *_) = problems_of(arguments, **changes)
    assert message in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "dbim", "order": 2, "eta": 0.0},
        {"sampler": "dbim", "eta": 1.0, "start": "clean_prior"},
        {"start": "clean_prior"},
        {"eta": 1.0},
        {"num_frames": 1, "height": 16, "width": 32},
        {"model": "zai-org/CogVideoX-2b", "num_frames": 5},  # what a hub id allows is known after the download
    ],
)
def test_right_values(arguments, changes):
    SampleRequest(**arguments | changes)


def test_all_errors_at_once(arguments):
    assert len(problems_of(arguments, steps=0, order=2, output=Path("x"), images=(Path("y"),))) == 4


def test_a_damaged_model(arguments):
    weights = Path(arguments["model"]) / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "its header announces" in problems_of(arguments)[0]


def test_the_model_of_a_run(arguments, tmp_path):
    run = tmp_path / "run"
    write_model_folder(run / "model", temporal_compression=2)
    SampleRequest(**arguments | {"model": str(run), "num_frames": 5})
    assert "4 k + 1" in problems_of(arguments, model=str(run), num_frames=7)[0]


def test_pictures_that_are_none(arguments, tmp_path):
    image = arguments["images"][0]
    content = image.read_bytes()
    for broken, message in (
        (content[: len(content) // 2], "cannot be read"),
        (b"", "is no picture; give a PNG or JPEG file"),
        (b"text", "is no picture"),
    ):
        image.write_bytes(broken)
        assert message in problems_of(arguments)[0]
    assert "no such file" in problems_of(arguments, images=(tmp_path,))[0]
