"""The random draws of a sample, each from a generator of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from framebridge_plugin.backbones.adapter import BackboneAdapter
from framebridge_plugin.backbones.encoding import noisy_pixels
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.resizing import as_floats


def sample_generator(
    sample_seed: int | None, purpose: str, generator: torch.Generator | None
) -> torch.Generator | None:
    """The generator of one draw for a sample: keyed on the sample where its seed (from `ClipStream`) is known, else
    the trainer's.
    """
    if sample_seed is None:
        return generator
    return torch.Generator().manual_seed(derive_seed(int(sample_seed), purpose))


def drops_caption(share: float, sample_seed: int | None, generator: torch.Generator | None = None) -> bool:
    """Draws whether a sample loses its caption, for classifier-free guidance; one number is drawn in any case."""
    draw = sample_generator(sample_seed, "caption dropout", generator)
    device = draw.device if draw is not None else "cpu"
    return bool(torch.rand((), generator=draw, device=device) < share)


@dataclass(frozen=True)
class PixelNoise:
    """Draws the pixel noise of a clip where it is read, beside the training: half a second for 49 x 480 x 720.

    In the autoencoder's precision, which is what it is rounded to in any case.
    """

    objective: Any
    dtype: torch.dtype

    def __call__(self, video_FCHW: torch.Tensor, sample_seed: int) -> dict[str, torch.Tensor]:
        """What `noisy_pixels` makes of a uint8 clip [F, 3, H, W]."""
        image_BCHW = as_floats(video_FCHW[:1])
        noisy = noisy_pixels(
            image_BCHW, len(video_FCHW), self.objective, lambda purpose: sample_generator(sample_seed, purpose, None)
        )
        return {name: pixels.to(self.dtype) for name, pixels in noisy.items()}


def pixel_noise(specification: Any) -> PixelNoise | None:
    """The pixel noise of a specification's clips; None for an adapter that encodes clips in its own way."""
    if type(specification.adapter).encode_clip is not BackboneAdapter.encode_clip:
        return None
    return PixelNoise(specification.objective, specification.vae_dtype)
