"""Fingerprints of a model's components, cheap enough to be taken whenever a model is opened, and their comparison.

A fingerprint is a tree of names, numbers and digests. Folders' places are not in it. Needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.files import component_files, read_json
from framebridge_plugin.backbones.manifest import file_facts
from framebridge_plugin.errors import FrameBridgeError

_BLOCKS, _BLOCK_BYTES = 1024, 4096


def component_fingerprint(folder: Path, *, whole: bool = False) -> dict[str, str]:
    """The fingerprint of a model's component.

    Args:
        folder: The component's folder in diffusers' or transformers' format.
        whole: Read all of the weights, and not blocks of them: the SHA-256 of each file.

    Returns:
        A digest for each file of settings, vocabulary or weights, by name. Of a settings file it leaves out what says
        who wrote it. Of a file of weights it is that of its size and of 1024 evenly spread blocks of 4 KiB, the first
        with the file's header: a network that was trained on is another one, without gigabytes to be read.

    Raises:
        FrameBridgeError: If a file cannot be read, or leads out of the folder.
    """
    files, weights = component_files(folder), _whole_digest if whole else _weights_digest
    try:
        return {name: (_settings_digest if name.endswith(".json") else weights)(path) for name, path in files}
    except (OSError, ValueError) as error:
        raise FrameBridgeError(f"cannot read {folder}: {error}; check that it is a whole model") from error


def short_digest(value: Any) -> str:
    """16 hexadecimal digits that stand for what JSON can say."""
    return digest_of(json.dumps(value, sort_keys=True).encode())[:16]


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Where two fingerprints differ first, that of stored values and that of a run; None if they are equal."""
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
    content = read_json(path).items()
    said = {key: value for key, value in content if not key.startswith("_") and key not in _WRITERS}
    return digest_of(json.dumps(said, sort_keys=True).encode())


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


def _whole_digest(path: Path) -> str:
    return file_facts(path).sha256


def digest_of(data: bytes) -> str:
    """Returns 32 hexadecimal digits that stand for `data`."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
