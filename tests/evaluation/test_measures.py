"""Each measure on videos of which its value is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from framebridge_plugin.evaluation import measures
from framebridge_plugin.evaluation.frechet import Statistics, frechet_distance

FRAMES, SIDE = 6, 48


def textures(count: int, side: int = 3 * SIDE, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures [B, 3, side, side], of values in [0, 1]."""
    noise = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)


def moving(pictures: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Videos in which a large picture goes this far from frame to frame."""

    def seen(frame: int) -> torch.Tensor:
        top, left = SIDE - frame * down, SIDE - frame * right
        return pictures[:, :, top : top + SIDE, left : left + SIDE]

    return torch.stack([seen(frame) for frame in range(FRAMES)], 1)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def test_psnr_and_ssim():
    clips = moving(textures(2), 0, 1)
    assert measures.psnr(clips, clips * 0.5 + 0.5 * (clips + 0.1)).tolist() == pytest.approx([26.0206] * 2, abs=1e-3)
    images = clips[:, 0]
    assert measures.ssim(images, images).tolist() == pytest.approx([1, 1])
    # A constant picture has no structure: what is left is the likeness of the means.
    grey, dark = torch.full_like(images, 0.6), torch.full_like(images, 0.3)
    assert measures.ssim(grey, dark).tolist() == pytest.approx([(2 * 0.18 + 1e-4) / (0.45 + 1e-4)] * 2)
    assert (measures.ssim(images, images + 0.1 * torch.randn(images.shape)) < 0.95).all()
    with pytest.raises(ValueError, match="smaller than SSIM's 11"):
        measures.ssim(images[..., :10], images[..., :10])


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (0, -3), (2, 4), (-3, -1)])
def test_the_shift_of_a_moving_picture(down, right):
    found = measures.global_shifts(moving(textures(3), down, right))
    assert found.shape == (3, FRAMES - 1, 2)
    assert torch.allclose(found, torch.tensor([down, right], dtype=torch.float64).expand_as(found), atol=0.3)


def test_shift_correlation():
    def correlation(videos: torch.Tensor, others: torch.Tensor) -> float:
        return measures.shift_correlation(measures.shift_moments(videos, others).mean(0)).item()

    truth = torch.cat([moving(textures(4, seed=k), 0, k - 2) for k in range(5)])
    assert correlation(truth, truth) == pytest.approx(1)
    turned = torch.cat([moving(textures(4, seed=9 + k), 0, 2 - k) for k in range(5)])
    assert correlation(turned, truth) < -0.95
    assert abs(correlation(noise(20), truth)) < 0.2
    assert math.isnan(correlation(truth[:, :1].expand(-1, FRAMES, -1, -1, -1), truth))


def test_block_residual():
    assert measures.block_residual(moving(textures(9), 3, -4)).amax() < 0.08  # what comes into the picture
    assert measures.block_residual(moving(textures(2), 0, 0)).tolist() == [0, 0]
    assert measures.block_residual(noise(2)).amin() > 0.7
    beyond = measures.block_residual(moving(textures(2), 9, 9))
    assert beyond.amin() > 0.2


def test_motion():
    still, shifted = moving(textures(2), 0, 0), moving(textures(2), 0, 2)
    assert measures.motion_amount(still).tolist() == [0, 0]
    assert measures.motion_amount(still + torch.arange(FRAMES).view(-1, 1, 1, 1) / 100).tolist() == pytest.approx(
        [0.01] * 2, rel=1e-4
    )
    assert (measures.order_sensitivity(shifted) > 0.3).all()
    assert measures.order_sensitivity(still).tolist() == [0, 0]
    shuffled = noise(1)[:, torch.tensor([3, 0, 5, 1, 4, 2])]
    assert measures.order_sensitivity(shuffled).item() == pytest.approx(0, abs=0.01)


def test_motion_spectrum():
    wave = (2 * math.pi * torch.arange(FRAMES) * 2 / FRAMES).cos().view(1, -1, 1, 1, 1) / 2 + 0.5
    assert measures.motion_spectrum(wave.expand(-1, -1, 3, 8, 8)).tolist()[0] == pytest.approx([0, 1, 0], abs=1e-9)
    assert measures.motion_spectrum(moving(textures(2), 0, 0)).sum() == 0
    white = measures.motion_spectrum(noise(1))[0]
    assert white.tolist() == pytest.approx([0.4, 0.4, 0.2], abs=0.02)


def gaussian(mean: list[float], covariance: list[list[float]]) -> Statistics:
    values, vectors = torch.linalg.eigh(torch.tensor(covariance).double())
    return Statistics(torch.tensor(mean).double(), values.clamp(min=0).sqrt()[:, None] * vectors.T)


def test_frechet_distance_of_gaussians():
    one = gaussian([0, 0], [[4, 0], [0, 9]])
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)
    other = gaussian([3, 4], [[1, 0], [0, 16]])
    assert frechet_distance(one, other) == pytest.approx(25 + 1 + 1)
    # The same two, turned together.
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    turned = [Statistics(turn @ some.mean, some.factor @ turn.T) for some in (one, other)]
    assert frechet_distance(*turned) == pytest.approx(27)
    # A covariance without an inverse.
    flat = gaussian([0, 0], [[1, 1], [1, 1]])
    assert frechet_distance(flat, gaussian([0, 0], [[0, 0], [0, 0]])) == pytest.approx(2)


def test_statistics_of_fewer_videos_than_features():
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found = Statistics.of(features)
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-9)
    shifted = Statistics.of(features + 2)
    assert frechet_distance(found, shifted) == pytest.approx(32 * 4)
    many = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    scaled = 3 * many + 1
    assert frechet_distance(Statistics.of(many), Statistics.of(scaled)) == pytest.approx(
        (2 * many + 1).double().mean(0).square().sum().item() + 4 * many.double().var(0).sum().item(), rel=1e-5
    )
    for wrong, message in ((features[:1], "two videos or more"), (features / 0, "not finite")):
        with pytest.raises(ValueError, match=message):
            Statistics.of(wrong)
