"""The authors' checkpoints become model folders that the pipeline opens and samples from, or nothing at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from framebridge_plugin import FrameBridgeLattePipeline
from framebridge_plugin.backbones.latte.conversion import convert_reference_checkpoint
from framebridge_plugin.backbones.latte.reference_checkpoints import PRIOR_PREFIX, ReferenceCheckpoint
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers import FrameBridgeScheduler
from tests.latte_reference import HEADS, reference_weights, write_checkpoint
from tests.reference_vectors import load_vectors, relative_error
from tests.tiny_models import make_tiny_cogvideox, make_tiny_image_vae, make_tiny_latte

VECTORS, _ = load_vectors("latte_model")
NAMES = [f"class {number}" for number in range(11)]
WEIGHTS = {
    "bridge": lambda: reference_weights("bridge"),
    "neural_prior": lambda: reference_weights("nwarp"),
    "bridge_neural_prior": lambda: reference_weights("bridge_neural_prior"),
    "both": lambda: reference_weights("bridge_neural_prior") | reference_weights("nwarp"),
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    make_tiny_image_vae().save_pretrained(folder)
    return folder


def convert(folder: Path, what: str, vae: Path | str, **settings) -> ReferenceCheckpoint:
    file = folder / f"{what}.pt"
    if not file.exists():
        write_checkpoint(file, WEIGHTS[what]())
    settings = {"class_names": NAMES, "num_attention_heads": HEADS, **settings}
    return convert_reference_checkpoint(file, folder / f"{what}-model", vae=str(vae), **settings)


def open_model(folder: Path) -> FrameBridgeLattePipeline:
    pipeline = FrameBridgeLattePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: FrameBridgeLattePipeline) -> torch.Tensor:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2))
    frames = pipeline(
        image, "class 3", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt"
    ).frames
    assert frames.shape == (1, 6, 3, 32, 32)
    assert frames.isfinite().all()
    return frames


@torch.no_grad()
def test_a_bridge(tmp_path, vae):
    converted = convert(tmp_path, "bridge", vae)
    assert (converted.stage, converted.leftover_keys) == ("bridge", [])
    folder = tmp_path / "bridge-model"
    parts = ["manifest.json", "model_index.json", "scheduler", "transformer", "vae"]
    assert sorted(path.name for path in folder.iterdir()) == parts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bridge-model", "bridge.pt"]

    pipeline = open_model(folder)
    assert isinstance(pipeline.scheduler, FrameBridgeScheduler)
    settings = {"target": "eps_psi", "alignment": "none", "backbone": None, "sampler": "sde", "grid": "linspace"}
    assert settings.items() <= dict(pipeline.scheduler.config).items()
    assert (pipeline.config.num_inference_steps, pipeline.config.guidance_scale) == (1000, 7.0)
    assert pipeline.neural_prior is None
    assert pipeline.transformer.config.class_names == NAMES
    output = pipeline.transformer(VECTORS["x"], VECTORS["t_frac"], VECTORS["y"]).sample
    assert relative_error(output, VECTORS["bridge.out_frac"]) < 1e-5
    sample(pipeline)


@torch.no_grad()
def test_a_neural_prior_and_the_bridge_on_it(tmp_path, vae):
    assert convert(tmp_path, "neural_prior", vae).stage == "neural_prior"
    prior_folder = tmp_path / "neural_prior-model"
    assert sorted(path.name for path in prior_folder.iterdir()) == [
        "manifest.json",
        "model_index.json",
        "neural_prior",
        "vae",
    ]
    prior = open_model(prior_folder)
    assert prior.transformer is None
    assert prior.scheduler is None
    assert (
        relative_error(prior.neural_prior(VECTORS["x_nwarp"], None, VECTORS["y"]).sample, VECTORS["nwarp.out"]) < 1e-5
    )
    sample(prior)

    converted = convert(tmp_path, "bridge_neural_prior", vae, neural_prior=prior_folder)
    assert (converted.stage, list(converted.networks)) == ("bridge_neural_prior", ["transformer"])
    pipeline = open_model(tmp_path / "bridge_neural_prior-model")
    output = pipeline.transformer(VECTORS["x_np"], VECTORS["t_int"], VECTORS["y"]).sample
    assert relative_error(output, VECTORS["bridge_neural_prior.out_int"]) < 1e-5
    frames = sample(pipeline)

    # The same from one file that holds both.
    converted = convert(tmp_path, "both", vae)
    assert list(converted.networks) == ["transformer", "neural_prior"]
    assert torch.equal(sample(open_model(tmp_path / "both-model")), frames)


def test_a_bridge_on_a_neural_prior_needs_the_one_it_was_trained_on(tmp_path, vae):
    with pytest.raises(FrameBridgeError, match="does not hold the neural prior; convert that one's checkpoint first"):
        convert(tmp_path, "bridge_neural_prior", vae)
    with pytest.raises(FrameBridgeError, match=r"neural prior: no such folder: .*nowhere"):
        convert(tmp_path, "bridge_neural_prior", vae, neural_prior=tmp_path / "nowhere")
    other = make_tiny_latte(
        tmp_path / "other", "neural_prior", num_frames=5, size=32, num_classes=11, class_names=None
    )
    with pytest.raises(FrameBridgeError, match="neural prior: .* does not fit the bridge: it has 5 frames, not 6"):
        convert(tmp_path, "bridge_neural_prior", vae, neural_prior=other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bridge_neural_prior.pt", "other"]


@pytest.mark.parametrize("stage", ["bridge", "neural_prior"])
def test_the_autoencoder_may_be_part_of_a_model(tmp_path, vae, stage):
    convert(tmp_path, stage, vae)
    whole = tmp_path / f"{stage}-model"
    (tmp_path / f"{stage}-model").rename(tmp_path / "first")
    convert(tmp_path, stage, tmp_path / "first")
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (vae / "diffusion_pytorch_model.safetensors").read_bytes()


def test_another_autoencoder_is_refused(tmp_path):
    video_vae = make_tiny_cogvideox(tmp_path / "cogvideox") / "vae"
    with pytest.raises(FrameBridgeError, match="autoencoder: .* holds a AutoencoderKLCogVideoX, not a AutoencoderKL"):
        convert(tmp_path, "bridge", video_vae)
    with pytest.raises(FrameBridgeError, match=re.escape(f"autoencoder: {tmp_path} has no config.json")):
        convert(tmp_path, "bridge", tmp_path)
    with pytest.raises(
        FrameBridgeError, match="model 'nowhere/at-all' is neither a folder nor to be had from the hub"
    ):
        convert_reference_checkpoint(
            tmp_path / "bridge.pt", tmp_path / "model", vae="nowhere/at-all", num_attention_heads=HEADS
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bridge.pt", "cogvideox"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, vae):
    folder = tmp_path / "bridge-model"
    folder.mkdir()
    convert(tmp_path, "bridge", vae)  # An empty one is taken.
    before = (folder / "model_index.json").stat().st_mtime_ns
    with pytest.raises(FrameBridgeError, match="exists and is not an empty folder; choose another folder"):
        convert(tmp_path, "bridge", vae)
    assert (folder / "model_index.json").stat().st_mtime_ns == before


def test_what_is_refused_leaves_nothing_behind(tmp_path, vae):
    weights = WEIGHTS["neural_prior"]()
    del weights[f"{PRIOR_PREFIX}blocks.2.mlp.fc2.weight"]
    write_checkpoint(tmp_path / "neural_prior.pt", weights)
    with pytest.raises(FrameBridgeError, match=r"keys are missing: blocks\.2\.mlp\.fc2\.weight; take the file"):
        convert(tmp_path, "neural_prior", vae)
    assert os.listdir(tmp_path) == ["neural_prior.pt"]
