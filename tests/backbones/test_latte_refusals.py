"""What the Latte pipeline refuses, each in one line: arguments of a call, and components that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from diffusers import PNDMScheduler

from framebridge_plugin import FrameBridgeLattePipeline
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers import FrameBridgeScheduler
from tests.backbones.latte_calls import latents_of, open_folder, picture, seeded
from tests.tiny_models import (
    CLASS_NAMES,
    make_latte_backbone,
    make_tiny_image_vae,
    make_tiny_latte,
    make_tiny_latte_network,
)

SHAPE = {"sample_height": 16, "sample_width": 16, "num_frames": 4, "num_classes": 4, "class_names": list(CLASS_NAMES)}


@pytest.fixture
def pipeline(latte_folders) -> FrameBridgeLattePipeline:
    return open_folder(latte_folders["bridge"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_label": "lft"}, "class_label: the model knows no class 'lft'; the nearest: left"),
        ({"class_label": "Left"}, "knows no class 'Left'; the nearest: left"),
        ({"class_label": "juggling"}, "knows no class 'juggling'; it knows 4: left, right, up"),
        ({"class_label": 4}, "knows no class 4: its labels run from 0 to 3"),
        ({"class_label": -1}, "knows no class -1: its labels run from 0 to 3"),
        ({"class_label": "4"}, "knows no class 4: its labels run from 0 to 3"),
        ({"class_label": ["left", "rigt"]}, "knows no class 'rigt'; the nearest: right"),
        ({"class_label": []}, "1 images but 0 classes"),
        ({"image": [picture()] * 2, "class_label": [0, 1, 2]}, "2 images but 3 classes; give one for all, or one"),
        ({"image": []}, "no image given"),
        ({"image": "picture.png"}, "picture.png: no such file"),
        ({"image": torch.rand(3, 64, 64) * 2 - 1}, "image: floats should be in \\[0, 1\\], these go from -"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 samples"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it should be a whole number, at least 1"),
        ({"num_videos_per_image": -1}, "num_videos_per_image is -1; it should be a whole number, at least 1"),
        ({"class_label": 1.0}, "class_label is 1.0; it should be a whole number, a text or a list of"),
        (
            {"latents": torch.zeros(1, 1, 4, 16, 16)},
            r"latents: have .*; they should have \[1, 4, 4, 16, 16\]",
        ),
        ({"class": "left"}, "unknown argument 'class'; did you mean 'class_label'"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "latents, image_latents, neural_prior, not prompt"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipeline, arguments, message):
    with pytest.raises(FrameBridgeError, match=message) as error:
        latents_of(pipeline, **arguments)
    assert "\n" not in str(error.value)


def test_a_scheduler_that_is_no_bridge_is_refused(pipeline):
    with pytest.raises(FrameBridgeError, match="a PNDMScheduler is no bridge; give a FrameBridgeScheduler"):
        FrameBridgeLattePipeline(**{**pipeline.components, "scheduler": PNDMScheduler()})
    pipeline.scheduler = make_latte_backbone()
    with pytest.raises(FrameBridgeError, match="a CogVideoXDDIMScheduler is no bridge, which the model was built"):
        latents_of(pipeline)


def test_the_times_of_the_calls_can_be_given(pipeline):
    assert torch.equal(
        latents_of(pipeline, num_inference_steps=None, timesteps=[999, 499]),
        latents_of(pipeline, num_inference_steps=2),
    )
    with pytest.raises(FrameBridgeError, match="timesteps: should be bridge indices that fall, from at most 999"):
        latents_of(pipeline, num_inference_steps=None, timesteps=[0, 999])


def test_a_model_without_names_takes_labels_alone(tmp_path):
    pipeline = open_folder(make_tiny_latte(tmp_path, class_names=None, num_classes=6))
    assert latents_of(pipeline, class_label=5).shape == (1, 4, 4, 16, 16)
    with pytest.raises(FrameBridgeError, match="knows its classes by number only, 0 to 5, not 'left'"):
        latents_of(pipeline)


BRIDGE, ON_NEURAL_PRIOR, NEURAL_PRIOR = "bridge", "bridge on a neural prior", "neural prior"


@pytest.mark.parametrize(
    ("transformer", "neural_prior", "has_scheduler", "message"),
    [
        (None, None, True, "needs a vae, and a transformer or a neural_prior"),
        (BRIDGE, None, False, "needs the scheduler that it was trained with"),
        # The rules of the parts are asked: their table is in test_latte_rules.py.
        (NEURAL_PRIOR, None, True, "transformer holds a neural prior, not a bridge"),
        (None, BRIDGE, False, "neural_prior holds a bridge, not a neural prior"),
        (ON_NEURAL_PRIOR, None, True, "transformer takes the video of a neural prior, and there is none"),
    ],
)
def test_components_that_do_not_belong_together_are_refused(transformer, neural_prior, has_scheduler, message):
    networks = {
        None: None,
        BRIDGE: make_tiny_latte_network(**SHAPE),
        ON_NEURAL_PRIOR: make_tiny_latte_network(takes_neural_prior=True, **SHAPE),
        NEURAL_PRIOR: make_tiny_latte_network(stage="neural_prior", **SHAPE),
    }
    scheduler = FrameBridgeScheduler() if has_scheduler else None
    with pytest.raises(FrameBridgeError, match=message) as error:
        FrameBridgeLattePipeline(make_tiny_image_vae(), networks[transformer], scheduler, networks[neural_prior])
    assert "\n" not in str(error.value)


def test_an_autoencoder_of_other_latents_is_refused():
    vae = make_tiny_image_vae()
    vae.register_to_config(latent_channels=16)
    with pytest.raises(FrameBridgeError, match="transformer is for latents of 4 channels, the autoencoder has 16"):
        FrameBridgeLattePipeline(vae, make_tiny_latte_network(**SHAPE), FrameBridgeScheduler())


def test_a_model_that_is_not_on_the_hub_is_announced_and_refused_in_a_line_each():
    """And diffusers' warning of an argument that huggingface_hub no longer takes does not stand before them."""
    command = ["conformance", "--model-name", "latte_bridge", "--model", "owner/nope"]
    process = subprocess.run(
        [sys.executable, "-m", "framebridge_plugin", *command],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 1
    announced, refused = process.stderr.splitlines()
    assert announced == "owner/nope is no folder here: it is taken from the Hugging Face Hub, revision main"
    assert refused.startswith("error: model 'owner/nope' is neither a folder nor to be had from the hub")
