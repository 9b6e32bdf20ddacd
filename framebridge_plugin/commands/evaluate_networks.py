"""What `finetrainers evaluate` has trained networks find of videos, shared out over the processes and resumable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets.config import HF_DATASETS_CACHE

from framebridge_plugin.backbones.fingerprint import short_digest
from framebridge_plugin.commands.evaluate_request import EvaluateRequest
from framebridge_plugin.data.bad_files import describe
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.evaluation.clips import Clip, Inputs
from framebridge_plugin.evaluation.measuring import Columns, frechet
from framebridge_plugin.evaluation.networks import Network, load_fvd, load_network
from framebridge_plugin.evaluation.parts import Parts
from framebridge_plugin.evaluation.report import Looked
from framebridge_plugin.processes import is_first, of_all_ranks, process_count, rank
from framebridge_plugin.progress import Progress
from framebridge_plugin.training.rendezvous import wait_for_all

_OF_CLIPS = ("clips", "count", "clip_seed", "resolution", "frames")


def load_networks(request: EvaluateRequest, device: torch.device) -> list[Network]:
    """The networks that a request names."""
    networks = [load_network(name, device) for name in request.also]
    if request.fvd_features is not None:
        networks.append(load_fvd(request.fvd_features, request.fvd_sha256, request.fvd_frames, device))
    return networks


def look(network: Network, parts: Parts, clips: Inputs, protocol: Mapping[str, Any], looked: Looked) -> None:
    """Has a network look at all videos, in this process and the others, and adds to `looked` what it found.

    What it finds of the true clips alone is kept in the cache of data sets, for other evaluations with the same clips.
    """
    own = parts.like(parts.output / "networks" / f"{network.name}-{short_digest(network.facts)}")
    key = {name: protocol[name] for name in _OF_CLIPS} | {"network": network.facts, "size": parts.size}
    # Which of the clips could be read, too: another evaluation may have had fewer, or more.
    key["read"] = short_digest([parts.read(part).numbers for part in range(len(parts))])
    truth = parts.like(Path(HF_DATASETS_CACHE, "framebridge-features", f"{network.name}-{short_digest(key)}"))
    files = (own,) if network.compares else (own, truth)
    missing = of_all_ranks([some.missing() for some in files])[0]
    todo = sorted(set().union(*missing))[rank() :: process_count()]
    total = sum(len(parts.numbers(part)) for part in todo)
    with Progress(total, f"Looking ({network.name})", unit="video", disable=not (is_first() and todo)) as progress:
        for part in todo:
            numbers = parts.read(part).numbers
            needs_truth = network.compares or part in missing[1]
            true = [_true_clip(clips, number) for number in numbers] if needs_truth else []
            if network.compares:
                own.write_columns(part, _of_pairs(network, parts.videos(part), true))
            elif part in missing[0]:
                own.write_columns(part, _of_each(network, made=parts.videos(part)))
            if needs_truth and not network.compares:
                truth.write_columns(part, _of_each(network, true=true, repeated=map(_repeated, true)))
            progress.update(len(parts.numbers(part)))
    wait_for_all()
    if is_first():
        looked.facts[network.name] = network.facts
        found = [some.columns() for some in files]
        if network.compares:
            looked.columns.update(found[0])
        elif all(found):
            features = found[0] | found[1]
            for name, group in ((network.name, "made"), (f"repeated.{network.name}", "repeated")):
                looked.figures[name] = frechet(features[group], features["true"])


def _of_each(network: Network, **groups: Iterable[torch.Tensor]) -> Columns:
    """Features of the videos of each group, below each other."""
    found = {name: [network.of(video) for video in videos] for name, videos in groups.items()}
    return {name: torch.stack(rows) for name, rows in found.items() if rows}


def _of_pairs(network: Network, videos: Iterable[torch.Tensor], true: Sequence[torch.Tensor]) -> Columns:
    """Likeness to the true clips, of videos and of the image repeated."""
    found = {network.name: videos, f"repeated.{network.name}": map(_repeated, true)}
    return {
        name: torch.stack([network.of(*pair) for pair in zip(group, true, strict=True)]).double()
        for name, group in found.items()
    }


def _repeated(clip: torch.Tensor) -> torch.Tensor:
    return clip[:1].expand_as(clip)


def _true_clip(clips: Inputs, number: int) -> torch.Tensor:
    clip = clips.read(number)
    if not isinstance(clip, Clip):
        raise FrameBridgeError(f"cannot read the clip {describe(clip)}; it could be read before")
    return clip.frames
