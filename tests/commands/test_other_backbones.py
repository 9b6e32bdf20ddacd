"""Recipes, `sample` and `start_from` know a backbone by its facts alone: one of another package, and this one's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from framebridge_plugin.backbones import facts
from framebridge_plugin.backbones.examination import examine
from framebridge_plugin.commands.sample_request import SampleRequest
from framebridge_plugin.errors import UsageError
from framebridge_plugin.recipe import load_recipe
from tests.cogvideox_files import write_clips
from tests.latte_files import write_part
from tests.recipe.helpers import problems_of

TOY = """
from framebridge_plugin.backbones.facts import BackboneFacts, ClipShapeRule

def parts_problems(configs):
    ours, theirs = configs["transformer"].get("out_channels"), configs["vae"].get("latent_channels")
    if None not in (ours, theirs) and ours != theirs:
        yield "transformer", f"draws {ours} channels, not {theirs}"

TOY = BackboneFacts(
    name="toy_bridge",
    title="ToyVideo",
    adapter="nowhere:Adapter",
    pipeline="nowhere:Pipeline",
    parts={"transformer": "ToyNet", "vae": "ToyVAE", "scheduler": None},
    clip_rule=lambda vae, network: ClipShapeRule(vae.get("frames", 5), 10),
    input_projection="stem",
    defaults={"prior_noise": False},
    sampling={"num_inference_steps": 7, "guidance_scale": 1.0, "grid": "lambda"},
    without_effect={"framebridge.image_noise": "toys are clean"},
    parts_problems=parts_problems,
)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An installed package with a backbone of its own."""
    package = tmp_path / "site-packages"
    (package / "toy-1.0.dist-info").mkdir(parents=True)
    (package / "toy_backbone.py").write_text(TOY)
    (package / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    points = f"[{facts.GROUP}]\ntoy_bridge = toy_backbone:TOY\nbroken_bridge = no_such_module:X\n"
    (package / "toy-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(package)
    facts._entry_points.cache_clear()
    yield
    facts._entry_points.cache_clear()


def write_toy(folder: Path, in_channels: int = 4, **vae: int) -> Path:
    write_part(folder / "transformer", "ToyNet", in_channels=in_channels, out_channels=4)
    write_part(folder / "vae", "ToyVAE", **{"latent_channels": 4, "frames": 3, **vae})
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyVideoPipeline"}))
    return folder


@pytest.fixture
def recipe(toy, tmp_path) -> Path:
    data = {"data_root": str(write_clips(tmp_path / "clips")), "num_frames": 7, "height": 20, "width": 30}
    sections = {
        "model": {"model_name": "toy_bridge", "pretrained_model_name_or_path": str(write_toy(tmp_path / "model"))},
        "training": {"training_type": "full-finetune"},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
        "framebridge": {"data": data},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "recipe.yaml"


def test_the_recipe_of_a_backbone_of_another_package(recipe, tmp_path):
    ours = load_recipe(recipe).framebridge
    assert (ours.prior_noise, ours.image_noise, ours.latte_size) == (False, True, None)
    other = write_toy(tmp_path / "other", latent_channels=8, frames=4)
    write_part(tmp_path / "foreign", "AutoencoderKL")
    for override, message in {
        "framebridge.data.num_frames=8": "framebridge.data.num_frames: the VAE returns only 3 k + 1 frames",
        "framebridge.data.height=21": "framebridge.data.height: should be a multiple of 10",
        "framebridge.image_noise=false": "framebridge.image_noise: has no effect: toys are clean; remove it",
        "attention.attn_provider_training=['text_encoder:native']": "toy_bridge has no text encoder",
        f"model.vae_id={tmp_path / 'foreign'}": "model.vae_id: ",
        f"model.pretrained_model_name_or_path={tmp_path / 'clips'}": "model.pretrained_model_name_or_path: ",
        "model.pretrained_model_name_or_path=null": "model.pretrained_model_name_or_path: is required",
    }.items():
        assert any(message in problem for problem in problems_of(recipe, override)), override
    found = problems_of(recipe, f"model.vae_id={other / 'vae'}")
    assert any(f"{tmp_path / 'model/transformer'} draws 4 channels, not 8" in problem for problem in found)
    assert any("4 k + 1 frames" in problem for problem in found)


def test_a_run_of_a_backbone_of_another_package_starts_from_an_earlier_one(recipe, tmp_path):
    write_toy(tmp_path / "earlier/model", in_channels=8)
    start = f"framebridge.start_from={tmp_path / 'earlier'}"
    assert load_recipe(recipe, [start]).transformer_source == str(tmp_path / "earlier/model/transformer")
    weights = tmp_path / "earlier/model/transformer/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (problem,) = problems_of(recipe, start)
    assert f"framebridge.start_from: {weights} has " in problem
    (tmp_path / "earlier/model/model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    assert "is not from a run of toy_bridge" in problems_of(recipe, start)[0]
    lora = tmp_path / "lora"
    lora.mkdir()
    info = {"pipeline_class": "ToyVideoPipeline", "base_model": str(tmp_path / "model")}
    (lora / "framebridge.json").write_text(json.dumps(info))
    save_file({"x": np.zeros(1, np.float32)}, lora / "pytorch_lora_weights.safetensors")
    use_lora = [f"framebridge.start_from={lora}", "training.training_type=lora"]
    assert "lacks the layer of stem, without which" in problems_of(recipe, *use_lora)[0]
    layer = {f"transformer.stem.lora_{name}.weight": np.zeros((1, 1), np.float32) for name in "AB"}
    save_file(layer, lora / "pytorch_lora_weights.safetensors")
    load_recipe(recipe, use_lora)


def test_sample_knows_a_backbone_of_another_package(toy, tmp_path):
    Image.effect_noise((96, 64), 50).save(tmp_path / "a.png")
    arguments = {"images": (tmp_path / "a.png",), "prompts": ("a cat",), "output": tmp_path / "out.mp4"}
    plain, trained = write_toy(tmp_path / "plain"), write_toy(tmp_path / "trained", in_channels=8)
    request = SampleRequest(model=str(trained), num_frames=7, **arguments)
    assert request.saved is not None
    assert request.sampler_settings(request.saved.facts)["grid"] == "lambda"
    SampleRequest(model=str(plain), transformer=str(trained), **arguments)
    for model, changes, message in (
        (plain, {}, "a plain ToyVideo: its network has 4 input channels"),
        (trained, {"num_frames": 8}, "--num-frames: the VAE returns only 3 k + 1 frames"),
        (trained, {"prompts": (), "labels": (1,)}, "--label: a ToyVideo model takes text"),
        (plain, {"transformer": str(plain)}, "--transformer "),
    ):
        with pytest.raises(UsageError) as error:
            SampleRequest(model=str(model), **arguments | changes)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_wan_is_examined_by_its_own_facts(tmp_path):
    folder = tmp_path / "model"
    write_part(folder / "transformer", "WanTransformer3DModel", in_channels=16, out_channels=16, patch_size=[1, 2, 2])
    write_part(folder / "vae", "AutoencoderKLWan", scale_factor_temporal=4, scale_factor_spatial=8)
    write_part(folder / "text_encoder", "UMT5EncoderModel")
    for part, file, content in (
        ("tokenizer", "spiece.model", {}),
        ("scheduler", "scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
    ):
        (folder / part).mkdir()
        (folder / part / file).write_text(json.dumps(content))
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    saved = examine(folder)
    assert (saved.facts.name, saved.takes_no_image, list(saved.findings())) == ("wan_bridge", True, [])
    assert [name for name, _ in saved.clip_rule.problems(20, 64, 100)] == ["num_frames", "width"]
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (finding,) = examine(folder).findings()
    assert "is for a diffusion process" in finding.message
