"""Frechet distance between Gaussians fitted to features (Heusel et al., 2017), in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Statistics:
    """Of features of D dimensions their mean [D], and a factor R [K, D] of their covariance R^T R."""

    mean: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Self:
        """The statistics of features; the covariance is divided by N - 1.

        Args:
            features: One row for each video, [N, D].

        Returns:
            The statistics, in float64.

        Raises:
            ValueError: There are fewer than two, or one is not finite.
        """
        if len(features) < 2:
            raise ValueError(f"a Frechet distance needs two videos or more, not {len(features)}")
        if not features.isfinite().all():
            raise ValueError("a feature is not finite")
        values = features.double()
        centred = (values - values.mean(0)) / (len(values) - 1) ** 0.5
        is_tall = centred.shape[0] > centred.shape[1]
        return cls(values.mean(0), torch.linalg.qr(centred, mode="r").R if is_tall else centred)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), 0 or more.

    The trace of the root is the sum of the singular values of R1 R2^T: no covariance is multiplied with another or
    inverted, so that nothing is lost where there are fewer videos than features.
    """
    between = torch.linalg.svdvals(first.factor @ second.factor.T).sum()
    spread = first.factor.square().sum() + second.factor.square().sum() - 2 * between
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))
