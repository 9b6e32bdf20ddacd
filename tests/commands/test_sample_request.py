from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from framebridge_plugin.backbones.cogvideox.facts import COGVIDEOX
from framebridge_plugin.backbones.manifest import write_manifest
from framebridge_plugin.commands.sample_request import SampleRequest
from framebridge_plugin.errors import UsageError
from tests.cogvideox_files import write_model_folder

DEFAULTS = {"sampler": "sde", "order": 1, "eta": None, "grid": "trailing", "start": "booted"}


@pytest.fixture
def arguments(tmp_path):
    image = tmp_path / "cat.png"
    Image.effect_noise((96, 64), 50).save(image)
    model = write_model_folder(tmp_path / "model", in_channels=32)
    return {"model": str(model), "images": (image,), "prompts": ("a cat",), "output": tmp_path / "out.mp4"}


def problems_of(arguments, **changes) -> list[str]:
    with pytest.raises(UsageError) as caught:
        SampleRequest(**arguments | changes)
    return str(caught.value).splitlines()


def test_defaults(arguments):
    request = SampleRequest(**arguments)
    assert request.sampler_settings(COGVIDEOX) == DEFAULTS
    assert (request.steps, request.guidance_scale, request.use_dynamic_cfg) == (None, None, False)
    assert (request.num_frames, request.height, request.width, request.num_videos) == (None, None, None, 1)
    assert request.video_paths() == [arguments["output"]]
    assert request.contact_sheet_path() == arguments["output"].with_suffix(".png")


