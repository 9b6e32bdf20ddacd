"""What precomputed latents and embeddings depend on, in a form that two runs can compare.

A fingerprint is a tree of names, numbers and digests. Only what the values depend on is in it: neither the folders'
places nor what is trained on the values (target, learning rate, caption dropout, the network's size).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from framebridge_plugin.data import ClipIndex, ClipSettings
from framebridge_plugin.errors import FrameBridgeError, UsageError

_SAMPLED_FILES = 64
_BLOCKS, _BLOCK_BYTES = 1024, 4096


def run_fingerprint(
    args: Any, specification: Any, datasets: Sequence[tuple[ClipIndex, ClipSettings]]
) -> dict[str, Any]:
    """The fingerprint of what a run computes from its clips and captions before the network sees them.

    Args:
        args: finetrainers' arguments.
        specification: The model's, with `precomputation_facts`.
        datasets: What `load_dataset_config` returned.

    Returns:
        What JSON can say: "seed", "model" (what `precomputation_facts` returns), "data" (one entry for each data set,
        see `data_fingerprint`), "enable_tiling".

    Raises:
        UsageError: If the specification has no `precomputation_facts`.
        FrameBridgeError: If a file of the model cannot be read.
    """
    if not hasattr(specification, "precomputation_facts"):
        raise UsageError(f"{type(specification).__name__} does not say what its latents depend on: train it live")
    fingerprint = {
        "seed": args.seed,
        "model": specification.precomputation_facts(),
        "enable_tiling": args.enable_tiling,
        "data": {str(number): data_fingerprint(index, settings) for number, (index, settings) in enumerate(datasets)},
    }
    return json.loads(json.dumps(fingerprint))  # as it is when it is read back: lists for tuples


def data_fingerprint(index: ClipIndex, settings: ClipSettings) -> dict[str, Any]:
    """The fingerprint of a data set.

    The videos themselves are not read: a video that is replaced under its name shows only if its size changes and it
    is among the 64 that are asked for theirs.

    Args:
        index: Its rows.
        settings: How clips are cut.

    Returns:
        "rows", their number; digests of their "files" (names from the innermost folder on that holds all of them) and
        "captions", in order; "file_sizes", a digest of the sizes of at most 64 of them, evenly spread; and "clip",
        what of the settings changes pixels.
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
        "file_sizes": _digest(json.dumps(sizes).encode()),
        "clip": settings.fingerprint(),
    }


def component_fingerprint(folder: Path) -> dict[str, str]:
    """The fingerprint of a model's component.

    Args:
        folder: The component's folder in diffusers' or transformers' format.

    Returns:
        A digest for each file of settings, vocabulary or weights, by name. Of a settings file it leaves out what says
        who wrote it. Of a file of weights it is that of its size and of 1024 evenly spread blocks of 4 KiB, the first
        with the file's header: a network that was trained on is another one, without gigabytes to be read.

    Raises:
        FrameBridgeError: If a file cannot be read.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in _DIGEST_OF_SUFFIX)
        return {path.name: _DIGEST_OF_SUFFIX[path.suffix](path) for path in files}
    except (OSError, ValueError) as error:
        raise FrameBridgeError(f"cannot read {folder}: {error}; check that it is a whole model") from error


def short_digest(value: Any) -> str:
    """A digest that fits into an error's line.

    Args:
        value: What JSON can say.

    Returns:
        16 hexadecimal digits.
    """
    return _digest(json.dumps(value, sort_keys=True).encode())[:16]


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Compares two fingerprints.

    Args:
        there: That of the stored values.
        here: That of the run.

    Returns:
        Where they differ first, and the two values; None if they are equal.
    """
    theirs, ours = dict(_leaves(there)), dict(_leaves(here))
    for name in [*ours, *theirs]:
        value, other = theirs.get(name, _ABSENT), ours.get(name, _ABSENT)
        if value != other:
            return f"{name} is {_short(value)} there and {_short(other)} here"
    return None


_ABSENT = "not given"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _settings_digest(path: Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if not key.startswith("_") and key not in _WRITERS}
    return _digest(json.dumps(content, sort_keys=True).encode())


_WRITERS = ("transformers_version", "dtype", "torch_dtype")
"""Keys of a settings file that say who wrote it, or which precision it is loaded in, which the run says itself."""


def _weights_digest(path: Path) -> str:
    size = path.stat().st_size
    starts = sorted({number * max(size - _BLOCK_BYTES, 0) // (_BLOCKS - 1) for number in range(_BLOCKS)})
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


_DIGEST_OF_SUFFIX = {".json": _settings_digest, ".model": _weights_digest, ".safetensors": _weights_digest}


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
