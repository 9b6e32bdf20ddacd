"""Folders of clips in finetrainers' layouts, and the Hugging Face Hub's data sets that have one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from framebridge_plugin.data.listing import (
    VIDEO_EXTENSIONS,
    FileFinder,
    LeftOut,
    check_names,
    extension,
    is_video,
    list_folder,
    name_key,
)
from framebridge_plugin.data.tables import (
    MAX_LINE,
    check_header,
    read_json,
    read_json_lines,
    read_lines,
    read_table,
    read_text,
)
from framebridge_plugin.errors import FrameBridgeError, get_logger
from framebridge_plugin.files import check_within, download, local_path

logger = get_logger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.json")
CAPTION_COLUMNS = ("caption", "prompt", "text")
CAPTION_LISTS = ("caption.txt", "captions.txt", "prompt.txt", "prompts.txt")
VIDEO_LISTS = ("video.txt", "videos.txt")
_TEXT_EXTENSIONS = ("csv", "jsonl", "json", "txt")
SHARD_EXTENSIONS = (".tar", ".parquet")
"""Of finetrainers' streamed layouts, which are not read here: they have no rows to shuffle, resume from or check."""


def local_data_root(name_or_path: str, base_dir: Path) -> Path:
    """The folder of a data set: a path as it is, a hub id downloaded (or found in the cache)."""
    path = local_path(os.path.expanduser(name_or_path), base_dir)
    if path is not None:
        if path.is_dir():
            return path
        if path.is_file() and path.suffix in SHARD_EXTENSIONS:
            raise _shards_error(path.parent, path.name)
        raise FrameBridgeError(f"data_root {path} is not an existing folder")

    def refuse_shards() -> None:
        # Such data sets tend to be large, so this comes before the download.
        import huggingface_hub

        try:
            files = huggingface_hub.list_repo_files(name_or_path, repo_type="dataset")
        except (OSError, ValueError):
            return  # no network: the download, or the cache, says the rest
        shards = [file for file in files if file.endswith(SHARD_EXTENSIONS)]
        if shards and not any("/" not in file and (file in METADATA_FILES or file.endswith(".txt")) for file in files):
            raise _shards_error(name_or_path, min(shards))

    return download(name_or_path, "data_root", look=refuse_shards, repo_type="dataset")


def _shards_error(where: str | Path, shard: str) -> FrameBridgeError:
    return FrameBridgeError(
        f"{where} is a data set of tar or parquet files ({shard}), one of finetrainers' layouts that cannot be "
        "trained on here; unpack them to x.mp4 with x.txt, or to videos with a metadata.csv (file_name and caption)"
    )


def find_clips(root: Path) -> tuple[list[str], list[str], list[str]]:
    """The clips of a folder, at least one: names relative to it, captions, and notes on what is missing or left out.

    A listed file that is missing is a clip, too, which cannot be read.
    """
    left_out = LeftOut()
    names, links = list_folder(root)
    present = left_out.usable(names)
    for name in present:
        if name in links and extension(name) in _TEXT_EXTENSIONS:
            check_within(root / name, root)
    metadata = [name for name in present if name.lower() in METADATA_FILES]
    if len(metadata) > 1:
        raise FrameBridgeError(f"{root} holds {' and '.join(metadata)}; keep one of them")
    if metadata:
        clips = list(_read_metadata(root / metadata[0]))
    else:
        clips = _find_pairs(root, present, left_out) or _read_lists(root, present)
    if not clips:
        raise FrameBridgeError(f"{root} names no clips; give at least one clip with a caption")
    names, captions = (list(texts) for texts in zip(*clips, strict=True))
    check_names(root, names)
    finder = FileFinder(root, left_out.links)
    found = [finder.find(name) for name in names]
    notes: list[str] = []
    if missing := [name for name, file in zip(names, found, strict=True) if file is None]:
        count = f"{len(missing)} of {len(names)} listed clips are missing, first {missing[0]!r}"
        if len(missing) == len(names):
            raise FrameBridgeError(f"{root}: {count}; add the files")
        notes.append(f"{count}: bad files")
    if empty := [name for name, caption in zip(names, captions, strict=True) if not caption.strip()]:
        notes.append(f"{len(empty)} of {len(names)} clips have an empty caption, first {empty[0]!r}: used as it is")
    notes += left_out.notes(root)
    return [file or name for name, file in zip(names, found, strict=True)], captions, notes


