"""Numbers of videos that need no trained network: fidelity to the image and to the true clip, and motion.

Videos are float tensors [B, F, 3, H, W] in [0, 1]; what is said of one video comes as a tensor [B] of float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

BLOCK, REACH = 8, 4
"""Side of the blocks that are looked for in the frame before, and how far away, in pixels."""

_SEARCHED_VIDEOS = 8  # at a time: each is copied once for every shift
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_CONSTANTS = (0.01**2, 0.03**2)


def psnr(videos: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each video (or image: any shape after the first axis) to its other."""
    error = (videos.double() - others.double()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Structural similarity, by a Gaussian window of 11 pixels (Wang et al., 2004).

    Args:
        images: [B, 3, H, W] in [0, 1].
        others: What they are compared with, of the same shape.

    Returns:
        One value for each image, 1 of equal ones.

    Raises:
        ValueError: An image is smaller than the window.
    """
    if min(images.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(f"images of {images.shape[-1]}x{images.shape[-2]} are smaller than SSIM's {_SSIM_WINDOW}")
    place = torch.arange(_SSIM_WINDOW, dtype=torch.float64, device=images.device) - _SSIM_WINDOW // 2
    line = (-place.square() / (2 * _SSIM_SIGMA**2)).exp()
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(planes: torch.Tensor) -> torch.Tensor:
        return F.conv2d(planes, window)

    x, y = (pictures.double().flatten(0, 1)[:, None] for pictures in (images, others))
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    first, second = _SSIM_CONSTANTS
    likeness = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    likeness /= (mean_x**2 + mean_y**2 + first) * (variance_x + variance_y + second)
    return likeness.unflatten(0, images.shape[:2]).flatten(1).mean(1)


def motion_amount(videos: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of successive frames."""
    return videos.double().diff(dim=1).abs().flatten(1).mean(1)


def motion_spectrum(videos: torch.Tensor) -> torch.Tensor:
    """Shares of the power of what changes at 1, 2, ... cycles a video: [B, F // 2], adding up to 1; 0 of a still."""
    frames = videos.shape[1]
    power = torch.fft.rfft(videos.double().flatten(2), dim=1).abs().square()
    # All frequencies but 0 and, of an even number of frames, the last stand for two.
    power[:, 1 : (frames + 1) // 2] *= 2
    power = power.sum(2)[:, 1:]
    total = power.sum(1, keepdim=True)
    return torch.where(total > 1e-12 * frames, power / total.clamp(min=1e-300), torch.zeros_like(power))


def order_sensitivity(videos: torch.Tensor) -> torch.Tensor:
    """How much the order of the frames matters: 1 less the change between neighbours over that between any two.

    0 in the mean if the frames were shuffled, near 1 of a slow smooth motion; 0 of a still video.
    """
    pixels = videos.double().flatten(2)
    frames = pixels.shape[1]
    distances = torch.stack([(pixels - pixels[:, k : k + 1]).abs().mean(2) for k in range(frames)], 1)
    anyhow = distances.sum((1, 2)) / (frames * (frames - 1))
    neighbours = distances.diagonal(1, 1, 2).mean(1)
    return torch.where(anyhow > 0, 1 - neighbours / anyhow.clamp(min=1e-300), torch.zeros_like(anyhow))


def block_residual(videos: torch.Tensor) -> torch.Tensor:
    """Share of the frames' squared change that no motion of blocks explains: near 0 of shifted pictures, .8 of noise.

    Each block of 8x8 pixels is looked for in the frame before, up to 4 pixels away; one of a still video is 0.
    """
    return torch.cat([_block_residual(part) for part in videos.split(_SEARCHED_VIDEOS)])


def _block_residual(videos: torch.Tensor) -> torch.Tensor:
    before, after = videos[:, :-1].flatten(0, 1), videos[:, 1:].flatten(0, 1)
    height, width = (side // BLOCK * BLOCK for side in before.shape[-2:])
    padded = F.pad(before, (REACH,) * 4, mode="replicate")
    shifts = range(2 * REACH + 1)
    errors = torch.stack(
        [
            F.avg_pool2d((padded[..., y : y + height, x : x + width] - after[..., :height, :width]).square(), BLOCK)
            for y in shifts
            for x in shifts
        ]
    ).mean(2)
    changed = errors[REACH * len(shifts) + REACH]  # by no shift at all
    residual, changed = (
        values.unflatten(0, (len(videos), -1)).flatten(1).double().sum(1) for values in (errors.amin(0), changed)
    )
    return torch.where(changed > 0, residual / changed.clamp(min=1e-300), torch.zeros_like(changed))


def global_shifts(videos: torch.Tensor) -> torch.Tensor:
    """How far the whole picture moves from frame to frame, by phase correlation.

    Args:
        videos: [B, F, 3, H, W].

    Returns:
        Down and to the right, in pixels with a fraction: [B, F - 1, 2].
    """
    grey = videos.double().mean(2)
    height, width = grey.shape[-2:]
    kind: Any = {"dtype": torch.float64, "device": videos.device}
    window = torch.hann_window(height, False, **kind)[:, None] * torch.hann_window(width, False, **kind)
    # Without its mean, or the window itself, which does not move, is what is found.
    spectrum = torch.fft.rfft2((grey - grey.mean((-2, -1), keepdim=True)) * window)
    cross = spectrum[:, 1:] * spectrum[:, :-1].conj()
    surface = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-12), s=(height, width))
    best = surface.flatten(2).argmax(2)
    row, column = best // width, best % width

    def at(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return surface.flatten(2).gather(2, ((rows % height) * width + columns % width)[..., None])[..., 0]

    peak = at(row, column)
    found = []
    for place, length, before, behind in (
        (row, height, at(row - 1, column), at(row + 1, column)),
        (column, width, at(row, column - 1), at(row, column + 1)),
    ):
        # The peak of a shift by a fraction is shared between two places.
        side = torch.where(behind > before, behind, -before)
        share = side.abs().clamp(min=0) / (peak + side.abs()).clamp(min=1e-12) * side.sign()
        moved = place.double() + share
        found.append(torch.where(moved > length / 2, moved - length, moved))
    return torch.stack(found, -1)


def shift_moments(videos: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Means of x, y, x^2, y^2 and x y over the `global_shifts` x of each video and y of its true clip, [B, 5].

    Both directions and all pairs of frames count together.
    """
    x, y = (global_shifts(clips).flatten(1) for clips in (videos, others))
    return torch.stack([values.mean(1) for values in (x, y, x * x, y * y, x * y)], 1)


def shift_correlation(moments: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of the shifts of videos and true clips, out of the mean of their `shift_moments` [..., 5].

    nan if the shifts of either do not differ by a hundredth of a pixel.
    """
    x, y, xx, yy, xy = moments.unbind(-1)
    variance_x, variance_y = xx - x * x, yy - y * y
    found = (xy - x * y) / (variance_x * variance_y).clamp(min=1e-300).sqrt()
    return torch.where((variance_x > 1e-4) & (variance_y > 1e-4), found, torch.full_like(found, math.nan))
