"""Where a Latte specification's parts come from, and what it saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler
from PIL import Image

from framebridge_plugin import FrameBridgeLattePipeline, register
from framebridge_plugin.backbones.manifest import write_manifest
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.data import UCF101_CLASSES
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.models import LatteTransformer
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.schedulers.backbone import build_backbone
from framebridge_plugin.training.resume_settings import run_settings
from tests.tiny_models import CLASS_NAMES, LATTE_KINDS, make_tiny_cogvideox, make_tiny_latte
from tests.training.latte_runs import CLIP_SHAPE, make_from_scratch, make_latte_batch, make_latte_specification

register()

from finetrainers import BaseArgs  # noqa: E402

KINDS = pytest.mark.parametrize("kind", LATTE_KINDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latte")
    for kind in LATTE_KINDS:
        make_tiny_latte(folder / kind, kind)
    make_tiny_cogvideox(folder / "cogvideox")
    return folder


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    expected, actual = first.state_dict(), second.state_dict()
    assert expected.keys() == actual.keys()
    return all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


# From scratch


@pytest.mark.parametrize("kind", ["bridge", "neural_prior", "diffusion"])
def test_a_network_from_scratch_is_for_the_given_clips_and_classes(models, kind):
    specification = make_from_scratch(kind, models, latte_size="S/4")
    network = specification.load_diffusion_models()["transformer"]
    config = network.config
    assert (config.num_frames, config.sample_height, config.sample_width) == (4, 16, 16)
    assert (config.num_classes, config.class_names) == (4, list(CLASS_NAMES))
    assert (config.num_layers, config.patch_size, config.in_channels, config.out_channels) == (12, 4, 4, 4)
    assert config.stage == ("neural_prior" if kind == "neural_prior" else "bridge")
    assert same_weights(
        network, make_from_scratch(kind, models, latte_size="S/4").load_diffusion_models()["transformer"]
    )
    for seed in (0, 7):
        other = make_from_scratch(kind, models, latte_size="S/4", seed=seed).load_diffusion_models()["transformer"]
        assert not same_weights(network, other)


def test_a_bridge_from_scratch_on_a_neural_prior_has_its_channels(models):
    specification = make_from_scratch("bridge", models, neural_prior=str(models / "neural_prior"))
    network = specification.load_diffusion_models()["transformer"]
    assert (network.config.in_channels, network.config.out_channels) == (8, 4)


def test_the_trainer_may_say_later_which_clips_a_network_from_scratch_is_for(models):
    """finetrainers' programs give the specification no clip shape; our trainer sets it before it loads."""
    settings = {"class_names": CLASS_NAMES, "vae_id": str(models / "bridge/vae")}
    specification = make_latte_specification("bridge", neural_prior=str(models / "neural_prior"), **settings)
    assert specification.transformer_config.sample_height == 64  # 256 pixels, the reference's
    specification.clip_shape = CLIP_SHAPE
    network = specification.load_diffusion_models()["transformer"]
    assert (network.config.num_frames, network.config.sample_height) == (4, 16)
    assert specification.transformer_config.sample_height == 16


def test_the_classes_are_ucf_101s_by_default(models):
    specification = make_latte_specification("bridge", vae_id=str(models / "bridge/vae"))
    assert specification.transformer_config.class_names == list(UCF101_CLASSES)


# From a model


@KINDS
def test_it_saves_a_model_that_it_and_the_pipeline_open_bit_for_bit(models, tmp_path, kind):
    specification = make_latte_specification(kind, models / kind)
    loaded = specification.load_diffusion_models()
    network, scheduler = loaded["transformer"], loaded["scheduler"]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    specification._save_model(str(tmp_path / "model"), network, network.state_dict(), scheduler)

    again = make_latte_specification(kind, tmp_path / "model")
    assert same_weights(again.load_diffusion_models()["transformer"], network)
    assert again.transformer_config.class_names == list(CLASS_NAMES)
    pipeline = FrameBridgeLattePipeline.from_pretrained(tmp_path / "model")
    name = "neural_prior" if kind == "neural_prior" else "transformer"
    assert same_weights(getattr(pipeline, name), network)
    assert same_weights(pipeline.vae, specification.load_latent_models()["vae"])
    names = {path.name for path in (tmp_path / "model").iterdir()} - {"model_index.json", "manifest.json", "vae"}
    if kind == "neural_prior":
        assert names == {"neural_prior"}
        assert pipeline.transformer is pipeline.scheduler is None
        return
    assert names == {"transformer", "scheduler"} | ({"neural_prior"} if kind == "bridge_neural_prior" else set())
    assert public(pipeline.scheduler.config) == public(scheduler.config)
    # What was not trained has files of its own: whoever changes one of the base model changes no other.
    unchanged = [path for part in names & {"neural_prior"} | {"vae"} for path in (tmp_path / "model" / part).iterdir()]
    assert unchanged
    assert all(path.stat().st_nlink == 1 for path in unchanged)
    if kind == "bridge_neural_prior":
        assert same_weights(pipeline.neural_prior, specification.adapter.prior_network)


