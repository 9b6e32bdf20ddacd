"""What is measured of each video, in whatever batches they come, and how it is summed up over all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from framebridge_plugin.evaluation import measures
from framebridge_plugin.evaluation.frechet import Statistics, frechet_distance

Columns = dict[str, torch.Tensor]
"""Values by name, one row for each video, float64: [B], or [B, K] of what has several."""

OF_TRUTH = "true."
"""What begins the names of columns that say of the true clips what others say of the videos."""

_SMALLEST_FOR_SSIM = 11
_GROUPS = 10


def measure(videos: torch.Tensor, images: torch.Tensor, truth: torch.Tensor | None) -> Columns:
    """What needs no trained network.

    Args:
        videos: Videos that were made, uint8 [B, F, 3, H, W].
        images: The images that they were made of, uint8 [B, 3, H, W].
        truth: The clips that began with these images, of the videos' shape, if there are any.

    Returns:
        The columns, on the CPU.
    """
    made, stills = as_levels(videos), as_levels(images)
    columns = {"first_psnr": measures.psnr(made[:, 0], stills), **_of_any(made)}
    if min(images.shape[-2:]) >= _SMALLEST_FOR_SSIM:
        columns["first_ssim"] = measures.ssim(made[:, 0], stills)
    if truth is not None:
        true = as_levels(truth)
        repeated = stills[:, None].expand_as(true)
        columns["shift_moments"] = measures.shift_moments(made, true)
        columns |= {f"{OF_TRUTH}{name}": values for name, values in _of_any(true).items()}
        for name, others in (("", made), ("repeated.", repeated)):
            columns[f"{name}psnr"] = measures.psnr(others, true)
            # In [-1, 1], of what is not given.
            error = (others[:, 1:].double() - true[:, 1:].double()).square()
            columns[f"{name}error"] = 4 * error.flatten(1).mean(1)
    return {name: values.cpu() for name, values in columns.items()}


def as_levels(pixels: torch.Tensor) -> torch.Tensor:
    """Float32 in [0, 1] of uint8."""
    return pixels.float() / 255


def _of_any(videos: torch.Tensor) -> Columns:
    return {
        "motion": measures.motion_amount(videos),
        "order": measures.order_sensitivity(videos),
        "block_residual": measures.block_residual(videos),
        "spectrum": measures.motion_spectrum(videos),
    }


def summarise(columns: Columns) -> dict[str, dict[str, Any]]:
    """Figures over all videos, each with its `mean` and its `standard_error` over videos; None where there is none.

    What is a figure of all videos together (`motion_ratio`, `shift_correlation`, `spectrum_distance`) has an error by
    leaving out one video after the other (the jackknife).
    """
    summary: dict[str, dict[str, Any]] = {
        name: _of_values(values) for name, values in columns.items() if values.ndim == 1 and len(values)
    }
    for name in ("spectrum", f"{OF_TRUTH}spectrum"):
        if name in columns:
            summary[name] = {"mean": columns[name].mean(0).tolist()}
    if f"{OF_TRUTH}motion" in columns:
        motion, spectrum = ((columns[name], columns[OF_TRUTH + name]) for name in ("motion", "spectrum"))
        summary["motion_ratio"] = jackknife(_ratio, {"made": motion[0], "true": motion[1]})
        summary["spectrum_distance"] = jackknife(_distance, {"made": spectrum[0], "true": spectrum[1]})
        summary["shift_correlation"] = jackknife(measures.shift_correlation, {"moments": columns["shift_moments"]})
    return summary


def frechet(features: torch.Tensor, others: torch.Tensor) -> dict[str, float | None]:
    """The Frechet distance of features [N, D] from others, with an error by leaving out a tenth of both at a time."""
    count = min(len(features), len(others))
    if count < 2:
        return {"mean": None, "standard_error": None}
    value = frechet_distance(Statistics.of(features), Statistics.of(others))
    if count < 2 * _GROUPS:
        return {"mean": value, "standard_error": None}
    without = []
    for group in range(_GROUPS):
        kept = (table[torch.arange(len(table)) % _GROUPS != group] for table in (features, others))
        without.append(frechet_distance(*map(Statistics.of, kept)))
    spread = torch.tensor(without, dtype=torch.float64).var(correction=0) * (_GROUPS - 1)
    return {"mean": value, "standard_error": float(spread.sqrt())}


def _of_values(values: torch.Tensor) -> dict[str, float | None]:
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": _finite(values.mean()), "standard_error": _finite(error)}


def jackknife(figure: Any, columns: Mapping[str, torch.Tensor]) -> dict[str, float | None]:
    """A figure of the sums of columns over all videos, and its standard error.

    `figure` takes the means of the columns, [K] or [N, K] of N such, and gives a value for each.
    """
    count = len(next(iter(columns.values())))
    sums = {name: values.sum(0) for name, values in columns.items()}
    value = figure(**{name: total / count for name, total in sums.items()})
    if count < 2:
        return {"mean": _finite(value), "standard_error": None}
    others = figure(**{name: (sums[name] - values) / (count - 1) for name, values in columns.items()})
    spread = (others - others.mean()).square().sum() * (count - 1) / count
    return {"mean": _finite(value), "standard_error": _finite(spread.sqrt())}


def _ratio(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return made / true


def _distance(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Half the sum of the differences of two spectra: 0 if they are equal, 1 if they share nothing."""
    return (made - true).abs().sum(-1) / 2


def _finite(value: float | torch.Tensor) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
