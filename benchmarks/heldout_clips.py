"""Clips that nothing was trained on, samples from their first frames, and what is measured of them with its spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.data import ClipSettings, index_dataset, read_clip
from framebridge_plugin.evaluation.measures import block_residual, global_shifts, motion_amount, psnr

AT_ONCE = 16
RESAMPLINGS = 200


@dataclass(frozen=True)
class HeldOut:
    """Clips [B, F, 3, H, W] in [0, 1] and their classes, the same number of each."""

    classes: list[str]
    clips: torch.Tensor

    @classmethod
    def read(cls, data: dict[str, Any], size: tuple[int, int, int], per_class: int, **cut: Any) -> HeldOut:
        """Read `per_class` clips of each class of a folder (`class_root`, `split`), evenly spread over its files."""
        settings = ClipSettings(*size, window="start", **cut)
        rows: dict[str, list[str]] = {}
        for path, name in sorted(index_dataset(data)):
            rows.setdefault(name, []).append(path)
        chosen = [
            (name, paths[k * len(paths) // per_class])
            for name, paths in rows.items()
            for k in range(min(per_class, len(paths)))
        ]
        clips = [read_clip(path, settings, torch.Generator()) for _, path in chosen]
        return cls([name for name, _ in chosen], torch.stack(clips) / 2 + 0.5)


def clip_size(pipeline: Any) -> tuple[int, int, int]:
    """Frames, height and width of a Latte's clips."""
    config = (pipeline.transformer or pipeline.neural_prior).config
    height, width = (size * pipeline.vae_scale_factor for size in (config.sample_height, config.sample_width))
    return config.num_frames, height, width


def sample(pipeline: Any, heldout: HeldOut, seed: int = 0, **call: Any) -> torch.Tensor:
    """A video [B, F, 3, H, W] in [0, 1] from each clip's first frame and class, from a seed of its own."""
    videos = []
    for some in torch.arange(len(heldout.classes)).split(AT_ONCE):
        result = pipeline(
            image=heldout.clips[some, 0],
            class_label=[heldout.classes[i] for i in some],
            generator=[torch.Generator().manual_seed(1_000_000 * seed + int(i)) for i in some],
            output_type="pt",
            **call,
        )
        videos.append(result.frames.float().clamp(0, 1))
    return torch.cat(videos)


def measure(videos: torch.Tensor, heldout: HeldOut) -> dict[str, Any]:
    """What is said of videos, as {"mean", "se"} over the clips, and each clip's own error for paired differences.

    `error` is the squared error to the true clip after the first frame, pixels in [-1, 1]; `shift_correlation` goes
    over all clips and frame pairs, its error by resampling clips.
    """
    true = heldout.clips
    errors = 4 * (videos - true)[:, 1:].double().square().flatten(1).mean(1)
    still = (videos.diff(dim=1).abs().flatten(1).amax(1) == 0).all()
    found = {
        "error": _mean(errors),
        "first_frame_psnr": _mean(psnr(videos[:, 0], true[:, 0])),
        "motion": _mean(motion_amount(videos) / motion_amount(true).mean()),
        "block_residual": None if still else _mean(block_residual(videos)),
        "shift_correlation": None if still else _correlation(global_shifts(videos), global_shifts(true)),
    }
    return found | {"errors": [round(value, 6) for value in errors.tolist()]}


def paired(errors: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The mean difference of two arms clip by clip, its standard error, and in how many clips the first is lower."""
    differences = torch.tensor(errors, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    return _mean(differences) | {"lower": int((differences < 0).sum()), "of": len(differences)}


def _mean(values: torch.Tensor) -> dict[str, float]:
    return {"mean": values.mean().item(), "se": (values.std() / len(values) ** 0.5).item()}


def _correlation(shifts: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)

    def of(some: torch.Tensor) -> float:
        return float(torch.stack([shifts[some].flatten(), true[some].flatten()]).corrcoef()[0, 1])

    resampled = [of(torch.randint(len(true), (len(true),), generator=generator)) for _ in range(RESAMPLINGS)]
    return {"mean": of(torch.arange(len(true))), "se": torch.tensor(resampled).nan_to_num().std().item()}


def say_numbers(found: dict[str, Any]) -> str:
    """The numbers in a line."""
    parts = [
        f"{name} {cell['mean']:.4f} +- {cell['se']:.4f}" for name, cell in found.items() if isinstance(cell, dict)
    ]
    return ", ".join(parts)


def class_data(root: Path, split: str | None) -> dict[str, Any]:
    """The data of a folder of class folders, as `index_dataset` takes them."""
    return {"class_root": str(root), **({"split": split} if split else {})}
