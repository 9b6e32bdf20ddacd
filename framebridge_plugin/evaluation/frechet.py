"""Frechet distance between Gaussians fitted to features (Heusel et al., 2017), in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, of `count` videos."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int

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
        return cls(values.mean(0), values.T.cov().reshape(values.shape[1], values.shape[1]), len(values))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), 0 or more.

    The trace of the root is found from symmetric matrices, whose eigenvalues are real also where a covariance has no
    inverse: there are often fewer videos than features.
    """
    root = _square_root(first.covariance)
    between = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * between
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))


def _square_root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
