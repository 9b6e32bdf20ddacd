"""Latents of video frames from an image autoencoder."""

from __future__ import annotations

import pytest
import torch

from framebridge_plugin.backbones.encoding import FRAMES_AT_ONCE, decode_frames, encode_frames
from tests.tiny_models import make_tiny_image_vae


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_video(batch: int = 2, frames: int = 3, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, frames, 3, height, width, generator=seeded(1)) * 2 - 1


@pytest.fixture(scope="module")
def vae():
    return make_tiny_image_vae()


@pytest.mark.parametrize("compression", [4, 8])
def test_latents_are_a_scaled_sample_of_every_frames_posterior(compression):
    vae = make_tiny_image_vae(compression, scaling_factor=0.7)
    video_BFCHW = random_video()
    state = torch.get_rng_state()
    latents = encode_frames(vae, video_BFCHW, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert latents.shape == (2, 3, 4, 16 // compression, 24 // compression)
    noise = torch.randn(latents.shape, generator=seeded(5))
    for b in range(2):
        for f in range(3):
            with torch.no_grad():
                posterior = vae.encode(video_BFCHW[b, f : f + 1]).latent_dist
            expected = (posterior.mean + posterior.std * noise[b, f]) * 0.7
            torch.testing.assert_close(latents[b, f : f + 1], expected)


def test_a_shift_of_the_latents_is_taken_away_and_put_back(vae):
    shifted = make_tiny_image_vae(shift_factor=0.25)
    video = random_video()
    difference = encode_frames(vae, video, seeded(0)) - encode_frames(shifted, video, seeded(0))
    torch.testing.assert_close(difference, torch.full_like(difference, 0.25 * vae.config.scaling_factor))
    latents = encode_frames(vae, video, seeded(0))
    torch.testing.assert_close(decode_frames(shifted, latents - difference), decode_frames(vae, latents))


def test_frames_are_decoded_from_the_autoencoders_own_scale(vae):
    latents = torch.randn(2, 3, 4, 4, 6, generator=seeded(0))
    pixels = decode_frames(vae, latents)
    assert pixels.shape == (2, 3, 3, 16, 24)
    with torch.no_grad():
        expected = vae.decode(latents[1, 2:] / vae.config.scaling_factor).sample
    torch.testing.assert_close(pixels[1, 2:], expected)


def test_long_videos_are_coded_in_parts_with_the_same_result(vae):
    video = random_video(batch=1, frames=FRAMES_AT_ONCE + 3, height=8, width=8)
    sizes = []
    hook = vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    latents = encode_frames(vae, video, seeded(0))
    hook.remove()
    assert sizes == [FRAMES_AT_ONCE, 3]
    noise = torch.randn(latents.shape, generator=seeded(0))
    with torch.no_grad():
        posterior = vae.encode(video[0]).latent_dist
    torch.testing.assert_close(latents[0], (posterior.mean + posterior.std * noise[0]) * vae.config.scaling_factor)
    torch.testing.assert_close(decode_frames(vae, latents)[:, -2:], decode_frames(vae, latents[:, -2:]))


def test_one_generator_for_each_video_makes_them_independent_of_their_batch(vae):
    video = random_video()
    together = encode_frames(vae, video, [seeded(1), seeded(2)])
    torch.testing.assert_close(together[:1], encode_frames(vae, video[:1], seeded(1)))
    torch.testing.assert_close(together[1:], encode_frames(vae, video[1:], seeded(2)))


def test_half_precision_is_left_to_the_autoencoder():
    vae = make_tiny_image_vae()
    video = random_video()
    expected = encode_frames(vae, video, seeded(0))
    latents = encode_frames(vae.bfloat16(), video, seeded(0))
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert decode_frames(vae, latents).dtype == torch.float32
