"""WebVid as a `datasets` data set: the user's own CSV files and video folder, indexed once."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from framebridge_plugin.data.building import build_or_open, file_stamp
from framebridge_plugin.data.csv_files import csv_files
from framebridge_plugin.data.csv_tables import csv_header, read_text_columns
from framebridge_plugin.errors import FrameBridgeError

logger = logging.getLogger(__name__)

WEBVID_COLUMNS = ("videoid", "contentUrl", "duration", "page_dir", "name")
_REQUIRED = ("videoid", "name")
_SUFFIX = ".mp4"
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

    A row's video is `<video_root>/<videoid>.mp4`, or `<video_root>/<page_dir>/<videoid>.mp4`, wherever it is found.
    Rows without a caption or a file are left out, and their numbers logged; so are, in `video_root`, links that lead
    nowhere, folders that may not be listed and names that are not UTF-8. The index is built once, by listing each
    folder once; later calls open it from the cache and look at neither the table's content nor the folders. It is
    built again when a CSV file, or the list of files and folders directly in `video_root`, has changed.

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
        FrameBridgeError: A file or folder is missing or damaged, the disk fails, a column is missing, or no row has
            a video.
    """
    files = csv_files(csv)
    root = Path(video_root).expanduser().absolute()
    if not root.is_dir():
        raise FrameBridgeError(f"video_root {root} is not an existing folder")
    return build_or_open(
        _WebVid,
        refresh=refresh,
        cache_dir=cache_dir,
        csv_files=tuple(map(str, files)),
        video_root=str(root),
        stamps=tuple(map(file_stamp, [*files, root])),
    )


@dataclass
class _WebVidConfig(datasets.BuilderConfig):
    csv_files: tuple[str, ...] = ()
    video_root: str = ""
    stamps: tuple[str, ...] = ()


class _WebVid(datasets.ArrowBasedBuilder):
    BUILDER_CONFIG_CLASS = _WebVidConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            features=datasets.Features({name: datasets.Value("string") for name in (*WEBVID_COLUMNS, "path")})
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train")]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        root = Path(self.config.video_root)
        files, left_out = _list_videos(root)
        total = without_caption = without_file = kept = 0
        for number, batch in enumerate(_all_rows(map(Path, self.config.csv_files))):
            rows = batch.append_column("path", _paths(batch, root, files))
            has_caption = pc.greater(pc.binary_length(pc.utf8_trim_whitespace(rows["name"])), 0)
            has_file = pc.is_valid(rows["path"])
            total += rows.num_rows
            without_caption += pc.sum(pc.invert(has_caption)).as_py() or 0
            without_file += pc.sum(pc.invert(has_file)).as_py() or 0
            rows = rows.filter(pc.and_(has_caption, has_file))
            kept += rows.num_rows
            yield number, rows
        counts = (
            f"of {total} rows, {without_file} have no file and {without_caption} no caption; {kept} are used{left_out}"
        )
        where = self.config.csv_files[0] + (", ..." if len(self.config.csv_files) > 1 else "")
        if not kept:
            raise FrameBridgeError(
                f"{where}: none of its {total} rows has both a caption and a file {root}/<videoid>.mp4 or "
                f"{root}/<page_dir>/<videoid>.mp4{left_out}"
            )
        self.info.description = counts
        if kept < total or left_out:
            logger.warning("%s: %s", where, counts)


def _all_rows(files: Iterator[Path]) -> Iterator[pa.Table]:
    for path in files:
        header = csv_header(path)
        if missing := [name for name in _REQUIRED if name not in header]:
            raise FrameBridgeError(
                f"{path} has no column {' and no '.join(missing)}; its columns are {', '.join(header) or 'none'}"
            )
        present = [name for name in WEBVID_COLUMNS if name in header]
        for batch in read_text_columns(path, present):
            empty = pa.array([""] * batch.num_rows, pa.string())
            columns = [batch[name] if name in present else empty for name in WEBVID_COLUMNS]
            yield pa.Table.from_arrays(columns, WEBVID_COLUMNS)


def _list_videos(root: Path) -> tuple[pa.Array, str]:
    """Lists the videos in `root` and its folders.

    Args:
        root: The folder.

    Returns:
        Their names relative to it and without the extension; and what was left out, "" for nothing, to be put behind
        a message.

    Raises:
        OSError: The disk fails.
    """
    with os.scandir(root) as entries:
        listed = [(entry.name, entry.name.endswith(_SUFFIX)) for entry in entries]
    names = [name.removesuffix(_SUFFIX) for name, is_video in listed if is_video]
    unlistable: list[str] = []

    def list_folder(folder: str) -> list[str]:
        try:
            found = os.listdir(root / folder)
        except OSError as error:
            if error.errno in _UNLISTABLE:
                unlistable.append(f"{folder!r}: {error.strerror}")
            elif error.errno != errno.ENOTDIR:
                raise
            return []
        return [f"{folder}/{name.removesuffix(_SUFFIX)}" for name in found if name.endswith(_SUFFIX)]

    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        for found in threads.map(list_folder, [name for name, is_video in listed if not is_video]):
            names += found
    readable = [name for name in names if _is_utf8(name)]
    unreadable = [repr(name + _SUFFIX) for name in names if not _is_utf8(name)]
    left_out = ""
    for what, these in (("links or folders that cannot be listed", unlistable), ("names not in UTF-8", unreadable)):
        if these:
            left_out += f"; left out of {root}: {len(these)} {what}, such as {min(these)}"
    return pa.array(readable, pa.string()), left_out


def _is_utf8(name: str) -> bool:
    """Whether a file's name is text; Python puts surrogates in the place of bytes that are none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _paths(rows: pa.Table, root: Path, files: pa.Array) -> pa.ChunkedArray:
    """The absolute path of each row's video, null where there is none; a flat file comes before one in a folder."""
    flat = rows["videoid"]
    nested = pc.binary_join_element_wise(rows["page_dir"], rows["videoid"], "/")
    null = pa.scalar(None, pa.string())
    found = pc.coalesce(
        *(pc.if_else(pc.is_in(names, value_set=files), names, null) for names in (flat, nested)),
    )
    return pc.binary_join_element_wise(pc.binary_join_element_wise(str(root), found, "/"), _SUFFIX, "")
