"""What the Latte specifications refuse, in one line and before any step: other models, other classes, other clips."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from framebridge_plugin.data import load_dataset_config
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.models import LatteTransformer
from tests.tiny_models import CLASS_NAMES, LATTE_KINDS, make_clips, make_tiny_cogvideox, make_tiny_latte
from tests.training.latte_runs import CLIP_SHAPE, make_from_scratch, make_latte_specification


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latte")
    for kind in LATTE_KINDS:
        make_tiny_latte(folder / kind, kind)
    make_tiny_cogvideox(folder / "cogvideox")
    return folder


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Models


START: dict[str, Callable[..., Any]] = {
    "scratch": lambda models, model, **kwargs: make_from_scratch("bridge", models, **kwargs),
    "model": lambda models, model, **kwargs: make_latte_specification("bridge", model, **kwargs),
}


@pytest.mark.parametrize("start", ["scratch", "model"])
def test_a_neural_prior_that_does_not_fit_is_refused_in_one_line(models, tmp_path, start):
    """The rules of the parts are asked: their table is in tests/backbones/test_latte_rules.py."""
    prior = make_tiny_latte(tmp_path / "prior", "neural_prior", num_frames=8, class_names=("left", "right"))
    with pytest.raises(FrameBridgeError, match="it has 8 frames, not 4; 2 classes, not 4") as error:
        START[start](models, models / "bridge_neural_prior", neural_prior=str(prior))
    assert str(tmp_path) in one_line(error)


OTHER_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bridge's network as the neural prior": (
        lambda models: make_from_scratch("bridge", models, neural_prior=str(models / "bridge/transformer")),
        "holds a bridge, not a neural prior; give a trained neural prior",
    ),
    "CogVideoX's network as the neural prior": (
        lambda models: make_from_scratch("bridge", models, neural_prior=str(models / "cogvideox/transformer")),
        "it is of the class CogVideoXTransformer3DModel",
    ),
    "a neural prior as the bridge": (
        lambda models: make_latte_specification("bridge", models / "neural_prior"),
        "it has only neural_prior/, as a model of another stage; check that the folder is a Latte model",
    ),
    "a neural prior's network as the bridge": (
        lambda models: make_latte_specification(
            "bridge", models / "bridge", transformer_id=str(models / "neural_prior/neural_prior")
        ),
        "holds a neural prior, not a bridge; give a Latte model",
    ),
    "CogVideoX's network as the bridge": (
        lambda models: make_latte_specification(
            "bridge", models / "bridge", transformer_id=str(models / "cogvideox/transformer")
        ),
        "it is of the class CogVideoXTransformer3DModel; check that the folder is a Latte model",
    ),
    "CogVideoX's autoencoder": (
        lambda models: make_from_scratch("bridge", models, vae_id=str(models / "cogvideox/vae")),
        "it is of the class AutoencoderKLCogVideoX; check that the folder is an AutoencoderKL",
    ),
    "no autoencoder": (
        lambda models: make_from_scratch("bridge", models, vae_id=None),
        "needs an autoencoder; give vae_id, for example stabilityai/sd-vae-ft-ema",
    ),
    "an unknown size": (
        lambda models: make_from_scratch("bridge", models, latte_size="M/2"),
        "unknown Latte size 'M/2'",
    ),
    "a neural prior for a network without its channels": (
        lambda models: make_latte_specification(
            "bridge", models / "bridge", neural_prior=str(models / "neural_prior")
        ),
        "the transformer takes none; leave it out",
    ),
    "a network that takes a neural prior, alone": (
        lambda models: make_from_scratch(
            "bridge", models, transformer_id=str(models / "bridge_neural_prior/transformer")
        ),
        "takes one; give its folder",
    ),
    "diffusion on a neural prior": (
        lambda models: make_from_scratch("diffusion", models, neural_prior=str(models / "neural_prior")),
        "objective=diffusion starts from noise; leave neural_prior out",
    ),
    "diffusion of a neural prior": (
        lambda models: make_from_scratch("neural_prior", models, objective="diffusion"),
        "a neural prior has no noise",
    ),
    "noise on the image": (
        lambda models: make_from_scratch("bridge", models, image_noise=True),
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
    with pytest.raises(FrameBridgeError, match="latents of 3 channels, the autoencoder has 4") as error:
        make_latte_specification("bridge", models / "bridge", transformer_id=str(tmp_path / "transformer"))
    one_line(error)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "neural_prior"])
def test_a_damaged_model_is_refused_in_one_line(models, tmp_path, part):
    """Which files are damaged is in tests/backbones/test_latte_rules.py."""
    shutil.copytree(models / "bridge_neural_prior", tmp_path / "model")
    folder = tmp_path / "model" / part
    if part == "scheduler":
        shutil.rmtree(folder)
    else:
        os.truncate(folder / "diffusion_pytorch_model.safetensors", 100)

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
    with pytest.raises(FrameBridgeError, match=r"first class_embedding.weight") as error:
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


def test_clips_that_the_model_is_not_for_are_refused(models, tmp_path):
    specification = make_latte_specification("bridge", models / "bridge")
    with pytest.raises(UsageError, match="clips: .* trained on 64 and takes no other, not 32") as error:
        specification.check_datasets(load_dataset_config(dataset_config(tmp_path, "left", shape=(4, 32, 64))))
    one_line(error)


@pytest.mark.parametrize("kind", ["bridge", "neural_prior"])
def test_lora_layers_on_random_weights_are_refused(models, kind):
    specification = make_from_scratch(kind, models)
    with pytest.raises(UsageError, match="LoRA layers need a trained network") as error:
        specification.prepare_trainable_parameters(specification.load_diffusion_models()["transformer"], "lora")
    one_line(error)