def test_many_videos(arguments):
    request = SampleRequest(**arguments | {"images": arguments["images"] * 3, "num_videos": 4})
    names = [path.name for path in request.video_paths()]
    assert len(set(names)) == 12
    assert (names[0], names[11]) == ("out-00.mp4", "out-11.mp4")
    assert [request.condition_of(image) for image in range(3)] == ["a cat"] * 3
    own = SampleRequest(**arguments | {"images": arguments["images"] * 2, "prompts": ("a", "b")})
    assert [own.condition_of(image) for image in range(2)] == ["a", "b"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps 0: should be greater than or equal to 1"),
        ({"steps": 1001}, "--steps: the grid has 1000 at most, not 1001"),
        ({"eta": 1.5, "sampler": "dbim"}, "--eta 1.5: should be less than or equal to 1"),
        ({"eta": float("nan"), "sampler": "dbim"}, "--eta nan: should be a finite number"),
        ({"eta": 0.5}, "--eta: the sampler sde has eta 1"),
        ({"order": 2}, "--order: the sampler sde has order 1"),
        ({"order": 3}, "--order 3: should be 1 or 2"),
        ({"start": "clean_prior", "sampler": "dbim"}, "--start: clean_prior needs eta 1"),
        ({"fps": 0.0}, "--fps 0.0: should be greater than 0"),
        ({"guidance_scale": -1.0}, "--guidance-scale"),
        ({"guidance_scale": float("inf")}, "--guidance-scale"),
        ({"seed": -1}, "--seed"),
        ({"num_videos": 0}, "--num-videos"),
        ({"num_frames": 0}, "--num-frames 0: should be greater"),
        ({"num_frames": 10}, "--num-frames: the VAE returns only 8 k + 1 frames"),
        ({"height": 100}, "--height: should be a multiple of 16"),
        ({"prompts": ("a", "b")}, "--prompt: give one for all, or one for each of the 1 images, not 2"),
        ({"output": Path("out.gif")}, "--output out.gif: should end in .mp4"),
        ({"model": "/nowhere"}, "--model no such folder: /nowhere"),
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
        {"steps": 1500, "grid": "lambda"},
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
    write_model_folder(run / "model", temporal_compression=2, in_channels=32)
    SampleRequest(**arguments | {"model": str(run), "num_frames": 5})
    assert "4 k + 1" in problems_of(arguments, model=str(run), num_frames=7)[0]


def test_a_run_that_has_not_ended(arguments, tmp_path):
    run = tmp_path / "run"
    for step, compression in ((900, 4), (1000, 2)):
        checkpoint = run / f"checkpoints/step_{step:06d}"
        write_model_folder(checkpoint / "model", temporal_compression=compression, in_channels=32)
        write_manifest(checkpoint, written=step)
    SampleRequest(**arguments | {"model": str(run), "num_frames": 5})
    assert "4 k + 1" in problems_of(arguments, model=str(run), num_frames=7)[0]


def test_a_folder_without_a_model(arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    (problem,) = problems_of(arguments, model=str(tmp_path / "empty"))
    assert problem.startswith(f"--model {tmp_path / 'empty'}: is neither a model")


def test_a_plain_model_needs_a_transformer(arguments, tmp_path):
    plain = write_model_folder(tmp_path / "plain")
    (problem,) = problems_of(arguments, model=str(plain))
    assert problem.startswith(f"--model {plain}: a plain CogVideoX: its network has 16 input channels")
    assert problem.endswith("train it with `finetrainers train`, or give a fine-tuned --transformer")
    SampleRequest(**arguments | {"model": str(plain), "transformer": f"{arguments['model']}/transformer"})
    SampleRequest(**arguments | {"model": str(plain), "transformer": "owner/name"})
    for transformer in (plain / "transformer", plain):
        (problem,) = problems_of(arguments, model=str(plain), transformer=str(transformer))
        assert problem.endswith("a bridge's has 32; give a fine-tuned one")


def test_a_transformer_is_its_folder_or_one_around_it(arguments, tmp_path):
    plain, run = write_model_folder(tmp_path / "plain"), tmp_path / "run"
    write_model_folder(run / "model", in_channels=32)
    (tmp_path / "checkpoint-1000").mkdir()
    (tmp_path / "checkpoint-1000/transformer").symlink_to(run / "model/transformer")
    for transformer in (run / "model/transformer", run / "model", run, tmp_path / "checkpoint-1000"):
        SampleRequest(**arguments | {"model": str(plain), "transformer": str(transformer)})
    other = plain / "vae"
    assert "holds a AutoencoderKLCogVideoX" in problems_of(arguments, model=str(plain), transformer=str(other))[0]


@pytest.mark.parametrize("option", ["model", "transformer"])
def test_a_checkpoint_file_is_answered_with_what_converts_it(arguments, tmp_path, option):
    (tmp_path / "the prior.pt").write_bytes(b"PK")
    found = [line for line in problems_of(arguments, **{option: str(tmp_path / "the prior.pt")}) if "convert" in line]
    command = f"finetrainers convert --from reference '{tmp_path}/the prior.pt' --to '{tmp_path}/the prior'"
    assert [line.startswith(f"--{option} ") and line.endswith(f": {command}") for line in found] == [True]


def test_a_model_that_the_bridge_does_not_know(arguments, tmp_path):
    model = write_model_folder(tmp_path / "foreign", in_channels=32)
    (model / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    (problem,) = problems_of(arguments, model=str(model))
    assert problem.startswith(f"--model {model / 'scheduler'} is for a FlowMatchEulerDiscreteScheduler")
    (model / "transformer" / "config.json").write_text(
        '{"_class_name": "CogVideoXTransformer3DModel", "patch_size_t": 2}'
    )
    (problem,) = problems_of(arguments, transformer=str(model / "transformer"))
    assert problem.startswith(f"--transformer {model / 'transformer'} is a CogVideoX 1.5")


@pytest.fixture
def lora(tmp_path):
    """A LoRA run's folder, and a function that writes what its LoRA says of its base model."""

    def write(**info) -> str:
        folder = tmp_path / "run" / "lora"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "framebridge.json").write_text(json.dumps(info))
        layer = {f"transformer.patch_embed.proj.lora_{name}.weight": np.zeros((4, 4), np.float32) for name in "AB"}
        save_file(layer, folder / "pytorch_lora_weights.safetensors")
        return str(tmp_path / "run")

    return write


def test_the_base_model_of_a_lora(arguments, lora, tmp_path):
    base = str(write_model_folder(tmp_path / "base", temporal_compression=2))
    run = lora(base_model=base)
    SampleRequest(**arguments | {"model": run, "num_frames": 5})
    assert "4 k + 1" in problems_of(arguments, model=run, num_frames=7)[0]
    assert "4 k + 1" in problems_of(arguments, model=f"{run}/lora", num_frames=7)[0]
    # A replaced VAE brings its own rule; what a hub id allows is CogVideoX's.
    run = lora(base_model=base, replaced_components={"vae": f"{arguments['model']}/vae"})
    assert "8 k + 1" in problems_of(arguments, model=run, num_frames=5)[0]
    run = lora(base_model="zai-org/CogVideoX-2b")
    assert "8 k + 1" in problems_of(arguments, model=run, num_frames=5)[0]


@pytest.mark.parametrize(
    "info, message",
    [
        ({"base_model": "/nowhere"}, "its base model: no such folder: /nowhere"),
        ({"base_model": "a/b", "replaced_components": {"vae": "/nowhere"}}, "its vae: no such folder: /nowhere"),
        ({}, "framebridge.json: is not as it was written"),
        ({"base_model": 3}, "framebridge.json: is not as it was written"),
    ],
)
def test_a_damaged_lora(arguments, lora, info, message):
    (problem,) = problems_of(arguments, model=lora(**info))
    assert message in problem


def test_the_file_of_a_lora_is_looked_at(arguments, lora):
    run = lora(base_model=arguments["model"])
    SampleRequest(**arguments | {"model": run})
    file = Path(run, "lora", "pytorch_lora_weights.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    (problem,) = problems_of(arguments, model=run)
    assert problem.startswith(f"--model {file} has ")


def test_a_lora_takes_no_transformer(arguments, lora):
    transformer = f"{arguments['model']}/transformer"
    (problem,) = problems_of(arguments, model=lora(base_model=arguments["model"]), transformer=transformer)
    assert problem.startswith("--transformer: ")
    assert problem.endswith("leave it out")


def test_where_the_videos_go(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    SampleRequest(**arguments | {"output": tmp_path / "new" / "folder" / "out.mp4"})
    assert not (tmp_path / "new").exists()
    (problem,) = problems_of(arguments, output=tmp_path / "file" / "out.mp4")
    assert problem.endswith(f"{tmp_path / 'file'} is a file: name another folder")
    (tmp_path / "out-1.mp4").mkdir()
    (tmp_path / "out.png").mkdir()
    found = problems_of(arguments, num_videos=2)
    assert found == [f"--output {tmp_path / name}: is a folder" for name in ("out-1.mp4", "out.png")]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_where_nothing_can_be_written(arguments, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    (problem,) = problems_of(arguments, output=tmp_path / "locked" / "new" / "out.mp4")
    assert problem.endswith(f"{tmp_path / 'locked'} is not writable: name another folder")


def test_pictures_that_are_none(arguments, tmp_path):
    image = arguments["images"][0]
    content = image.read_bytes()
    for broken, message in (
        (content[: len(content) // 2], "cannot be read"),
        (b"", "is no picture; give a PNG, JPEG, WebP, BMP, GIF or TIFF file"),
        (b"text", "is no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "is no picture"),  # Pillow would start Ghostscript
    ):
        image.write_bytes(broken)
        assert message in problems_of(arguments)[0]
    (tmp_path / "clips.mp4").mkdir()
    for folder in (tmp_path, tmp_path / "clips.mp4"):
        assert problems_of(arguments, images=(folder,)) == [
            f"--image {folder}: is a folder; name the pictures in it, such as {folder}/*.png"
        ]
