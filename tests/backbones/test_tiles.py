"""Tiles of autoencoders: they meet whatever their sizes, and what they give has the size of the video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLLTXVideo, AutoencoderKLWan

from framebridge_plugin.backbones.encoding import (
    decode_frames,
    decode_video,
    encode_frames,
    encode_video,
    meeting_tiles,
    spatial_compression,
)
from framebridge_plugin.errors import FrameBridgeError
from tests.backbones.test_conditioning import make_vae
from tests.tiny_ltx import make_tiny_ltx_vae
from tests.tiny_models import make_tiny_image_vae
from tests.tiny_wan import make_tiny_wan_vae

SIDES = ("tile_sample_min_height", "tile_sample_min_width")
STRIDES = ("tile_sample_stride_height", "tile_sample_stride_width")


@pytest.mark.parametrize(
    ("make", "tiles", "size", "error"),
    [
        (make_vae, dict(zip(SIDES, (44, 52), strict=True)), (136, 152), 0.4),
        (make_vae, dict(zip(SIDES, (7, 20), strict=True)), (72, 56), None),
        (make_tiny_wan_vae, dict(zip(SIDES + STRIDES, (44, 52, 36, 40), strict=True)), (136, 152), 0.1),
        (make_tiny_ltx_vae, dict(zip(SIDES + STRIDES, (100, 90, 75, 50), strict=True)), (256, 288), None),
    ],
)
@torch.no_grad()
def test_tiles_of_any_size_meet(make, tiles, size, error):
    vae, draw = make(), torch.Generator().manual_seed(0)
    for module in list(vae.modules()):  # what averages over the whole tile: the rest must agree away from borders
        for name, part in list(module.named_children()):
            if isinstance(part, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    height, width = size
    scale = spatial_compression(vae)
    video = torch.rand(1, 1, 3, height, width, generator=draw) * 2 - 1
    latents = torch.randn(1, 1, 4, height // scale, width // scale, generator=draw)
    whole = encode_video(vae, video), decode_video(vae, latents)
    vae.enable_tiling(**tiles)
    for found, expected in zip((encode_video(vae, video), decode_video(vae, latents)), whole, strict=True):
        assert found.shape == expected.shape
        assert not torch.equal(found, expected)
        if error is not None:
            assert (found - expected).square().mean().sqrt() < error * expected.std()


@pytest.mark.parametrize("make", [AutoencoderKLCogVideoX, AutoencoderKLWan, AutoencoderKLLTXVideo])
def test_the_tiles_of_the_published_autoencoders_stay_as_they_are(make):
    with torch.device("meta"):
        vae: Any = make()
    found = meeting_tiles(vae)
    assert len(found) == 4
    assert found == {name: getattr(vae, name) for name in found}


def test_tiles_that_do_not_meet_are_refused():
    vae = make_tiny_image_vae(compression=4, sample_size=20).eval()
    vae.enable_tiling()
    with pytest.raises(FrameBridgeError, match="tiles do not meet: .* --tiling off"):
        decode_frames(vae, torch.zeros(1, 1, 4, 16, 16))
    with pytest.raises(FrameBridgeError, match="tiles do not meet: .* enable_tiling: false"):
        encode_frames(vae, torch.zeros(1, 1, 3, 64, 64), torch.Generator())
