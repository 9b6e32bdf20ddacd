"""Clips that nothing was trained on, samples from their first frames, and what is measured of them with its spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from framebridge_plugin.data import ClipSettings, index_dataset, read_clip
from framebridge_plugin.evaluation.measuring import frechet, measure, summarise
from framebridge_plugin.evaluation.networks import load_network
from framebridge_plugin.evaluation.requirements import network_problem

AT_ONCE = 16


@dataclass(frozen=True)
class HeldOut:
    """Clips [B, F, 3, H, W] as uint8, and the class or caption of each."""

    conditions: list[str]
    clips: torch.Tensor

    @classmethod
    def read(cls, data: Mapping[str, Any], cut: Mapping[str, Any], count: int) -> HeldOut:
        """Read about `count` clips of a data set (as `index_dataset` takes it), as many of each condition, spread
        evenly over its files; `cut`: as `ClipSettings`, each from its video's first frame on.
        """
        settings = ClipSettings(**{**cut, "window": "start", "horizontal_flip": False})
        rows: dict[str, list[str]] = {}
        for path, condition in sorted(index_dataset(dict(data))):
            rows.setdefault(condition, []).append(path)
        chosen = []
        for condition, paths in rows.items():
            these = min(len(paths), -(-count // len(rows)))
            chosen += [(condition, paths[k * len(paths) // these]) for k in range(these)]
        clips = torch.stack([read_clip(path, settings, torch.Generator()) for _, path in chosen])
        return cls([condition for condition, _ in chosen], ((clips + 1) * 127.5).round().to(torch.uint8))

    def first(self, count: int) -> HeldOut:
        """Fewer of them, evenly spread."""
        some = [k * len(self.conditions) // count for k in range(min(count, len(self.conditions)))]
        return HeldOut([self.conditions[k] for k in some], self.clips[some])


def sample(pipeline: Any, heldout: HeldOut, **call: Any) -> torch.Tensor:
    """A video from each clip's first frame and condition, from a seed of its own: uint8 [B, F, 3, H, W]."""
    videos = []
    for some in torch.arange(len(heldout.conditions)).split(AT_ONCE):
        found = pipeline(
            heldout.clips[some, 0].float() / 255,
            [heldout.conditions[k] for k in some],
            generator=[torch.Generator().manual_seed(int(k)) for k in some],
            output_type="pt",
            **call,
        ).frames
        videos.append((found.float().clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(videos)


def measured(videos: torch.Tensor, heldout: HeldOut) -> dict[str, Any]:
    """Figures of videos as {"mean", "standard_error"}, and each clip's own error, `errors`, for paired differences."""
    columns = measure(videos, heldout.clips[:, 0], heldout.clips)
    summary = summarise(columns)
    names = ("error", "first_psnr", "shift_correlation", "block_residual", "motion_ratio")
    found: dict[str, Any] = {name: summary[name] for name in names}
    return found | {"errors": [round(value, 6) for value in columns["error"].tolist()]}


def motion_distance(videos: torch.Tensor, heldout: HeldOut) -> dict[str, float | None]:
    """Frechet distance to the true clips on TransNetV2's features, which see motion; {} without extra `evaluate`."""
    if network_problem("transnetv2") is not None:
        return {}
    network = load_network("transnetv2", torch.device("cpu"))
    return frechet(*(torch.stack([network.of(clip) for clip in clips]) for clips in (videos, heldout.clips)))


def paired(errors: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The mean difference clip by clip, its standard error, and in how many clips the first is lower."""
    differences = torch.tensor(errors, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    error = differences.std() / len(differences) ** 0.5
    lower = int((differences < 0).sum())
    return {
        "mean": differences.mean().item(),
        "standard_error": error.item(),
        "lower": lower,
        "of": len(differences),
    }


def figure(found: Mapping[str, Any], digits: int = 4) -> str:
    """A mean and its standard error."""
    if found.get("mean") is None:
        return "-"
    spread = found.get("standard_error")
    return f"{found['mean']:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")