@KINDS
def test_saved_lora_layers_give_the_trained_output(models, tmp_path, kind):
    from peft import LoraConfig, get_peft_model_state_dict

    specification = make_latte_specification(kind, models / kind)
    loaded = specification.load_diffusion_models()
    network, conditions = loaded["transformer"], make_latte_batch()

    def output(transformer: Any, sources: Any) -> torch.Tensor:
        with torch.no_grad():
            return sources.forward(
                transformer=transformer,
                scheduler=loaded["scheduler"],
                condition_model_conditions=conditions[0],
                latent_model_conditions=conditions[1],
                sigmas=torch.tensor([0.3, 0.9]),
                generator=torch.Generator().manual_seed(1),
            )[0]

    base = output(network, specification)
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": True, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    network.add_adapter(LoraConfig(**lora))
    specification.prepare_trainable_parameters(network, "lora")
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    trained = output(network, specification)
    assert (trained - base).abs().max() > 1e-2
    specification._save_lora_weights(
        str(tmp_path / "lora"),
        get_peft_model_state_dict(network),
        loaded["scheduler"],
        {"lora_config": json.dumps(lora)},
    )

    pipeline = open_pipeline(str(tmp_path / "lora"))
    name = "neural_prior" if kind == "neural_prior" else "transformer"
    torch.testing.assert_close(output(getattr(pipeline, name), specification), trained)
    # With its base model in another place, and not with another one.
    moved, other = shutil.copytree(models / kind, tmp_path / "moved"), make_tiny_latte(tmp_path / "o", kind, seed=5)
    pipeline = FrameBridgeLattePipeline.from_pretrained(tmp_path / "lora", base_model=moved)
    torch.testing.assert_close(output(getattr(pipeline, name), specification), trained)
    with pytest.raises(FrameBridgeError, match=f"was trained on: {name}.diffusion_pytorch_model.safetensors"):
        FrameBridgeLattePipeline.from_pretrained(tmp_path / "lora", base_model=other)
    FrameBridgeLattePipeline.from_pretrained(tmp_path / "lora", base_model=other, allow_other_base=True)
    by_hand = make_latte_specification(kind, models / kind).load_pipeline()
    by_hand.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(output(getattr(by_hand, name), specification), trained)


def test_the_neural_prior_of_a_lora_run_is_found_again(models, tmp_path):
    """It came from a folder of its own, not from the base model."""
    other = make_tiny_latte(tmp_path / "other", "neural_prior", seed=5)
    specification = make_latte_specification("bridge", models / "bridge_neural_prior", neural_prior=str(other))
    scheduler = specification.load_diffusion_models()["scheduler"]
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": True, "target_modules": ["to_q"]}
    layers = {
        f"transformer_blocks.{block}.attn.to_q.lora_{letter}.weight": torch.zeros(shape)
        for letter, shape in (("A", (4, 16)), ("B", (16, 4)))
        for block in range(2)
    }
    specification._save_lora_weights(str(tmp_path / "lora"), layers, scheduler, {"lora_config": json.dumps(lora)})
    info = json.loads((tmp_path / "lora/framebridge.json").read_text())
    assert info["replaced_components"] == {"neural_prior": str(other / "neural_prior")}
    assert same_weights(open_pipeline(str(tmp_path / "lora")).neural_prior, specification.adapter.prior_network)


@pytest.mark.parametrize("where", ["run", "checkpoint", "model", "network alone", "bridge on it"])
def test_the_neural_prior_is_found_wherever_a_run_left_it(models, tmp_path, where):
    expected = LatteTransformer.from_pretrained(models / "neural_prior", subfolder="neural_prior")
    folder = {
        "run": tmp_path / "run",
        "checkpoint": tmp_path / "run/checkpoints/step_000002",
        "model": models / "neural_prior",
        "network alone": models / "neural_prior/neural_prior",
        "bridge on it": models / "bridge_neural_prior",
    }[where]
    shutil.copytree(models / "neural_prior", tmp_path / "run/model")
    shutil.copytree(models / "neural_prior", tmp_path / "run/checkpoints/step_000002/model")
    write_manifest(tmp_path / "run/checkpoints/step_000002")
    specification = make_from_scratch("bridge", models, neural_prior=str(folder))
    specification.load_diffusion_models()
    assert same_weights(specification.adapter.prior_network, expected)