def _read_metadata(path: Path) -> Iterator[tuple[str, str]]:
    records: Iterable[tuple[str, Any]]
    if path.suffix.lower() == ".csv":
        for names, captions in read_table(path, ["file_name", CAPTION_COLUMNS]):
            yield from zip(names, captions, strict=True)
        return
    if path.suffix.lower() == ".jsonl":
        records = read_json_lines(path)
    else:
        content = read_json(path)
        if not isinstance(content, list):
            raise FrameBridgeError(f"{path} must be a list of objects with file_name and caption")
        records = [(f"{path}: entry {number}", record) for number, record in enumerate(content)]
    for where, record in records:
        row = record if isinstance(record, dict) else {}
        name = row.get("file_name")
        caption = next((row[key] for key in CAPTION_COLUMNS if key in row), None)
        if not isinstance(name, str) or not isinstance(caption, str):
            check_header(where, list(row), [("file_name",), CAPTION_COLUMNS])
            raise FrameBridgeError(f"{where} needs file_name and one of {', '.join(CAPTION_COLUMNS)}, both text")
        yield name, caption


def _find_pairs(root: Path, present: Iterable[str], left_out: LeftOut) -> list[tuple[str, str]]:
    videos: dict[str, list[str]] = {}
    texts: dict[str, list[str]] = {}
    for name in present:
        if is_video(name) or extension(name) == "txt":
            stem = name_key(name).rpartition(".")[0]
            (videos if is_video(name) else texts).setdefault(stem, []).append(name)
    clips = []
    for stem in sorted(videos.keys() & texts.keys(), key=lambda stem: texts[stem]):
        if len(videos[stem]) > 1:
            several = sorted(videos[stem], key=lambda name: VIDEO_EXTENSIONS.index(extension(name)))
            raise FrameBridgeError(f"{root / texts[stem][0]} belongs to {' and '.join(several)}; keep one of them")
        if len(texts[stem]) > 1:
            raise FrameBridgeError(f"{root / videos[stem][0]} has {' and '.join(texts[stem])}; keep one of them")
        clips.append((videos[stem][0], read_text(root / texts[stem][0], MAX_LINE).strip()))
    if clips:
        for reason, alone in (
            ("videos without a .txt caption beside them", videos.keys() - texts.keys()),
            ("texts without a video beside them", texts.keys() - videos.keys()),
        ):
            for name in (name for stem in alone for name in (videos | texts)[stem]):
                left_out.add(reason, name)
    return clips


def _read_lists(root: Path, present: Iterable[str]) -> list[tuple[str, str]]:
    lists = [[name for name in present if name.lower() in choices] for choices in (VIDEO_LISTS, CAPTION_LISTS)]
    if any(len(names) != 1 for names in lists):
        below = (os.path.relpath(f"{folder}/{name}", root) for folder, _, names in os.walk(root) for name in names)
        if shard := next((name for name in below if name.endswith(SHARD_EXTENSIONS)), None):
            raise _shards_error(root, shard)
        raise FrameBridgeError(
            f"{root} has none of the known layouts; add a metadata.csv with the columns file_name and caption, or "
            "x.txt with the caption beside each x.mp4, or one videos.txt and one prompts.txt"
        )
    names, captions = (read_lines(root / files[0]) for files in lists)
    if len(names) != len(captions):
        raise FrameBridgeError(
            f"{root}: {lists[0][0]} has {len(names)} lines but {lists[1][0]} has {len(captions)}; one line per clip"
        )
    clips = list(zip(names, captions, strict=True))
    if shifted := next((number for number, (name, caption) in enumerate(clips, 1) if caption and not name), None):
        raise FrameBridgeError(f"{root / lists[0][0]}:{shifted} is empty, but the caption is not; one line per clip")
    return [clip for clip in clips if clip[0]]
