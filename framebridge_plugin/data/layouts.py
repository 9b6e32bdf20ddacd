"""Folders of clips in finetrainers' layouts, and the Hugging Face Hub's data sets that have one."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from framebridge_plugin.data.class_folders import VIDEO_EXTENSIONS
from framebridge_plugin.data.csv_tables import csv_header, read_text_columns
from framebridge_plugin.errors import FrameBridgeError, UsageError

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.json")
CAPTION_COLUMNS = ("caption", "prompt", "text")
CAPTION_LISTS = ("caption.txt", "captions.txt", "prompt.txt", "prompts.txt")
VIDEO_LISTS = ("video.txt", "videos.txt")
SHARD_EXTENSIONS = (".tar", ".parquet")
"""Of finetrainers' streamed layouts, which are not read here: they have no rows to shuffle, resume from or check."""


def local_data_root(name_or_path: str, base_dir: Path) -> Path:
    """The folder of a data set: a path as it is, a hub id downloaded (or found in the cache).

    Args:
        name_or_path: A folder, or an id such as `owner/name`.
        base_dir: Folder that relative paths start from.

    Returns:
        An existing folder.

    Raises:
        FrameBridgeError: There is no such folder, and the hub has no such data set; or it is one of tar or parquet
            files, which is not downloaded.
    """
    path = Path(base_dir, os.path.expanduser(name_or_path))
    if path.is_dir():
        return path
    if path.is_file() and path.suffix in SHARD_EXTENSIONS:
        raise _shards_error(path.parent, path.name)
    if path.exists() or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path) is None:
        raise FrameBridgeError(f"data_root {path} is not an existing folder")
    _refuse_shards_of_hub(name_or_path)
    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, repo_type="dataset"))
    except (OSError, HFValidationError, ValueError) as error:
        raise FrameBridgeError(
            f"data_root {name_or_path!r} is neither a folder nor to be had from the hub ({_first_line(error)}); check "
            "the name, or download it and give the folder"
        ) from error


def _refuse_shards_of_hub(name: str) -> None:
    """Such data sets tend to be large, so this comes before the download."""
    try:
        files = huggingface_hub.list_repo_files(name, repo_type="dataset")
    except (OSError, HFValidationError, ValueError):
        return  # no network: the download, or the cache, says the rest
    shards = [file for file in files if file.endswith(SHARD_EXTENSIONS)]
    if shards and not any("/" not in file and (file in METADATA_FILES or file.endswith(".txt")) for file in files):
        raise _shards_error(name, min(shards))


def _shards_error(where: str | Path, shard: str) -> FrameBridgeError:
    return FrameBridgeError(
        f"{where} is a data set of tar or parquet files ({shard}), one of finetrainers' layouts that cannot be "
        "trained on here; unpack them to x.mp4 with x.txt, or to videos with a metadata.csv (file_name and caption)"
    )


def find_clips(root: Path) -> tuple[list[str], list[str]]:
    """List the clips of a folder in one of finetrainers' layouts (see `index_dataset`).

    Args:
        root: The folder.

    Returns:
        The files' names relative to `root`, at least one, and the caption of each.

    Raises:
        FrameBridgeError: The folder has none of the layouts, is inconsistent, or a listed file is missing.
    """
    present = set(os.listdir(root))
    metadata = [name for name in METADATA_FILES if name in present]
    if len(metadata) > 1:
        raise FrameBridgeError(f"{root} holds {' and '.join(metadata)}; keep one of them")
    if metadata:
        names, captions = _read_metadata(root / metadata[0])
    else:
        pairs = _find_pairs(root, present)
        names, captions = pairs if pairs[0] else _read_lists(root, present)
    if not names:
        raise FrameBridgeError(f"{root} names no clips; give at least one clip with a caption")
    missing = _missing_files(root, names)
    if missing:
        raise FrameBridgeError(
            f"{root}: {len(missing)} of {len(names)} listed clips are missing, first {missing[0]!r}; "
            "add the files or remove their lines"
        )
    return names, captions


