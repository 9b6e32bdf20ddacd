"""What a pipeline is built of and opened with is checked before it is used, each fault in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framebridge_plugin import FrameBridgeCogVideoXPipeline, FrameBridgeLattePipeline, FrameBridgeWanPipeline
from framebridge_plugin.backbones.ltx.adapter import LTXAdapter
from framebridge_plugin.backbones.wan.adapter import WanAdapter
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers import FrameBridgeScheduler
from tests.tiny_ltx import make_tiny_ltx_network
from tests.tiny_models import CLASS_NAMES, make_latte_backbone, make_tiny_image_vae, make_tiny_latte_network
from tests.tiny_wan import make_tiny_wan_network, make_tiny_wan_vae, make_wan_backbone

PICTURE = torch.zeros(3, 64, 64)
EMPTY = dict.fromkeys(("tokenizer", "text_encoder", "vae"))


@pytest.fixture(scope="module")
def components(bridge_folder: Path) -> dict[str, Any]:
    return FrameBridgeCogVideoXPipeline.from_pretrained(bridge_folder).components


def refused(message: str, make: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(FrameBridgeError, match=message) as error:
        make(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_components_of_another_class_are_refused(components):
    name = "FrameBridgeCogVideoXPipeline: "
    for wrong, message in (
        ({"vae": make_tiny_wan_vae()}, f"{name}vae is a AutoencoderKLWan; it should be a AutoencoderKLCogVideoX"),
        ({"vae": "vae"}, f"{name}vae is 'vae'; it should be a AutoencoderKLCogVideoX"),
        (
            {"transformer": make_tiny_wan_network()},
            f"{name}transformer is a WanTransformer3DModel; it should be a C",
        ),
        ({"tokenizer": components["text_encoder"]}, f"{name}tokenizer is a T5EncoderModel; it should be a PreTrained"),
        ({"text_encoder": components["tokenizer"]}, f"{name}text_encoder is a T5Tokenizer; it should be a T5Encoder"),
        ({"scheduler": None}, "a transformer needs the scheduler that it was trained with"),
        ({"scheduler": "sde"}, "a str is no bridge; give a FrameBridgeScheduler"),
    ):
        refused(message, FrameBridgeCogVideoXPipeline, **components | wrong)
    network = LTXAdapter.widen(make_tiny_ltx_network())
    message = "FrameBridgeWanPipeline: transformer is a LTXVideoTransformer3DModel; it should be a WanT"
    refused(message, FrameBridgeWanPipeline, **EMPTY, transformer=network, scheduler=make_wan_backbone())
    shape = {"sample_height": 16, "sample_width": 16, "num_frames": 4, "num_classes": 4}
    network = make_tiny_latte_network(**shape, class_names=list(CLASS_NAMES))
    scheduler = FrameBridgeScheduler(target="eps_psi")
    refused("vae is a LatteTransformer; it should be", FrameBridgeLattePipeline, network, network, scheduler)
    refused("needs a vae", FrameBridgeLattePipeline, None, network, scheduler)
    vae = make_tiny_image_vae()
    refused("neural_prior is a AutoencoderKL; it should be", FrameBridgeLattePipeline, vae, neural_prior=vae)


def test_a_compiled_network_is_one_of_its_class(components):
    compiled = torch.compile(components["transformer"])
    assert FrameBridgeCogVideoXPipeline(**components | {"transformer": compiled}).transformer is compiled


def test_a_bridge_of_another_process_is_refused():
    diffusion = FrameBridgeScheduler.from_backbone(make_latte_backbone())
    network = WanAdapter.widen(make_tiny_wan_network())
    message = "aligned to a variance_preserving process, that of a Wan is flow_matching; build it by"
    refused(message, FrameBridgeWanPipeline, **EMPTY, transformer=network, scheduler=diffusion)
    flow = FrameBridgeScheduler.from_backbone(make_wan_backbone())
    for scheduler in (flow, FrameBridgeScheduler()):  # also one that is aligned to nothing
        pipeline = FrameBridgeWanPipeline(**EMPTY, transformer=network, scheduler=scheduler)
    pipeline.scheduler = diffusion
    latents, text = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 8, 16)
    refused(message, pipeline.denoise, latents, latents, text, guidance_scale=1.0)


def test_what_is_missing_is_named_by_the_call_that_needs_it(components):
    call = {"image": PICTURE, "num_inference_steps": 1, "output_type": "latent"}
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        pipeline = FrameBridgeCogVideoXPipeline(**components | {part: None}, num_frames=9, height=64, width=64)
        refused(f"FrameBridgeCogVideoXPipeline has no {part}, which a call needs", pipeline, prompt="a", **call)
    pipeline.set_progress_bar_config(disable=True)
    texts = {"prompt_embeds": torch.zeros(1, 16, 16)}
    refused("has no tokenizer", pipeline, **texts, **call)  # for the negative prompt
    assert pipeline(**texts, guidance_scale=1.0, **call).frames.shape == (1, 3, 4, 8, 8)


def test_settings_of_a_pipeline_are_checked_and_kept_as_pythons_own(components, tmp_path):
    for name, values, wanted in (
        ("num_frames", ("9", 0, 9.0), "a whole number, at least 1"),
        ("height", (-64, True), "a whole number, at least 1"),
        ("num_inference_steps", (0, 2.5), "a whole number, at least 1"),
        ("guidance_scale", ("x", float("nan"), -1.0), "a number, at least 0"),
        ("fps", (0, -1, float("inf")), "a number, above 0 and at most 1000"),
    ):
        for value in values:
            message = f"FrameBridgeCogVideoXPipeline: {name} is .*; it should be {wanted}"
            refused(message, FrameBridgeCogVideoXPipeline, **components, **{name: value})
    refused("unknown argument 'ftps'; did you mean 'fps'", FrameBridgeCogVideoXPipeline, **components, ftps=8)
    settings = {"num_frames": np.int64(9), "height": torch.tensor(64), "width": 64, "fps": np.float32(12.5)}
    pipeline = FrameBridgeCogVideoXPipeline(**components, **settings)
    found = {name: pipeline.config[name] for name in settings}
    assert found == {"num_frames": 9, "height": 64, "width": 64, "fps": 12.5}
    assert [type(value) for value in found.values()] == [int, int, int, float]
    pipeline.save_config(tmp_path)
    assert FrameBridgeCogVideoXPipeline.load_config(tmp_path)["fps"] == 12.5


def test_what_from_pretrained_does_not_know_is_refused(bridge_folder):
    where = "FrameBridgeCogVideoXPipeline.from_pretrained: "
    for given, message in (
        ({"dtype": "bf16"}, f"{where}dtype is 'bf16'; it should be a torch.dtype or a dictionary"),
        ({"torch_dtype": {"vae": "bf16"}}, f"{where}torch_dtype is {{'vae': 'bf16'}}; it should be"),
        ({"dtipe": torch.bfloat16}, f"{where}unknown argument 'dtipe'; did you mean 'dtype'"),
        ({"custom_pipeline": "some/code"}, f"{where}unknown argument 'custom_pipeline'"),
        ({"num_frames": 0}, "num_frames is 0; it should be a whole number"),
    ):
        refused(message, FrameBridgeCogVideoXPipeline.from_pretrained, bridge_folder, **given)
    precision = {"transformer": torch.bfloat16, "default": torch.float32}
    opened = FrameBridgeCogVideoXPipeline.from_pretrained(bridge_folder, dtype=precision)
    assert (opened.transformer.dtype, opened.vae.dtype) == (torch.bfloat16, torch.float32)
