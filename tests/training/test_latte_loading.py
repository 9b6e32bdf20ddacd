"""Where a Latte specification's parts come from, what it saves, and what it says in one line before any step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from framebridge_plugin import FrameBridgeLattePipeline
from framebridge_plugin.data import UCF101_CLASSES, load_dataset_config
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.models import LatteTransformer
from framebridge_plugin.pipelines.sampling import open_pipeline
from framebridge_plugin.schedulers import FrameBridgeScheduler
from tests.tiny_models import CLASS_NAMES, LATTE_KINDS, make_clips, make_tiny_cogvideox, make_tiny_latte
from tests.training.latte_runs import CLIP_SHAPE, make_latte_batch, make_latte_specification

KINDS = pytest.mark.parametrize("kind", LATTE_KINDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latte")
    for kind in LATTE_KINDS:
        make_tiny_latte(folder / kind, kind)
    make_tiny_cogvideox(folder / "cogvideox")
    return folder


def from_scratch(kind: str, models: Path, **kwargs: Any) -> Any:
    settings = {"clip_shape": CLIP_SHAPE, "class_names": CLASS_NAMES, "vae_id": str(models / "bridge/vae"), **kwargs}
    return make_latte_specification(kind, **settings)


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    expected, actual = first.state_dict(), second.state_dict()
    assert expected.keys() == actual.keys()
    return all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# From scratch


@pytest.mark.parametrize("kind", ["bridge", "neural_prior", "diffusion"])
def test_a_network_from_scratch_is_for_the_given_clips_and_classes(models, kind):
    specification = from_scratch(kind, models, latte_size="S/4")
    network = specification.load_diffusion_models()["transformer"]
    config = network.config
    assert (config.num_frames, config.sample_height, config.sample_width) == (4, 16, 16)
    assert (config.num_classes, config.class_names) == (4, list(CLASS_NAMES))
    assert (config.num_layers, config.patch_size, config.in_channels, config.out_channels) == (12, 4, 4, 4)
    assert config.stage == ("neural_prior" if kind == "neural_prior" else "bridge")
    assert same_weights(network, from_scratch(kind, models, latte_size="S/4").load_diffusion_models()["transformer"])
    other = from_scratch(kind, models, latte_size="S/4", seed=7).load_diffusion_models()["transformer"]
    assert not same_weights(network, other)


def test_a_bridge_from_scratch_on_a_neural_prior_has_its_channels(models):
    specification = from_scratch("bridge", models, neural_prior=str(models / "neural_prior"))
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
    names = {path.name for path in (tmp_path / "model").iterdir()} - {"model_index.json", "vae"}
    if kind == "neural_prior":
        assert names == {"neural_prior"}
        assert pipeline.transformer is pipeline.scheduler is None
        return
    assert names == {"transformer", "scheduler"} | ({"neural_prior"} if kind == "bridge_neural_prior" else set())
    assert public(pipeline.scheduler.config) == public(scheduler.config)
    # What was not trained takes no more space.
    unchanged = [path for part in names & {"neural_prior"} | {"vae"} for path in (tmp_path / "model" / part).iterdir()]
    assert unchanged
    assert all(path.stat().st_nlink > 1 for path in unchanged)
    if kind == "bridge_neural_prior":
        assert same_weights(pipeline.neural_prior, specification._prior_network)


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
    by_hand = make_latte_specification(kind, models / kind).load_pipeline()
    by_hand.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(output(getattr(by_hand, name), specification), trained)


def test_the_neural_prior_of_a_lora_run_is_found_again(models, tmp_path):
    """It came from a folder of its own, not from the base model."""
    other = make_tiny_latte(tmp_path / "other", "neural_prior")
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
    assert same_weights(open_pipeline(str(tmp_path / "lora")).neural_prior, specification._prior_network)


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
    specification = from_scratch("bridge", models, neural_prior=str(folder))
    specification.load_diffusion_models()
    assert same_weights(specification._prior_network, expected)


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
        backbone = scheduler.backbone_scheduler()
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(backbone.alphas_cumprod.double(), expected, rtol=1e-5, atol=0)
    assert backbone.config.prediction_type == "epsilon"


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


# What is refused


START: dict[str, Callable[..., Any]] = {
    "scratch": lambda models, model, **kwargs: from_scratch("bridge", models, **kwargs),
    "model": lambda models, model, **kwargs: make_latte_specification("bridge", model, **kwargs),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 8}, "8 frames, not 4"),
        ({"size": (64, 32)}, "8 columns of its latents, not 16"),
        ({"size": (32, 64)}, "8 rows of its latents, not 16"),
        ({"class_names": ("left", "right")}, "2 classes, not 4"),
        ({"class_names": ("left", "up", "right", "down")}, "class 'up' at label 1, not 'right'"),
    ],
)
@pytest.mark.parametrize("start", ["scratch", "model"])
def test_a_neural_prior_that_does_not_fit_is_refused_in_one_line(models, tmp_path, changes, message, start):
    prior = make_tiny_latte(tmp_path / "prior", "neural_prior", **changes)
    model = models / "bridge_neural_prior"
    with pytest.raises(FrameBridgeError) as error:
        START[start](models, model, neural_prior=str(prior))
    assert message in one_line(error)
    assert str(tmp_path) in str(error.value)


def test_a_neural_prior_of_other_latents_is_refused(models, tmp_path):
    network = LatteTransformer(2, 2, 8, 2, 3, 3, 16, 16, 4, 4, list(CLASS_NAMES), "neural_prior")
    network.save_pretrained(tmp_path / "neural_prior")
    with pytest.raises(FrameBridgeError, match="3 channels of its latents, not 4") as error:
        from_scratch("bridge", models, neural_prior=str(tmp_path / "neural_prior"))
    one_line(error)


OTHER_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bridge as the neural prior": (
        lambda models: from_scratch("bridge", models, neural_prior=str(models / "bridge")),
        "holds no neural prior; give a trained neural prior",
    ),
    "a bridge's network as the neural prior": (
        lambda models: from_scratch("bridge", models, neural_prior=str(models / "bridge/transformer")),
        "holds a Latte network of the stage 'bridge'; give a trained neural prior",
    ),
    "CogVideoX as the neural prior": (
        lambda models: from_scratch("bridge", models, neural_prior=str(models / "cogvideox")),
        "holds no neural prior; give a trained neural prior",
    ),
    "CogVideoX's network as the neural prior": (
        lambda models: from_scratch("bridge", models, neural_prior=str(models / "cogvideox/transformer")),
        "it is of the class CogVideoXTransformer3DModel",
    ),
    "nothing as the neural prior": (
        lambda models: from_scratch("bridge", models, neural_prior=str(models / "nothing")),
        "nothing is no folder; give a trained neural prior",
    ),
    "a neural prior as the bridge": (
        lambda models: make_latte_specification("bridge", models / "neural_prior"),
        "it has only neural_prior/, as a model of another stage; check that the folder is a Latte model",
    ),
    "a neural prior's network as the bridge": (
        lambda models: make_latte_specification(
            "bridge", models / "bridge", transformer_id=str(models / "neural_prior/neural_prior")
        ),
        "holds a Latte network of the stage 'neural_prior'; give a Latte model",
    ),
    "a bridge as the model of a neural prior": (
        lambda models: make_latte_specification("neural_prior", models / "bridge"),
        "it has only transformer/, as a model of another stage; check that the folder is a trained neural prior",
    ),
    "CogVideoX as the bridge": (
        lambda models: make_latte_specification("bridge", models / "cogvideox"),
        "it is of the class AutoencoderKLCogVideoX",
    ),
    "CogVideoX's network as the bridge": (
        lambda models: make_latte_specification(
            "bridge", models / "bridge", transformer_id=str(models / "cogvideox/transformer")
        ),
        "it is of the class CogVideoXTransformer3DModel; check that the folder is a Latte model",
    ),
    "CogVideoX's autoencoder": (
        lambda models: from_scratch("bridge", models, vae_id=str(models / "cogvideox/vae")),
        "it is of the class AutoencoderKLCogVideoX; check that the folder is an AutoencoderKL",
    ),
    "no autoencoder": (
        lambda models: from_scratch("bridge", models, vae_id=None),
        "needs an autoencoder; give vae_id, for example stabilityai/sd-vae-ft-ema",
    ),
    "an unknown size": (lambda models: from_scratch("bridge", models, latte_size="M/2"), "unknown Latte size 'M/2'"),
    "clips that are no multiple of a patch": (
        lambda models: from_scratch("bridge", models, clip_shape=(4, 64, 60)),
        "clips of 64 x 60 pixels do not fit Latte-S/2 and this autoencoder; choose multiples of 8",
    ),
    "a neural prior for a network without its channels": (
        lambda models: make_latte_specification(
            "bridge", models / "bridge", neural_prior=str(models / "neural_prior")
        ),
        "was trained without one and has no input channels for its video",
    ),
    "a network that takes a neural prior, alone": (
        lambda models: from_scratch("bridge", models, transformer_id=str(models / "bridge_neural_prior/transformer")),
        "takes one; give its folder",
    ),
    "diffusion on a neural prior": (
        lambda models: from_scratch("diffusion", models, neural_prior=str(models / "neural_prior")),
        "objective=diffusion starts from noise; leave neural_prior out",
    ),
    "diffusion of a neural prior": (
        lambda models: from_scratch("neural_prior", models, objective="diffusion"),
        "a neural prior has no noise",
    ),
    "noise on the image": (
        lambda models: from_scratch("bridge", models, image_noise=True),
        "image_noise: Latte's image condition, prior and first target frame share one clean latent; switch it off",
    ),
}


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_another_model_is_refused_in_one_line(models, what):
    make, message = OTHER_MODELS[what]
    with pytest.raises(FrameBridgeError) as error:
        make(models)
    assert message in one_line(error)


def test_another_autoencoder_than_the_network_was_trained_with_is_refused(models, tmp_path):
    network = LatteTransformer(2, 2, 8, 2, 3, 3, 16, 16, 4, 4, list(CLASS_NAMES))
    network.save_pretrained(tmp_path / "transformer")
    with pytest.raises(FrameBridgeError, match="latents of 3 channels, the autoencoder .* has 4") as error:
        make_latte_specification("bridge", models / "bridge", transformer_id=str(tmp_path / "transformer"))
    one_line(error)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "neural_prior"])
@pytest.mark.parametrize("how", ["missing", "truncated", "no JSON"])
def test_a_damaged_model_is_refused_in_one_line(models, tmp_path, part, how):
    shutil.copytree(models / "bridge_neural_prior", tmp_path / "model")
    folder = tmp_path / "model" / part
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "truncated" and part != "scheduler":
        os.truncate(folder / "diffusion_pytorch_model.safetensors", 100)
    else:
        next(folder.glob("*config.json")).write_text("{")

    def load() -> None:
        specification = make_latte_specification("bridge", tmp_path / "model")
        specification.load_latent_models()
        specification.load_diffusion_models()

    with pytest.raises(FrameBridgeError) as error:
        load()
    assert "cannot load" in one_line(error)
    assert "check that the folder is" in str(error.value)


@pytest.mark.parametrize("part", ["transformer", "neural_prior"])
def test_weights_of_another_network_are_refused_in_one_line(models, tmp_path, part):
    """Which diffusers would only warn of."""
    shutil.copytree(models / "bridge_neural_prior", tmp_path / "model")
    file = tmp_path / "model" / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["class_embedding.weight"]
    save_file(weights, file)
    specification = make_latte_specification("bridge", tmp_path / "model")
    with pytest.raises(FrameBridgeError, match=r"1 names differ, first class_embedding.weight") as error:
        specification.load_diffusion_models()
    one_line(error)


# The data


def dataset_config(folder: Path, *classes: str, shape: tuple[int, int, int] = CLIP_SHAPE) -> Path:
    for number, name in enumerate(classes):
        make_clips(folder / "clips" / name, count=1, frames=4, layout="lists", captions=[str(number)])
    entry = {"class_root": str(folder / "clips"), "video_resolution_buckets": [list(shape)]}
    (folder / "data.json").write_text(json.dumps({"datasets": [entry]}))
    return folder / "data.json"


def test_data_of_the_models_classes_is_accepted(models, tmp_path):
    specification = make_latte_specification("bridge", models / "bridge")
    specification.check_datasets(load_dataset_config(dataset_config(tmp_path, "left", "down")))
    specification.check_validation_samples([{"prompt": "up"}, {"prompt": ""}, {"prompt": "3"}])


def test_a_class_that_the_model_does_not_know_is_refused(models, tmp_path):
    specification = make_latte_specification("bridge", models / "bridge")
    with pytest.raises(FrameBridgeError) as error:
        specification.check_datasets(load_dataset_config(dataset_config(tmp_path, "left", "downn")))
    assert "data set 0: the model knows no class 'downn'; the nearest: down" in one_line(error)
    with pytest.raises(FrameBridgeError, match="validation file: the model knows no class 'sideways'"):
        specification.check_validation_samples([{"prompt": "up"}, {"prompt": "sideways"}])


def test_a_model_without_names_takes_labels(models, tmp_path):
    make_tiny_latte(tmp_path / "model", class_names=None, num_classes=3)
    specification = make_latte_specification("bridge", tmp_path / "model", caption_dropout=0.0)
    specification.check_datasets(load_dataset_config(dataset_config(tmp_path, "0", "2")))
    assert specification.prepare_conditions(caption="2")["class_labels"].tolist() == [2]
    with pytest.raises(FrameBridgeError, match="by number only, 0 to 2, not 'left'"):
        specification.check_datasets(load_dataset_config(dataset_config(tmp_path, "left")))


@pytest.mark.parametrize("shape", [(3, 64, 64), (4, 32, 64)])
def test_clips_that_the_model_is_not_for_are_refused(models, tmp_path, shape):
    specification = make_latte_specification("bridge", models / "bridge")
    with pytest.raises(UsageError, match="do not fit the network, which is for 4 frames of 64 x 64") as error:
        specification.check_datasets(load_dataset_config(dataset_config(tmp_path, "left", shape=shape)))
    one_line(error)


@pytest.mark.parametrize("kind", ["bridge", "neural_prior"])
def test_lora_layers_on_random_weights_are_refused(models, kind):
    specification = from_scratch(kind, models)
    with pytest.raises(UsageError, match="LoRA layers need a trained network") as error:
        specification.prepare_trainable_parameters(specification.load_diffusion_models()["transformer"], "lora")
    one_line(error)
