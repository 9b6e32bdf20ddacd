"""`finetrainers convert`: a checkpoint of the authors becomes a folder that `finetrainers sample` takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image

from framebridge_plugin.backbones.files import read_json
from framebridge_plugin.cli import main
from framebridge_plugin.data import UCF101_CLASSES
from tests.latte_reference import HEADS, reference_weights, write_checkpoint
from tests.tiny_models import make_tiny_image_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder `vae`, a picture, and the authors' tiny checkpoints `bridge.pt` and `prior.pt`."""
    folder = tmp_path_factory.mktemp("convert")
    make_tiny_image_vae().save_pretrained(folder / "vae")
    Image.effect_noise((40, 32), 50).save(folder / "picture.png")
    write_checkpoint(folder / "bridge.pt", reference_weights("bridge"))
    write_checkpoint(folder / "prior.pt", reference_weights("nwarp"), key="model")
    return folder


def options(folder: Path, checkpoint: str | Path, target: Path, *more: str) -> list[str]:
    names = {"--from": "reference", "--to": target, "--vae": folder / "vae", "--heads": HEADS}
    return ["convert", str(folder / checkpoint), *(str(item) for pair in names.items() for item in pair), *more]


def convert(folder: Path, checkpoint: str | Path, target: Path, capsys: Any, *more: str) -> tuple[int, str, list[str]]:
    code = main(options(folder, checkpoint, target, *more))
    output = capsys.readouterr()
    return code, output.out, [line for line in output.err.splitlines() if line.startswith("error: ")]


def test_from_checkpoint_to_video(folder, tmp_path, capsys):
    """With 101 classes, as the authors' own: then the labels have UCF-101's names."""
    weights = reference_weights("bridge")
    table = weights["y_embedder.embedding_table.weight"]
    rows = torch.randn(102, table.shape[1], generator=torch.Generator().manual_seed(0))
    checkpoint = write_checkpoint(tmp_path / "ucf.pt", weights | {"y_embedder.embedding_table.weight": rows})
    code, said, _ = convert(folder, checkpoint, tmp_path / "model", capsys)
    assert code == 0
    described, place = said.splitlines()
    assert described.startswith(f"{checkpoint}: bridge (transformer), weights 'ema': ")
    assert described.endswith("101 classes; no keys missing, none left over")
    assert place == f"model: {tmp_path / 'model'}"
    config = read_json(tmp_path / "model/transformer/config.json")
    assert config["class_names"] == list(UCF101_CLASSES)

    arguments = ["sample", "--model", str(tmp_path / "model"), "--image", str(folder / "picture.png"), "--steps=2"]
    arguments += ["--class-name", "GolfSwing", "--output", str(tmp_path / "swing.mp4")]
    assert main(arguments) == 0
    with av.open(str(tmp_path / "swing.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (len(frames), frames[0].shape) == (config["num_frames"], (32, 32, 3))
    assert (tmp_path / "swing.png").is_file()


def test_a_neural_prior_and_the_bridge_on_it(folder, tmp_path, capsys):
    code, said, _ = convert(folder, "prior.pt", tmp_path / "prior", capsys)
    assert code == 0
    assert ": neural_prior (neural_prior), weights 'model': " in said
    write_checkpoint(tmp_path / "both.pt", reference_weights("bridge_neural_prior"))
    code, _, errors = convert(folder, tmp_path / "both.pt", tmp_path / "both", capsys)
    assert (code, len(errors)) == (1, 1)
    assert "convert that one's checkpoint first" in errors[0]
    more = ("--neural-prior", str(tmp_path / "prior"))
    code, said, _ = convert(folder, tmp_path / "both.pt", tmp_path / "both", capsys, *more)
    assert code == 0
    assert ": bridge_neural_prior (transformer), " in said
    for model in ("prior", "both"):
        picture = ["--image", str(folder / "picture.png"), "--label", "10", "--output", str(tmp_path / "v.mp4")]
        steps = ["--steps=2"] if model == "both" else []
        assert main(["sample", "--model", str(tmp_path / model), *picture, *steps]) == 0


def test_keys_that_are_missing_or_left_over_are_named(folder, tmp_path, capsys):
    weights = reference_weights("bridge")
    write_checkpoint(tmp_path / "more.pt", weights | {"something.else": torch.zeros(3)})
    code, said, _ = convert(folder, tmp_path / "more.pt", tmp_path / "more", capsys)
    assert code == 0
    assert "no keys missing, left over: something.else" in said
    del weights["blocks.0.attn.qkv.bias"]
    write_checkpoint(tmp_path / "fewer.pt", weights)
    code, said, errors = convert(folder, tmp_path / "fewer.pt", tmp_path / "fewer", capsys)
    assert (code, said, len(errors)) == (1, "", 1)
    assert "keys are missing: blocks.0.attn.qkv.bias" in errors[0]
    assert not (tmp_path / "fewer").exists()


class Code:
    """Something that is no tensor and would run on being unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this runs",))


def test_what_is_refused(folder, tmp_path, capsys):
    torch.save({"ema": Code()}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "taken").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "taken/file").touch()
    for checkpoint, target, code, message in (
        ("nowhere.pt", "new", 2, "nowhere.pt: no such file"),
        (tmp_path / "pipe.pt", "new", 2, "pipe.pt: it is no regular file"),
        ("/dev/zero", "new", 2, "/dev/zero: it is no regular file"),
        (tmp_path / "taken", "new", 2, "taken: it is a folder"),
        (tmp_path / "code.pt", "new", 1, "refused, for it holds more than weights"),
        (tmp_path / "text.pt", "new", 1, "text.pt: "),
        ("bridge.pt", "taken", 1, "exists and is not an empty folder"),
    ):
        found, said, errors = convert(folder, checkpoint, tmp_path / target, capsys)
        assert (found, said, len(errors)) == (code, "", 1)
        assert message in errors[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from", "diffusers", "a.pt", "--to", "b"], "invalid choice: 'diffusers'"),
        (["--from", "reference", "--to", "b"], "CKPT.pt"),
        (["--from", "reference", "a.pt"], "--to"),
    ],
)
def test_a_wrong_command_line(arguments, message, capsys):
    assert main(["convert", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
