"""LoRA folders of an earlier version, with the input projection in a second file: converted, refused elsewhere.

`tests/data/two_file_lora` was written by that version: rank 4, alpha 8, two updates on a tiny model.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from framebridge_plugin.backbones.cogvideox.adapter import call_transformer, load_bridge_transformer
from framebridge_plugin.backbones.cogvideox.pipeline import FrameBridgeCogVideoXPipeline
from framebridge_plugin.backbones.folders import EXTRA_WEIGHTS_FILE, LORA_FILE, LORA_INFO_FILE
from framebridge_plugin.cli import main
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.errors import FrameBridgeError
from tests.tiny_models import LATENT_CHANNELS, make_tiny_cogvideox
from tests.training.run_results import LORA

TWO_FILES = Path(__file__).parents[1] / "data/two_file_lora"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cogvideox(tmp_path_factory.mktemp("base") / "model", sample_size=32)


@pytest.fixture
def old(model: Path, tmp_path: Path) -> Path:
    """The LoRA folder in a run's, with the base model where it says; names that a shell would split."""
    folder = tmp_path / "old run" / "lora"
    shutil.copytree(TWO_FILES, folder)
    info = json.loads((folder / LORA_INFO_FILE).read_text())
    (folder / LORA_INFO_FILE).write_text(json.dumps({**info, "base_model": str(model)}))
    return folder


@torch.no_grad()
def output(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 2 * LATENT_CHANNELS, 8, 8, generator=generator)
    text = torch.randn(2, 16, 16, generator=generator)
    return call_transformer(transformer, latents, torch.tensor([3.5, 965.7]), text)


def command_in(line: str) -> list[str]:
    return shlex.split(line[line.index("finetrainers convert") :])


def test_the_command_that_a_refusal_gives_makes_the_same_network(old, model, train):
    expected = load_bridge_transformer(str(model), subfolder="transformer")
    base = output(expected)
    # What that version did.
    expected.load_state_dict(load_file(old / EXTRA_WEIGHTS_FILE), strict=False)
    expected.load_lora_adapter(old, weight_name=LORA_FILE)
    assert (output(expected) - base).abs().max() > 1e-2

    with pytest.raises(FrameBridgeError) as refusal:
        open_pipeline(str(old.parent))
    _, *arguments = command_in(str(refusal.value))
    assert main(arguments) == 0
    converted = Path(arguments[-1])
    assert sorted(path.name for path in converted.iterdir()) == [LORA_INFO_FILE, LORA_FILE, "scheduler"]
    pipeline = open_pipeline(str(converted))
    torch.testing.assert_close(output(pipeline.transformer), output(expected), rtol=0, atol=1e-6)
    assert pipeline.config.num_frames == 9
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(output(pipeline.transformer), output(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        pipeline.transformer.patch_embed.proj.bias, expected.patch_embed.proj.bias, rtol=0, atol=1e-7
    )

    begun = train(*LORA, f"model.pretrained_model_name_or_path={model}", f"framebridge.start_from={converted}")
    assert begun.returncode == 2
    assert "has trained biases" in begun.stderr


def test_nothing_else_takes_it(old, model, train, tmp_path, capfd):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    wanted = ["finetrainers", "convert", "--from", "two-file-lora", str(old), "--to", f"{old}-converted"]

    options = ["--image", str(tmp_path / "image.png"), "--prompt", "x", "--output", str(tmp_path / "x.mp4")]
    assert main(["sample", "--model", str(old.parent), *options]) == 2
    assert command_in(capfd.readouterr().err.strip().splitlines()[-1]) == wanted
    assert not (tmp_path / "x.mp4").exists()

    for source in (old.parent, old):
        for option in (
            f"model.pretrained_model_name_or_path={source}",
            f"model.transformer_id={source}",
            f"framebridge.start_from={source}",
        ):
            begun = train(option)
            assert begun.returncode == 2
            assert command_in(next(line for line in begun.stderr.splitlines() if "convert" in line)) == wanted
        assert main(["conformance", "--model-name", "cogvideox_bridge", "--model", str(source)]) == 1
        assert command_in(capfd.readouterr().err.strip().splitlines()[-1]) == wanted
        assert main(["sample", "--model", str(model), "--transformer", str(source), *options]) == 2
        assert command_in(capfd.readouterr().err.strip().splitlines()[-1]) == wanted

    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(model)
    for arguments in ({}, {"weight_name": LORA_FILE}):
        with pytest.raises(FrameBridgeError) as refusal:
            pipeline.load_lora_weights(old, **arguments)
        assert command_in(str(refusal.value)) == wanted
    for source, arguments in ((old / LORA_FILE, {}), (str(old.parent), {"subfolder": "lora"})):
        with pytest.raises(FrameBridgeError) as refusal:
            pipeline.load_lora_weights(source, **arguments)
        assert command_in(str(refusal.value)) == wanted


def test_a_resume_from_its_checkpoint_is_refused(old, train, tmp_path):
    checkpoint = tmp_path / "run/checkpoints/step_000002"
    shutil.copytree(old, checkpoint / "lora")
    resumed = train(*LORA, "checkpoints.resume_from_checkpoint=latest")
    assert resumed.returncode == 1
    line = resumed.stderr.strip().splitlines()[-1]
    assert command_in(line)[4] == str(checkpoint / "lora")


def test_what_cannot_be_converted_is_refused_in_one_line(old, tmp_path, capfd):
    def converted(source: Path, *more: str) -> int:
        return main(["convert", "--from", "two-file-lora", str(source), "--to", str(tmp_path / "new"), *more])

    assert converted(tmp_path / "nothing") == 2
    assert converted(old, "--vae", "vae") == 2
    (old / "scheduler").rename(tmp_path / "no lora")
    assert converted(tmp_path / "no lora") == 1
    (old / EXTRA_WEIGHTS_FILE).write_bytes((old / EXTRA_WEIGHTS_FILE).read_bytes()[:-10])
    assert converted(old) == 1
    (old / LORA_INFO_FILE).write_text(json.dumps({"base_model": "/nowhere"}))
    assert converted(old) == 1
    assert len([line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]) == 5
    assert not (tmp_path / "new").exists()