def _read_metadata(path: Path) -> tuple[list[str], list[str]]:
    if path.suffix == ".csv":
        return _read_metadata_csv(path)
    records: Iterable[tuple[str, Any]]
    if path.suffix == ".jsonl":
        lines = ((f"{path}:{number}", line) for number, line in enumerate(read_text(path).split("\n"), 1))
        records = [(where, parse_json(line, where)) for where, line in lines if line.strip()]
    else:
        content = parse_json(read_text(path), str(path))
        if not isinstance(content, list):
            raise FrameBridgeError(f"{path} must be a list of objects with file_name and caption")
        records = [(f"{path}: entry {number}", record) for number, record in enumerate(content)]
    names, captions = [], []
    for where, record in records:
        row = record if isinstance(record, dict) else {}
        name = row.get("file_name")
        caption = next((row[key] for key in CAPTION_COLUMNS if key in row), None)
        if not isinstance(name, str) or not isinstance(caption, str):
            raise FrameBridgeError(f"{where} needs file_name and one of {', '.join(CAPTION_COLUMNS)}, both text")
        names.append(name)
        captions.append(caption)
    return names, captions


def _read_metadata_csv(path: Path) -> tuple[list[str], list[str]]:
    header = csv_header(path)
    columns = []
    for choices in (("file_name",), CAPTION_COLUMNS):
        column = next((name for name in choices if name in header), None)
        if column is None:
            raise FrameBridgeError(f"{path} has no column {' or '.join(choices)}; its columns are {', '.join(header)}")
        columns.append(column)
    names, captions = [], []
    for batch in read_text_columns(path, columns):
        names += batch.column(0).to_pylist()
        captions += batch.column(1).to_pylist()
    return names, captions


def _find_pairs(root: Path, present: set[str]) -> tuple[list[str], list[str]]:
    names, captions = [], []
    for text_name in sorted(name for name in present if name.endswith(".txt")):
        stem = text_name.removesuffix(".txt")
        videos = [f"{stem}.{extension}" for extension in VIDEO_EXTENSIONS if f"{stem}.{extension}" in present]
        if len(videos) > 1:
            raise FrameBridgeError(f"{root / text_name} belongs to {' and '.join(videos)}; keep one of them")
        if videos:
            names.append(videos[0])
            captions.append(read_text(root / text_name).strip())
    uncaptioned = sum(name.endswith(tuple(f".{e}" for e in VIDEO_EXTENSIONS)) for name in present) - len(names)
    if names and uncaptioned:
        logger.warning("%s: %d videos without a .txt caption beside them are left out", root, uncaptioned)
    return names, captions


def _read_lists(root: Path, present: set[str]) -> tuple[list[str], list[str]]:
    found = [[name for name in choices if name in present] for choices in (VIDEO_LISTS, CAPTION_LISTS)]
    if any(len(names) != 1 for names in found):
        below = (os.path.relpath(f"{folder}/{name}", root) for folder, _, names in os.walk(root) for name in names)
        if shard := next((name for name in below if name.endswith(SHARD_EXTENSIONS)), None):
            raise _shards_error(root, shard)
        raise FrameBridgeError(
            f"{root} has none of the known layouts; add a metadata.csv with the columns file_name and caption, or "
            "x.txt with the caption beside each x.mp4, or one videos.txt and one prompts.txt"
        )
    names, captions = (read_text(root / files[0]).splitlines() for files in found)
    if len(names) != len(captions):
        raise FrameBridgeError(
            f"{root}: {found[0][0]} has {len(names)} lines but {found[1][0]} has {len(captions)}; one line per clip"
        )
    return names, captions


def _missing_files(root: Path, names: Sequence[str]) -> list[str]:
    """Find the names that do not exist, listing each folder once instead of asking for every file."""
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, file_name = os.path.split(os.path.normpath(name))
        if folder not in listed:
            path = root / folder
            listed[folder] = set(os.listdir(path)) if path.is_dir() else set()
        if file_name not in listed[folder]:
            missing.append(name)
    return missing


def read_text(path: Path) -> str:
    """Read a text file.

    Args:
        path: A file in UTF-8, with or without a byte order mark.

    Returns:
        Its content.

    Raises:
        FrameBridgeError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FrameBridgeError(f"{path} is no readable text file in UTF-8: {_first_line(error)}") from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON.

    Args:
        text: The JSON.
        where: Where it stands, for the error.

    Returns:
        The value.

    Raises:
        UsageError: It is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is no valid JSON: {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
