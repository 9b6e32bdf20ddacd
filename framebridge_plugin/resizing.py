"""Resize and crop of pixels: one function for training clips and for the images that a user samples from."""

from __future__ import annotations

import torch

from framebridge_plugin.sizes import cover_size


def resize_and_crop(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes so that height and width are just covered, then crops the centre; float32 in [0, 1]."""
    cropped = covering_crop(pixels, height, width)
    return cropped.float().div_(255.0) if cropped.dtype == torch.uint8 else cropped.float().clamp(0.0, 1.0)


def as_floats(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1], float32, of uint8 ones; the same bits on every device."""
    # By a number of the host's, CUDA multiplies with its inverse.
    whole = torch.full((), 255.0, device=pixels.device)
    return pixels.float().div_(whole).mul_(2.0).sub_(1.0)


def covering_crop(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes so that height and width are just covered, then crops the centre; uint8 stays uint8."""
    is_uint8 = pixels.dtype == torch.uint8
    old_height, old_width = pixels.shape[-2:]
    size = cover_size(old_height, old_width, height, width)
    if size != (old_height, old_width):
        # The fast kernel for 8 bits wants the three colours side by side, as decoders store them.
        pixels = pixels.contiguous(memory_format=torch.channels_last) if is_uint8 else pixels.float()
        pixels = torch.nn.functional.interpolate(
            pixels, size=size, mode="bilinear", align_corners=False, antialias=True
        )
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width].contiguous()
