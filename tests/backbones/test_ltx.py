"""LTX-Video 0.9: its text, latents, rate and network as diffusers' own pipeline has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import LTXPipeline
from PIL import Image

from framebridge_plugin import FrameBridgeLTXPipeline
from framebridge_plugin.backbones.encoding import decode_video, encode_video
from framebridge_plugin.backbones.loading import ModelSource
from framebridge_plugin.backbones.ltx.adapter import LTXAdapter
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.objective import ObjectiveSettings
from tests.tiny_ltx import make_ltx_backbone, make_tiny_ltx, make_tiny_ltx_vae

CLIP = {"num_frames": 17, "height": 64, "width": 96}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_ltx(tmp_path_factory.mktemp("ltx") / "model")


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((96, 64), 80).convert("RGB")


@torch.no_grad()
def test_text_comes_with_the_mask_of_its_tokens(model):
    adapter = LTXAdapter(ModelSource(str(model)), ObjectiveSettings(target="flow"))
    models = adapter.load_condition_models(torch.float32)
    found = adapter.encode_caption(models, "a red square", dropped=False)
    tokens = models["tokenizer"](["a red square"], padding="max_length", max_length=128, return_tensors="pt")
    expected = models["text_encoder"](tokens["input_ids"]).last_hidden_state
    torch.testing.assert_close(found["encoder_hidden_states"], expected)
    assert found["encoder_attention_mask"].tolist() == tokens["attention_mask"].bool().tolist()


@torch.no_grad()
def test_latents_are_the_mean_of_the_posterior_normalised_for_each_channel():
    vae, clip = make_tiny_ltx_vae(), torch.rand(1, 9, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = vae.encode(clip.transpose(1, 2)).latent_dist.parameters
    mean, std = (statistic.view(1, -1, 1, 1, 1) for statistic in (vae.latents_mean, vae.latents_std))
    latents = encode_video(vae, clip)
    torch.testing.assert_close(latents.transpose(1, 2), (moments[:, :4] - mean) / std)
    torch.testing.assert_close(decode_video(vae, latents), vae.decode(moments[:, :4]).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fps", [None, 8.0])
def test_an_untrained_baseline_samples_what_diffusers_own_pipeline_does(model, image, fps):
    """Text, mask, guidance, times, rate and decoding: with channels of zero weight the image has no say."""
    given = {} if fps is None else {"fps": fps}
    ours = FrameBridgeLTXPipeline.from_pretrained(model, scheduler=make_ltx_backbone(), **given)
    theirs = LTXPipeline.from_pretrained(model)
    noise = torch.randn(1, 3, 4, 2, 3, generator=torch.Generator().manual_seed(3))
    call = {"prompt": "a red square", "num_inference_steps": 3, **CLIP, "output_type": "pt"}
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    found = ours(image=image, latents=noise, **call).frames
    expected = theirs(latents=LTXPipeline._pack_latents(noise.transpose(1, 2)), frame_rate=fps or 25, **call).frames
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_plain_model_becomes_a_bridge(model, image, capfd):
    pipeline = FrameBridgeLTXPipeline.from_pretrained(model)
    assert "clips of 161 frames of 512 x 704" in capfd.readouterr().err
    assert isinstance(pipeline.scheduler, FrameBridgeScheduler)
    assert (pipeline.scheduler.config.target, pipeline.scheduler.config.alignment) == ("flow", "flow_matching")
    generator = torch.Generator().manual_seed(1)
    frames = pipeline(image=image, prompt="a red square", num_inference_steps=2, generator=generator, **CLIP).frames[0]
    assert [frame.size for frame in frames] == [(96, 64)] * 17
    with pytest.raises(FrameBridgeError, match="num_frames"):
        pipeline(image=image, prompt="a red square", **{**CLIP, "num_frames": 16})


def test_another_patch_is_refused_in_one_line(tmp_path):
    path = make_tiny_ltx(tmp_path / "model") / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 2}))
    with pytest.raises(FrameBridgeError, match=r"none of LTX-Video 0.9"):
        FrameBridgeLTXPipeline.from_pretrained(tmp_path / "model")