@pytest.mark.parametrize(
    ("base", "objective"), [("diffusion", "bridge"), ("bridge", "diffusion"), ("bridge", "bridge")]
)
def test_it_goes_on_from_a_model_with_the_objective_of_the_recipe(models, base, objective):
    specification = make_latte_specification("bridge", models / base, objective=objective, beta_max=20.0)
    scheduler = specification.load_diffusion_models()["scheduler"]
    if objective == "diffusion":
        assert type(scheduler) is CogVideoXDDIMScheduler
        backbone = scheduler
    else:
        assert isinstance(scheduler, FrameBridgeScheduler)
        assert (scheduler.config.beta_max, scheduler.config.grid) == (20.0, "linspace")
        backbone = build_backbone(scheduler.config.backbone)
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(backbone.alphas_cumprod.double(), expected, rtol=1e-5, atol=0)
    assert backbone.config.prediction_type == "epsilon"


def test_a_baseline_goes_on_with_what_its_model_predicts(models, tmp_path):
    shutil.copytree(models / "diffusion", tmp_path / "of_v")
    DDIMScheduler(1000, 1e-4, 0.02, prediction_type="v_prediction").save_pretrained(tmp_path / "of_v/scheduler")
    for folder, target, predicted in (
        (models / "diffusion", "noise", "epsilon"),
        (tmp_path / "of_v", "v", "v_prediction"),
        (tmp_path / "of_v", "eps_psi", "v_prediction"),
    ):
        scheduler = make_latte_specification("diffusion", folder, target=target).load_scheduler()
        assert type(scheduler) is CogVideoXDDIMScheduler
        assert scheduler.config.prediction_type == predicted
        assert scheduler.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    with pytest.raises(UsageError, match=r"target: v is not what .* was trained for, epsilon; leave it out"):
        make_latte_specification("diffusion", models / "diffusion", target="v").load_scheduler()


def test_a_resumed_run_has_to_have_the_same_classes_and_neural_prior(models, tmp_path):
    def settings(**changes: Any) -> dict[str, Any]:
        specification = make_from_scratch("bridge", models, latte_size="S/8", **changes)
        groups = run_settings(BaseArgs(), specification, [])
        return groups["refused"] | groups["base"]

    plain, on_prior = settings(), settings(neural_prior=str(models / "neural_prior"))
    assert plain["classes"].startswith("4, ")
    assert {name: on_prior[name] for name in plain} == plain
    assert plain.keys() ^ on_prior.keys() == {"neural_prior"}
    shutil.copytree(models / "neural_prior", tmp_path / "moved")
    assert settings(neural_prior=str(tmp_path / "moved")) == on_prior
    make_tiny_latte(tmp_path / "other", "neural_prior", seed=5)
    for changes, name in (
        ({"class_names": [*CLASS_NAMES[1:], CLASS_NAMES[0]]}, "classes"),
        ({"neural_prior": str(tmp_path / "other")}, "neural_prior"),
    ):
        before = on_prior if name == "neural_prior" else plain
        assert {key for key, value in settings(**changes).items() if before[key] != value} == {name}


@KINDS
def test_it_validates_from_an_image_and_a_class(models, kind):
    specification = make_latte_specification(kind, models / kind)
    pipeline = specification.load_pipeline(enable_slicing=True, enable_tiling=True, training=True)
    image = Image.new("RGB", (80, 64), (200, 30, 30))

    def validate(**row: Any) -> list[Image.Image]:
        row = {"num_inference_steps": 2.0, "height": None, "caption": "up", "prompt": "up", **row}
        (video,) = specification.validation(
            pipeline=pipeline, generator=torch.Generator().manual_seed(1), image_path=None, **row
        )
        return video.value

    frames = validate(image=image)
    assert [frame.size for frame in frames] == [(64, 64)] * 4
    assert validate(video=[image, Image.new("RGB", (80, 64))])[0].tobytes() == frames[0].tobytes()
    assert any(a.tobytes() != b.tobytes() for a, b in zip(validate(image=image, prompt="left"), frames, strict=True))
    assert len(validate(image=image, prompt="")) == len(validate(image=image, prompt="a cat")) == 4
    with pytest.raises(FrameBridgeError, match="'up' has no image; add an image_path"):
        validate()
