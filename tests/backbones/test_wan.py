"""Wan 2.1: its text and latents as diffusers' own pipeline has them, its network, and which folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, WanPipeline
from PIL import Image

from framebridge_plugin import FrameBridgeWanPipeline
from framebridge_plugin.backbones.cogvideox.adapter import CogVideoXAdapter
from framebridge_plugin.backbones.encoding import decode_video, encode_video
from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.loading import ModelSource
from framebridge_plugin.backbones.ltx.adapter import LTXAdapter
from framebridge_plugin.backbones.wan.adapter import WanAdapter
from framebridge_plugin.backbones.wan.facts import WAN
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.objective import ObjectiveSettings
from tests.tiny_ltx import make_tiny_ltx_vae
from tests.tiny_wan import make_tiny_wan, make_tiny_wan_vae, make_wan_backbone

CLIP = {"num_frames": 5, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan") / "model", unipc=True)


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((48, 32), 80).convert("RGB")


def random_clip(seed: int = 1) -> torch.Tensor:
    return torch.rand(1, 5, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Text


@torch.no_grad()
def test_text_is_cleaned_masked_and_padded_with_zeros(model):
    adapter = WanAdapter(ModelSource(str(model)), ObjectiveSettings(target="flow"))
    models = adapter.load_condition_models(torch.float32)
    found = adapter.encode_caption(models, " a  red &amp;amp; blue\nsquare ", dropped=False)["encoder_hidden_states"]
    tokens = models["tokenizer"](["a red & blue square"], return_tensors="pt")
    expected = models["text_encoder"](**tokens).last_hidden_state
    count = expected.shape[1]
    assert found.shape == (1, 512, 16)
    torch.testing.assert_close(found[:, :count], expected, rtol=1e-5, atol=1e-5)
    assert not found[:, count:].any()
    empty = adapter.encode_caption(models, "a red square", dropped=True)["encoder_hidden_states"]
    assert empty.any(dim=2).sum() == 1  # the end of the text


# Latents


@torch.no_grad()
def test_latents_are_the_mean_of_the_posterior_normalised_for_each_channel():
    vae, clip = make_tiny_wan_vae(), random_clip()
    moments = vae.encode(clip.transpose(1, 2)).latent_dist.parameters
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents = encode_video(vae, clip)
    torch.testing.assert_close(latents.transpose(1, 2), (moments[:, :4] - mean) / std)
    torch.testing.assert_close(decode_video(vae, latents), vae.decode(moments[:, :4]).sample)


def make_tiny_cogvideox_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4
    )


@pytest.mark.parametrize(
    ("make", "adapter"),
    [(make_tiny_cogvideox_vae, CogVideoXAdapter), (make_tiny_ltx_vae, LTXAdapter), (make_tiny_wan_vae, WanAdapter)],
)
@torch.no_grad()
def test_the_latents_of_a_still_video_are_those_of_a_still_video(make, adapter):
    torch.manual_seed(0)
    vae, image = make().eval(), torch.rand(1, 3, 64, 64) * 2 - 1
    video = encode_video(vae, image.unsqueeze(1).expand(-1, 17, -1, -1, -1))
    still, is_constant = adapter.encode_still(vae, image, 17), adapter.still_is_constant
    assert still.shape[1] == (1 if is_constant else video.shape[1])
    torch.testing.assert_close(still.expand_as(video), video, rtol=1e-4, atol=1e-4)
    one_frame = encode_video(vae, image.unsqueeze(1))
    assert torch.allclose(one_frame.expand_as(video), video, atol=1e-4) is is_constant


@torch.no_grad()
def test_the_condition_and_the_prior_are_the_latents_of_the_still_clip(model):
    objective = ObjectiveSettings(target="flow", image_noise=False, prior_noise=False)
    adapter, clip = WanAdapter(ModelSource(str(model)), objective), random_clip()
    vae = adapter.load_vae(torch.float32)
    encoded = adapter.encode_clip(vae, clip, draw=lambda purpose: None)
    still = encode_video(vae, clip[:, :1].expand_as(clip))
    assert still.shape == (1, 2, 4, 4, 6)
    torch.testing.assert_close(encoded["image_latents"], still)
    torch.testing.assert_close(adapter.prior({}, encoded), still)
    torch.testing.assert_close(encoded["latents"], encode_video(vae, clip))


# The network, and sampling


@pytest.mark.parametrize("unipc", [False, True], ids=["euler", "unipc"])
def test_an_untrained_baseline_samples_what_diffusers_own_pipeline_does(model, image, unipc):
    """Text, guidance, times and decoding: with channels of zero weight the image has no say."""
    scheduler = make_wan_backbone(unipc)
    ours = FrameBridgeWanPipeline.from_pretrained(model, scheduler=scheduler)
    theirs = WanPipeline.from_pretrained(model, scheduler=make_wan_backbone(unipc))
    noise = torch.randn(1, 2, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    call = {"prompt": "a red square", "num_inference_steps": 3, **CLIP, "output_type": "pt"}
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    found = ours(image=image, latents=noise, **call).frames
    expected = theirs(latents=noise.transpose(1, 2), **call).frames
    assert torch.equal(ours(image=image, generator=torch.Generator().manual_seed(3), **call).frames, found)
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_plain_model_becomes_a_bridge_from_the_still_clip(model, image, capfd):
    pipeline = FrameBridgeWanPipeline.from_pretrained(model)
    said = capfd.readouterr().err
    assert "target flow" in said
    assert "81 frames of 480 x 832" in said
    assert isinstance(pipeline.scheduler, FrameBridgeScheduler)
    assert pipeline.config.fps == 16
    assert pipeline.scheduler.config.target == "flow"
    assert pipeline.scheduler.config.alignment == "flow_matching"
    # The first step goes out from the prior, the last ends at the video.
    priors = []
    initial_latent = pipeline.scheduler.initial_latent
    pipeline.scheduler.initial_latent = lambda prior, **draws: priors.append(prior) or initial_latent(prior, **draws)
    generator = torch.Generator().manual_seed(1)
    call = {"prompt": "a red square", "num_inference_steps": 2, "generator": generator, **CLIP}
    frames = pipeline(image=image, **call).frames[0]
    assert [frame.size for frame in frames] == [(48, 32)] * 5
    pixels = torch.from_numpy(pipeline.video_processor.pil_to_numpy(image)).permute(0, 3, 1, 2) * 2 - 1
    torch.testing.assert_close(priors[0], WanAdapter.encode_still(pipeline.vae, pixels, 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"num_frames": 8}, {"height": 40}, {"width": 24}])
def test_a_size_that_the_autoencoder_would_cut_is_refused(model, image, wrong):
    pipeline = FrameBridgeWanPipeline.from_pretrained(model)
    with pytest.raises(FrameBridgeError, match=next(iter(wrong))):
        pipeline(image=image, prompt="a red square", **{**CLIP, **wrong})


def test_a_saved_model_opens_again_and_diffusers_opens_it_too(model, tmp_path, image):
    pipeline = FrameBridgeWanPipeline.from_pretrained(model)
    torch.nn.init.normal_(pipeline.transformer.patch_embedding.weight, generator=torch.Generator().manual_seed(4))
    pipeline.save_pretrained(tmp_path)
    loaded = FrameBridgeWanPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.target == "flow"
    videos = []
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(2)
        call = {"prompt": "a red square", "num_inference_steps": 2, "generator": generator, **CLIP}
        videos.append(each(image=image, **call, output_type="pt").frames)
    assert torch.equal(*videos)


# Folders


def change_config(model: Path, part: str, **changes) -> None:
    path = model / part if part.endswith(".json") else model / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("part", "changes", "what"),
    [
        ("transformer", {"in_channels": 36, "out_channels": 16, "image_dim": 1280}, "image-to-video Wan"),
        ("transformer", {"in_channels": 36, "out_channels": 16}, "image-to-video Wan"),
        ("vae", {"is_residual": True}, "Wan 2.2"),
        ("model_index.json", {"boundary_ratio": 0.875}, "Wan 2.2"),
        ("model_index.json", {"expand_timesteps": True}, "Wan 2.2"),
    ],
)
def test_another_wan_is_refused_in_one_line(tmp_path, part, changes, what):
    model = make_tiny_wan(tmp_path / "model")
    assert list(SavedModel(WAN, model).findings()) == []
    change_config(model, part, **changes)
    (finding,) = SavedModel(WAN, model).findings()
    assert what in finding.message
    assert "\n" not in finding.message
    with pytest.raises(FrameBridgeError, match=what):
        FrameBridgeWanPipeline.from_pretrained(model)
    with pytest.raises(FrameBridgeError, match=what):
        WanAdapter(ModelSource(str(model)), ObjectiveSettings(target="flow"))  # as training does, of a hub id too
