"""What precomputed latents and embeddings depend on, in a form that two runs can compare.

A fingerprint is a tree of names, numbers and digests. Only what the values depend on is in it: neither the folders'
places nor what is trained on the values (target, learning rate, caption dropout, the network's size).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from framebridge_plugin.backbones.fingerprint import digest_of
from framebridge_plugin.data import ClipIndex, ClipSettings

_SAMPLED_FILES = 64


def run_fingerprint(
    args: Any, specification: Any, datasets: Sequence[tuple[ClipIndex, ClipSettings]]
) -> dict[str, Any]:
    """The fingerprint of what a run computes from its clips and captions before the network sees them."""
    fingerprint = {
        "seed": args.seed,
        "model": specification.precomputation_facts(),
        "enable_tiling": args.enable_tiling,
        "data": {str(number): data_fingerprint(index, settings) for number, (index, settings) in enumerate(datasets)},
    }
    return json.loads(json.dumps(fingerprint))  # as it is when it is read back: lists for tuples


def part_of(fingerprint: Mapping[str, Any], holds: Sequence[str]) -> dict[str, Any]:
    """What of a run's fingerprint the values depend on, of "latents", "captions", or both."""
    if "latents" in holds and "captions" in holds:
        return dict(fingerprint)
    model, data = fingerprint["model"], fingerprint["data"]
    of_others = _OF_LATENTS if "captions" in holds else OF_CAPTIONS
    part = {"model": {name: fact for name, fact in model.items() if not name.startswith(of_others)}}
    if "latents" in holds:
        return {**fingerprint, **part}
    return part | {"data": {number: {"captions": facts["captions"]} for number, facts in data.items()}}


OF_CAPTIONS = ("text_encoder", "tokenizer", "max_text_seq_length")
_OF_LATENTS = ("vae", "objective", "image_noise", "prior_noise", "noise_log_mean", "noise_log_std")


def as_read_by(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint of stored latents, as one of a run if it has no use for what is different about their prior.

    Bridge and diffusion baseline have the same video and image; a bridge with pixel noise has a prior beside them.
    """
    theirs, ours = there.get("model", {}), here.get("model", {})
    has_prior = ours.get("image_noise") or ours.get("prior_noise")
    if ours.get("objective") == "diffusion" or (theirs.get("objective") == "diffusion" and not has_prior):
        theirs = theirs | {name: ours[name] for name in ("objective", "prior_noise") if name in theirs}
    return {**there, "model": theirs}


def data_fingerprint(index: ClipIndex, settings: ClipSettings) -> dict[str, Any]:
    """The fingerprint of a data set.

    The videos themselves are not read: a video that is replaced under its name shows only if its size changes and it
    is among the 64 that are asked for theirs.
    """
    start = len(index.common_folder())
    files, captions = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for paths, texts in index.batches():
        files.update("\0".join([*(path[start:] for path in paths), ""]).encode())
        captions.update("\0".join([*texts, ""]).encode())
    count = len(index)
    sampled = sorted({number * count // _SAMPLED_FILES for number in range(_SAMPLED_FILES)})
    sizes = [_size(index[number][0]) for number in sampled]
    return {
        "rows": count,
        "files": files.hexdigest(),
        "captions": captions.hexdigest(),
        "file_sizes": digest_of(json.dumps(sizes).encode()),
        "clip": settings.fingerprint(),
    }


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None
