"""WebVid as a `datasets` data set: the user's own CSV files and video folder, indexed once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa

from framebridge_plugin.data.listing import (
    VIDEO_EXTENSIONS,
    LeftOut,
    check_names,
    extension,
    is_utf8,
    linked_folder,
    list_folder,
)
from framebridge_plugin.data.tables import OPTIONAL_WEBVID_COLUMNS, WEBVID_COLUMNS, csv_files, read_table
from framebridge_plugin.errors import FrameBridgeError, get_logger

logger = get_logger(__name__)

_SUFFIX = ".mp4"
_FEATURES = datasets.Features({name: datasets.Value("string") for name in (*WEBVID_COLUMNS, "path")})
# Listing a folder on network storage is waiting, not work.
_LISTING_THREADS = 16
# Links to nothing or to themselves, and folders of somebody else, such as lost+found. Other errors are the disk's.
_UNLISTABLE = (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM)


def load_webvid(
    csv: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    video_root: str | os.PathLike[str],
    *,
    cache_dir: str | None = None,
    refresh: bool = False,
) -> datasets.Dataset:
    """Load WebVid-2M or -10M, or any table of the same form.

    A row's video is `<video_root>/<videoid>.mp4`, or `<video_root>/<page_dir>/<videoid>.mp4`, wherever it is found,
    also with another extension of videos, with capitals in it or in another Unicode normal form. A row whose file is
    missing stays, as a bad file; rows without a caption are left out, and so are, in `video_root`, hidden files, links
    that lead nowhere, folders that may not be listed and names that are not UTF-8. All of this is counted and logged.
    The index is built once, by listing each folder once; later calls open it from the cache and look at neither the
    table's content nor the folders. It is built again when a CSV file, or the list of files and folders directly in
    `video_root`, has changed.

    Args:
        csv: CSV files with the columns videoid and name, and if they have them contentUrl, duration and page_dir: one
            or several, a folder of them, or a pattern such as "results_2M_train_*.csv".
        video_root: Folder of the videos.
        cache_dir: Folder for the index; by default the cache of `datasets`.
        refresh: Whether to build the index again, for example after files were added in a `page_dir`.

    Returns:
        Rows with `videoid`, `contentUrl`, `duration` (ISO 8601, such as PT00H00M15S), `page_dir`, `name` (the caption)
        and `path` (of the video, absolute), all text and "" where the table has no such column. The numbers of rows
        are in `.info.description`.

    Raises:
        FrameBridgeError: A file or folder is missing or damaged, the disk fails, a column is missing, the table is not
            as `read_table` wants it, or no row has a video.
    """
    files = csv_files(csv)
    root = Path(video_root).expanduser().absolute()
    if not root.is_dir():
        raise FrameBridgeError(f"video_root {root} is not an existing folder")
    stamps = [_stamp(path) for path in (*files, root)]
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:20]
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "framebridge" / f"webvid-{digest}"
    description = cache / "description.txt"  # written last: it says that the table is complete
    try:
        if refresh or not description.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with open(cache / ".lock", "a") as lock:
                with contextlib.suppress(OSError):  # some network file systems have none
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if refresh or not description.is_file():
                    _build(files, root, cache / "rows.arrow", description)
        info = datasets.DatasetInfo(description=description.read_text(encoding="utf-8"), features=_FEATURES)
        rows = datasets.Dataset.from_file(str(cache / "rows.arrow"), info=info, split=datasets.Split.TRAIN)
    except OSError as error:
        raise FrameBridgeError(
            f"cannot build or open the index of the data set: {error}; it needs a folder with room, which "
            "HF_DATASETS_CACHE can name"
        ) from error
    if rows.info.description != _counts(len(rows), 0, 0, len(rows)):
        logger.warning("%s: %s", files[0], rows.info.description)
    return rows


def _stamp(path: Path) -> str:
    """Which state of a file or folder this is, told without reading it."""
    status = path.stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _build(files: Sequence[Path], root: Path, rows: Path, description: Path) -> None:
    info, schema = datasets.DatasetInfo(), _FEATURES.arrow_schema
    partial = [path.with_name(f".{path.name}.{os.getpid()}") for path in (rows, description)]
    try:
        with pa.OSFile(str(partial[0]), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for table in _rows(files, root, info):
                writer.write_table(table)
        partial[1].write_text(info.description, encoding="utf-8")
        partial[0].replace(rows)
        partial[1].replace(description)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
        # Arrow keeps what building took, and every loader worker would inherit it.
        pa.default_memory_pool().release_unused()


def _counts(total: int, without_file: int, without_caption: int, used: int) -> str:
    bad = " (bad files)" if without_file else ""
    return f"of {total} rows, {without_file} have no file{bad} and {without_caption} no caption; {used} are used"


def _rows(files: Sequence[Path], root: Path, info: datasets.DatasetInfo) -> Iterator[pa.Table]:
    folders, others, left_out, linked_folders = _list_videos(root)
    total = without_file = without_caption = 0
    any_use = False
    for block in (block for path in files for block in read_table(path, WEBVID_COLUMNS, OPTIONAL_WEBVID_COLUMNS)):
        ids, _, _, page_dirs, captions = block
        paths = [
            f"{root}/{file}"
            if (file := f"{name}{_SUFFIX}") in folders[""]
            else f"{root}/{folder}/{file}"
            if file in folders.get(folder, ())
            else None
            for name, folder in zip(ids, page_dirs, strict=True)
        ]
        for row in [row for row, path in enumerate(paths) if path is None]:
            found = others.get(_nfc(ids[row])) or others.get(_nfc(f"{page_dirs[row]}/{ids[row]}"))
            paths[row] = None if found is None else f"{root}/{found}"
        total += len(ids)
        without_file += paths.count(None)
        any_use = any_use or any(path and caption.strip() for path, caption in zip(paths, captions, strict=True))
        if None in paths:
            named = [
                path or f"{root}/{folder}{'/' if folder else ''}{name}{_SUFFIX}"
                for path, name, folder in zip(paths, ids, page_dirs, strict=True)
            ]
            check_names(root, named)
            firsts = {path.removeprefix(f"{root}/").partition("/")[0] for path in named} if linked_folders else set()
            if followed := firsts & linked_folders:
                raise linked_folder(root / min(followed))
            paths = [*named]
        has_caption = [bool(caption.strip()) for caption in captions]
        without_caption += has_caption.count(False)
        table = pa.table([pa.array(cells, pa.string()) for cells in (*block, paths)], schema=_FEATURES.arrow_schema)
        yield table if all(has_caption) else table.filter(pa.array(has_caption))
    left = "".join(f"; {note}" for note in left_out.notes(root))
    if not any_use:
        raise FrameBridgeError(
            f"{files[0]}{', ...' if len(files) > 1 else ''}: none of its {total} rows has both a caption and a file "
            f"{root}/<videoid>.mp4 or {root}/<page_dir>/<videoid>.mp4{left}"
        )
    info.description = _counts(total, without_file, without_caption, total - without_caption) + left


class _Videos(NamedTuple):
    """What lies in a folder of videos."""

    folders: dict[str, set[str]]
    """By folder ("" is the root) the names in .mp4."""
    others: dict[str, str]
    """The paths of all that are called otherwise, by normal form."""
    left_out: LeftOut
    linked_folders: set[str]
    """Links to folders, which are not followed."""


def _list_videos(root: Path) -> _Videos:
    left_out = LeftOut()
    unlistable: list[str] = []
    linked_folders: set[str] = set()

    def list_one(folder: str) -> tuple[list[str], set[str]]:
        if folder in linked and os.path.isdir(root / folder):
            linked_folders.add(folder)
            return [], set()
        try:
            return list_folder(root / folder)
        except OSError as error:
            if error.errno in _UNLISTABLE:
                unlistable.append(f"{folder}: {error.strerror}")
            elif error.errno != errno.ENOTDIR:
                raise
            return [], set()

    listed, linked = list_folder(root)
    names = [name for name in listed if not _has_video_extension(name) and not name.startswith(".")]
    folders: dict[str, set[str]] = {}
    odd: list[str] = []
    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        every = ((listed, linked), *threads.map(list_one, names))
        for folder, (found, found_links) in zip(["", *names], every, strict=True):
            if not is_utf8(folder):
                left_out.add("names not in UTF-8", folder)
                continue
            usable = left_out.usable(filter(_has_video_extension, found), folder)
            folders[folder] = {name for name in usable if name.endswith(_SUFFIX)}
            left_out.links += [os.path.join(folder, name) for name in usable if name in found_links]
            if len(folders[folder]) < len(usable) or not "".join([folder, *usable]).isascii():
                paths = [os.path.join(folder, name) for name in usable]
                odd += [path for path in paths if not (path.isascii() and path.endswith(_SUFFIX))]
    for what in unlistable:
        left_out.add("links or folders that cannot be listed", what)
    for folder in linked_folders:
        left_out.add("links to folders", folder)
    others: dict[str, str] = {}
    for name in sorted(odd, key=lambda name: VIDEO_EXTENSIONS.index(extension(name))):
        others.setdefault(_nfc(name.rpartition(".")[0]), name)
    return _Videos(folders, others, left_out, linked_folders)


def _has_video_extension(name: str) -> bool:
    return name.endswith(_SUFFIX) or extension(name) in VIDEO_EXTENSIONS


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
