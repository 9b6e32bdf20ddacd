"""A folder's `manifest.json`: size and SHA-256 of each of its files, written last, so that damage is seen.

Also which of a run's checkpoints are whole, and which is the newest. Needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from framebridge_plugin.files import open_regular, read_regular

MANIFEST_FILE = "manifest.json"
_LARGEST = 64 << 20
"""Bytes of a manifest, and of a file that is read whole: a checkpoint's state."""
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


class DamagedError(ValueError):
    """A file is not as it was written; the message begins with its path."""


class FileFacts(NamedTuple):
    """What a manifest says of a file.

    Attributes:
        size: In bytes.
        sha256: In hexadecimal digits.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
        files: The facts of each file, by its path in the folder.
        written: Of a checkpoint, its number in the order of writing: age goes by it, not by the number in the name.
    """

    files: Mapping[str, FileFacts]
    written: int = 0


def write_manifest(folder: Path, known: Mapping[str, FileFacts] | None = None, *, written: int = 0) -> None:
    """Writes the manifest of all that a folder holds; only files that are neither `known` nor in the manifest of a
    folder inside it are read.
    """
    files = dict(known or {})
    for inner in folder.glob(f"*/{MANIFEST_FILE}"):
        content = read_manifest(inner.parent).files
        files |= {f"{inner.parent.name}/{name}": facts for name, facts in content.items()}
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(MANIFEST_FILE, None)
    content = asdict(Manifest({name: files.get(name) or file_facts(path) for name, path in paths.items()}, written))
    text = json.dumps(content | {"digest": _digest(content)}, indent=1)
    (folder / MANIFEST_FILE).write_text(f"{text}\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; a DamagedError if there is none, or it is not as it was written."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(read_regular(path, _LARGEST))
        names = [Path(name) for name in content["files"]]
        leaves = any(name.is_absolute() or ".." in name.parts for name in names)  # a stranger's: they are written to
        if content.pop("digest") != _digest(content) or leaves:
            raise ValueError
        return Manifest(**content | {"files": {name: FileFacts(*facts) for name, facts in content["files"].items()}})
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: the folder is not whole, or of an earlier version") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError(f"{path} is damaged") from None


def files_in(folder: Path) -> Mapping[str, FileFacts] | None:
    """The files in a folder as its manifest says, if it has one that can be read."""
    with contextlib.suppress(DamagedError):
        return read_manifest(folder).files
    return None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_facts(path: Path) -> FileFacts:
    """Size and digest of a file, by reading it; a DamagedError if that fails."""
    try:
        with open_regular(path) as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            return FileFacts(file.tell(), digest.hexdigest())
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None


def check_file(path: Path, found: FileFacts, expected: FileFacts) -> None:
    """Raises a DamagedError unless a file is as a manifest says."""
    if found.size != expected.size:
        raise DamagedError(f"{path} has {found.size} bytes, not {expected.size}")
    if found.sha256 != expected.sha256:
        raise DamagedError(f"{path} has other bytes than were written")


def read_checked(folder: Path, name: str, manifest: Manifest) -> bytes:
    """The bytes of a small file, if they are as the manifest says; else a DamagedError."""
    if name not in manifest.files:
        raise DamagedError(f"{folder / name} is not in {MANIFEST_FILE}")
    try:
        content = read_regular(folder / name, _LARGEST)
    except OSError as error:
        raise DamagedError(f"{folder / name} cannot be read ({error.strerror})") from None
    check_file(folder / name, FileFacts(len(content), hashlib.sha256(content).hexdigest()), manifest.files[name])
    return content


def folder_problem(folder: Path, *, digests: bool = False) -> str | None:
    """What is not as the folder's manifest says: the first file that is missing or has another size or, for which all
    are read, other `digests`; None if there is none.
    """
    try:
        check_folder(folder, read_manifest(folder), digests=digests)
    except DamagedError as error:
        return str(error)
    return None


def check_folder(folder: Path, manifest: Manifest, *, digests: bool = False, settings_too: bool = True) -> None:
    """Raises a DamagedError for a `folder_problem`; without `settings_too` JSON files need only be there."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        if path.suffix == ".json" and not settings_too:
            continue
        size = path.stat().st_size
        check_file(path, expected._replace(size=size), expected)
        if digests:
            check_file(path, file_facts(path), expected)


# The checkpoints of a run

WEIGHTS_FILE, AVERAGE_FILE = "trainer/weights.safetensors", "trainer/ema.safetensors"
"""In a checkpoint, the weights in training, and their average (EMA)."""


def step_folder(root: Path, step: int) -> Path:
    """The folder of an update's checkpoint."""
    return root / f"step_{step:06d}"


def step_folders(root: Path) -> dict[int, Path]:
    """The folders of all checkpoints, whole or not, by their updates."""
    folders = root.iterdir() if root.is_dir() else ()
    return {int(match[1]): folder for folder in folders if (match := _STEP_FOLDER.fullmatch(folder.name))}


def whole_checkpoints(root: Path) -> dict[Path, Manifest]:
    """The folders of the checkpoints that are whole as far as sizes tell, the one that was written last first."""
    found = {}
    for folder in step_folders(root).values():
        with contextlib.suppress(DamagedError):
            manifest = read_manifest(folder)
            check_folder(folder, manifest)
            found[folder] = manifest
    return dict(sorted(found.items(), key=lambda item: item[1].written, reverse=True))
