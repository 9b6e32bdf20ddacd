"""Latents of images and videos, and the noise that training adds to pixels."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from framebridge_plugin.backbones.encoding import add_pixel_noise, encode_video, latent_scale

HEIGHT, WIDTH = 56, 48


def make_vae(**settings) -> AutoencoderKLCogVideoX:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4, **settings
        ).eval()


@pytest.fixture
def vae() -> AutoencoderKLCogVideoX:
    return make_vae()


@pytest.fixture(params=["whole", "slices", "tiles"])
def memory_saving(request: pytest.FixtureRequest, vae: AutoencoderKLCogVideoX) -> str:
    if request.param == "slices":
        vae.enable_slicing()
    elif request.param == "tiles":
        # Tiles whose distance (5/6 and 4/5 of them) is a multiple of 8 pixels, as with the released model's 240 x 360.
        vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=40)
    return request.param


def random_pixels(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)


def test_a_still_video_has_a_still_latent(vae, memory_saving):
    image_BCHW = random_pixels(2, 3, HEIGHT, WIDTH)
    once = encode_video(vae, image_BCHW.unsqueeze(1))
    still = encode_video(vae, image_BCHW.unsqueeze(1).expand(-1, 9, -1, -1, -1))
    assert once.shape == (2, 1, 4, HEIGHT // 8, WIDTH // 8)
    assert still.shape == (2, 3, 4, HEIGHT // 8, WIDTH // 8)
    assert (still - once).abs().max().item() <= 1e-5 * once.abs().max().item()


@pytest.mark.parametrize("num_frames", [5, 17, 49])
def test_the_length_of_a_still_video_does_not_matter(vae, num_frames):
    image_BCHW = random_pixels(1, 3, 16, 24)
    once = encode_video(vae, image_BCHW.unsqueeze(1))
    still = encode_video(vae, image_BCHW.unsqueeze(1).expand(-1, num_frames, -1, -1, -1))
    assert still.shape[1] == (num_frames - 1) // 4 + 1
    assert (still - once).abs().max().item() <= 1e-5 * once.abs().max().item()


def test_in_float64_the_still_latent_is_exact_to_rounding(vae, memory_saving):
    """Below the float32 that `encode_video` returns, so on the autoencoder itself."""
    vae.double()
    image_BCFHW = random_pixels(2, 3, 1, HEIGHT, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        once = vae.encode(image_BCFHW).latent_dist.mode()
        still = vae.encode(image_BCFHW.expand(-1, -1, 9, -1, -1)).latent_dist.mode()
    assert (still - once).abs().max().item() <= 1e-12


def test_tiles_are_really_encoded_one_by_one(vae):
    """Or else the case of tiles above would repeat the case without."""
    image = random_pixels(1, 3, HEIGHT, WIDTH)
    whole = encode_video(vae, image.unsqueeze(1))
    vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=40)
    assert (encode_video(vae, image.unsqueeze(1)) - whole).abs().max() > 1e-3


def test_the_mode_is_taken_and_nothing_drawn(vae):
    video_BFCHW = random_pixels(1, 5, 3, 32, 32)
    state = torch.get_rng_state()
    latents = encode_video(vae, video_BFCHW)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        posterior = vae.encode(video_BFCHW.transpose(1, 2)).latent_dist
    expected = posterior.mean.transpose(1, 2) * vae.config.scaling_factor
    assert posterior.std.min() > 0.01
    assert torch.equal(latents, expected)


def test_latents_are_float32_whatever_the_autoencoder_computes_in(vae):
    image = random_pixels(1, 3, 32, 32)
    expected = encode_video(vae, image.unsqueeze(1))
    latents = encode_video(vae.bfloat16(), image.unsqueeze(1))
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize(("invert", "scale"), [(False, 0.7), (True, 1 / 0.7)])
def test_latents_are_scaled_as_the_config_says(invert, scale):
    vae = make_vae(scaling_factor=0.7, invert_scale_latents=invert)
    assert latent_scale(vae) == scale
    image = random_pixels(1, 3, 32, 32)
    with torch.no_grad():
        unscaled = vae.encode(image.unsqueeze(2)).latent_dist.mode().transpose(1, 2)
    torch.testing.assert_close(encode_video(vae, image.unsqueeze(1)), unscaled * scale)


@pytest.mark.parametrize("shape", [(400, 3, 16, 16), (400, 4, 3, 8, 8)], ids=["images", "videos"])
def test_the_noise_has_a_log_normal_standard_deviation_per_sample(shape):
    pixels = random_pixels(*shape)
    noise = add_pixel_noise(pixels, -3.0, 0.5, torch.Generator().manual_seed(3)) - pixels
    log_std = noise.flatten(1).std(dim=1).log()
    # 400 draws: the standard error of the mean is .5 / 20.
    assert log_std.mean().item() == pytest.approx(-3.0, abs=0.1)
    assert log_std.std().item() == pytest.approx(0.5, abs=0.07)
    # Within a sample it is white: zero mean, and no two frames or channels share it.
    assert noise.mean().abs() < 0.001
    first, second = noise[:, 0].flatten(1), noise[:, 1].flatten(1)
    correlation = (first * second).mean(dim=1) / (first.std(dim=1) * second.std(dim=1))
    assert correlation.mean().abs() < 0.02


def test_the_standard_deviation_is_exact_where_its_spread_is_zero():
    noise = add_pixel_noise(torch.zeros(2, 3, 256, 256), math.log(0.2), 0.0, torch.Generator().manual_seed(3))
    assert noise.flatten(1).std(dim=1).tolist() == pytest.approx([0.2, 0.2], rel=0.01)


def test_the_noise_comes_from_the_generator_alone():
    pixels = random_pixels(2, 3, 8, 8)
    state = torch.get_rng_state()
    first, again, other = (
        add_pixel_noise(pixels, -3.0, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0] - pixels[0], first[1] - pixels[1])


def test_the_noise_keeps_the_type_of_the_pixels():
    noisy = add_pixel_noise(random_pixels(1, 3, 8, 8, dtype=torch.bfloat16), -3.0, 0.5, torch.Generator())
    assert noisy.dtype == torch.bfloat16
