"""Resize and crop of pixels: one function for training clips and for the images that a user samples from."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps


def resize_and_crop(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes so that height and width are just covered, then crops the centre.

    The resize is bilinear with antialiasing: the network would otherwise learn the aliasing of its training clips.

    Args:
        pixels: Frames [F, 3, H, W], uint8 in [0, 255] or floating point in [0, 1].
        height: Height wanted, in pixels.
        width: Width wanted, in pixels.

    Returns:
        Float32 frames [F, 3, height, width] in [0, 1].
    """
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255.0
    old_height, old_width = pixels.shape[-2:]
    scale = max(height / old_height, width / old_width)
    size = (max(round(old_height * scale), height), max(round(old_width * scale), width))
    if size != (old_height, old_width):
        pixels = torch.nn.functional.interpolate(
            pixels.float(), size=size, mode="bilinear", align_corners=False, antialias=True
        )
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width].float().clamp(0.0, 1.0).contiguous()


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image as floating point pixels.

    Args:
        image: Any mode; it is turned upright as its EXIF data says, and converted to RGB.

    Returns:
        Float32 pixels [3, H, W] in [0, 1].
    """
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return torch.from_numpy(np.asarray(upright).copy()).permute(2, 0, 1).float() / 255.0
