"""Where the clips and their captions are: folders in finetrainers' layouts, and the reference's CSV with a folder."""

from __future__ import annotations

import csv
import difflib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from framebridge_plugin.data.captions import clean_caption
from framebridge_plugin.data.class_folders import VIDEO_EXTENSIONS, index_class_folders
from framebridge_plugin.data.clips import ClipSettings
from framebridge_plugin.errors import FrameBridgeError, UsageError

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.json")
CAPTION_COLUMNS = ("caption", "prompt", "text")
CAPTION_LISTS = ("caption.txt", "captions.txt", "prompt.txt", "prompts.txt")
VIDEO_LISTS = ("video.txt", "videos.txt")

SOURCE_KEYS = ("data_root", "class_root", "csv", "video_root", "id_token", "remove_common_llm_caption_prefixes")
CLIP_KEYS = ("frame_sampling", "frame_stride", "window_frames", "window", "horizontal_flip")
ENTRY_KEYS = ("dataset_type", *SOURCE_KEYS, "video_resolution_buckets", *CLIP_KEYS, "reshape_mode")


class ClipIndex(Sequence[tuple[str, str]]):
    """The rows of a data set, each the path of a video file and its caption.

    The rows are held in Arrow columns: millions of them cost their text and nothing more, and worker processes
    share them.

    Args:
        root: Folder that the file names are relative to.
        names: File name of each row, relative to `root` or absolute; strings.
        captions: Caption of each row as stored; strings.
        id_token: Word put before each caption, or None.
        remove_common_prefixes: Whether to cut phrases such as "The video shows" from the start of captions.
        suffix: What follows each name to make it a file name, such as ".mp4".
    """

    def __init__(
        self,
        root: str,
        names: pa.ChunkedArray,
        captions: pa.ChunkedArray,
        *,
        id_token: str | None = None,
        remove_common_prefixes: bool = False,
        suffix: str = "",
    ) -> None:
        self.root = root
        self._names = names
        self._captions = captions
        self._id_token = id_token
        self._remove_common_prefixes = remove_common_prefixes
        self._suffix = suffix

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a data set with {len(self)} rows")
        row %= len(self)
        path = os.path.join(self.root, self._names[row].as_py() + self._suffix)
        caption = clean_caption(self._captions[row].as_py(), self._remove_common_prefixes)
        return path, caption if self._id_token is None else f"{self._id_token} {caption}"


def load_dataset_config(path: str | os.PathLike[str]) -> list[tuple[ClipIndex, ClipSettings]]:
    """Read finetrainers' dataset file and index every data set that it names.

    The file is JSON, `{"datasets": [entry, ...]}`. An entry has the keys of `index_dataset`, and
    `video_resolution_buckets` with exactly one `[num_frames, height, width]`, `dataset_type` ("video"), and if wanted
    `frame_sampling`, `frame_stride`, `window_frames`, `window`, `horizontal_flip` (see `ClipSettings`). Relative
    paths in it start from the current folder, as in finetrainers.

    Args:
        path: The JSON file.

    Returns:
        The rows and the clip settings of each data set, in the order of the file.

    Raises:
        UsageError: The file is no such JSON, or a key or value in it is wrong.
        FrameBridgeError: A data set is missing, empty or inconsistent.
    """
    content = _read_json(Path(path))
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f'{path}: no data sets in it; it must be {{"datasets": [{{"data_root": ...}}, ...]}}')
    loaded = []
    for number, entry in enumerate(entries):
        where = f"{path}: datasets[{number}]"
        _check_keys(entry, where)
        settings = _clip_settings(entry, where)
        loaded.append((index_dataset(entry, Path.cwd()), settings))
    return loaded


def _check_keys(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is no object with keys and values")
    for key in entry:
        if key not in ENTRY_KEYS:
            near = difflib.get_close_matches(key, ENTRY_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(ENTRY_KEYS)}"
            raise UsageError(f"{where}: unknown or unsupported key {key!r}; {hint}")
    if entry.get("dataset_type", "video") != "video":
        raise UsageError(f'{where}: dataset_type is {entry["dataset_type"]!r}; only "video" can be trained on')
    if entry.get("reshape_mode", "resize_crop") != "resize_crop":
        raise UsageError(
            f"{where}: reshape_mode is {entry['reshape_mode']!r}; clips are always resized to cover the bucket and "
            'centre-cropped: write "resize_crop" or leave it out'
        )


def _clip_settings(entry: Mapping[str, Any], where: str) -> ClipSettings:
    buckets = entry.get("video_resolution_buckets")
    if not isinstance(buckets, list) or len(buckets) != 1 or not isinstance(buckets[0], list) or len(buckets[0]) != 3:
        raise UsageError(
            f"{where}: video_resolution_buckets is {buckets!r}; it must be one size, [[frames, height, width]]"
        )
    num_frames, height, width = buckets[0]
    options = {key: entry[key] for key in CLIP_KEYS if key in entry}
    try:
        return ClipSettings(num_frames=num_frames, height=height, width=width, **options)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def index_dataset(entry: Mapping[str, Any], base_dir: str | os.PathLike[str] = ".") -> ClipIndex:
    """List the clips of one data set and their captions.

    Either `data_root` names a folder in one of finetrainers' layouts: `metadata.csv`, `.jsonl` or `.json` with the
    columns `file_name` and `caption` (or `prompt` or `text`); pairs of `x.mp4` and `x.txt`; or `videos.txt` and
    `prompts.txt` with one line per clip. Or `class_root` names a folder with one folder of videos per class, whose
    name is their caption (UCF-101). Or `csv` names the reference's WebVid-2M table (columns `videoid` and
    `name`, other columns ignored) and `video_root` the folder of `<videoid>.mp4`; rows without a file or a caption
    are left out, and their number is logged.

    Args:
        entry: The keys above, and if wanted `id_token`, a word put before each caption, and
            `remove_common_llm_caption_prefixes`. Other keys are ignored.
        base_dir: Folder that relative paths start from.

    Returns:
        The rows, at least one.

    Raises:
        UsageError: The keys do not name one data set.
        FrameBridgeError: A file or folder is missing, empty, of the wrong kind or inconsistent.
    """
    given = [key for key in ("data_root", "class_root", "csv", "video_root") if entry.get(key) is not None]
    if given not in (["data_root"], ["class_root"], ["csv", "video_root"]):
        raise UsageError(
            "a data set is either data_root, or class_root, or csv with video_root; given: "
            + (", ".join(given) if given else "none")
        )
    id_token = entry.get("id_token")
    if id_token is not None and not isinstance(id_token, str):
        raise UsageError(f"id_token is {id_token!r}; it must be text")
    remove_prefixes = entry.get("remove_common_llm_caption_prefixes", False)
    if not isinstance(remove_prefixes, bool):
        raise UsageError(f"remove_common_llm_caption_prefixes is {remove_prefixes!r}; it must be true or false")
    paths = {key: Path(base_dir, os.path.expanduser(str(entry[key]))) for key in given}
    for key, path in paths.items():
        if not (path.is_file() if key == "csv" else path.is_dir()):
            raise FrameBridgeError(f"{key} {path} is not an existing {'file' if key == 'csv' else 'folder'}")
    if given == ["data_root"]:
        root, suffix = paths["data_root"], ""
        names, captions = _index_folder(root)
    elif given == ["class_root"]:
        root, suffix = paths["class_root"], ""
        names, captions = map(_text_column, index_class_folders(root))
    else:
        root, suffix = paths["video_root"], ".mp4"
        names, captions = _index_webvid(paths["csv"], root)
    return ClipIndex(
        str(root), names, captions, id_token=id_token, remove_common_prefixes=remove_prefixes, suffix=suffix
    )


def _index_folder(root: Path) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
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
    return _text_column(names), _text_column(captions)


def _text_column(values: Sequence[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.string())])


def _read_metadata(path: Path) -> tuple[list[str], list[str]]:
    if path.suffix == ".csv":
        table = _read_csv(path, ("file_name",), CAPTION_COLUMNS)
        return table.column(0).to_pylist(), table.column(1).to_pylist()
    records: Iterable[tuple[str, Any]]
    if path.suffix == ".jsonl":
        lines = ((f"{path}:{number}", line) for number, line in enumerate(_read_text(path).split("\n"), 1))
        records = [(where, _parse_json(line, where)) for where, line in lines if line.strip()]
    else:
        content = _read_json(path)
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


def _find_pairs(root: Path, present: set[str]) -> tuple[list[str], list[str]]:
    names, captions = [], []
    for text_name in sorted(name for name in present if name.endswith(".txt")):
        stem = text_name.removesuffix(".txt")
        videos = [f"{stem}.{extension}" for extension in VIDEO_EXTENSIONS if f"{stem}.{extension}" in present]
        if len(videos) > 1:
            raise FrameBridgeError(f"{root / text_name} belongs to {' and '.join(videos)}; keep one of them")
        if videos:
            names.append(videos[0])
            captions.append(_read_text(root / text_name).strip())
    uncaptioned = sum(name.endswith(tuple(f".{e}" for e in VIDEO_EXTENSIONS)) for name in present) - len(names)
    if names and uncaptioned:
        logger.warning("%s: %d videos without a .txt caption beside them are left out", root, uncaptioned)
    return names, captions


def _read_lists(root: Path, present: set[str]) -> tuple[list[str], list[str]]:
    found = [[name for name in choices if name in present] for choices in (VIDEO_LISTS, CAPTION_LISTS)]
    if any(len(names) != 1 for names in found):
        raise FrameBridgeError(
            f"{root} has none of the known layouts; add a metadata.csv with the columns file_name and caption, or "
            "x.txt with the caption beside each x.mp4, or one videos.txt and one prompts.txt"
        )
    names, captions = (_read_text(root / files[0]).splitlines() for files in found)
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


def _index_webvid(csv_path: Path, video_root: Path) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    table = _read_csv(csv_path, ("videoid",), ("name",))
    stems = [name.removesuffix(".mp4") for name in os.listdir(video_root) if name.endswith(".mp4")]
    has_file = pc.is_in(table.column(0), value_set=pa.array(stems, pa.string()))
    has_caption = pc.greater(pc.binary_length(pc.utf8_trim_whitespace(table.column(1))), 0)
    kept = table.filter(pc.and_(has_file, has_caption))
    if kept.num_rows == 0:
        raise FrameBridgeError(
            f"{csv_path}: none of its {table.num_rows} rows has both a caption and a file {video_root}/<videoid>.mp4"
        )
    if kept.num_rows < table.num_rows:
        logger.warning(
            "%s: of %d rows, %d have no file in %s and %d have no caption; %d are used",
            csv_path,
            table.num_rows,
            pc.sum(pc.invert(has_file)).as_py(),
            video_root,
            pc.sum(pc.invert(has_caption)).as_py(),
            kept.num_rows,
        )
    return kept.column(0), kept.column(1)


def _read_csv(path: Path, *columns: tuple[str, ...]) -> pa.Table:
    """Read text columns of a CSV file, each the first of its possible names that the file has."""
    # The header is read apart, by the standard library, because the columns to read depend on it.
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
        chosen = []
        for names in columns:
            name = next((name for name in names if name in header), None)
            if name is None:
                raise FrameBridgeError(
                    f"{path} has no column {' or '.join(names)}; its columns are {', '.join(header)}"
                )
            chosen.append(name)
        return pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            # Left to itself, Arrow would take ids for numbers and drop their leading zeros.
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=chosen, column_types=dict.fromkeys(chosen, pa.string())
            ),
        )
    except (pa.ArrowInvalid, csv.Error, UnicodeDecodeError) as error:
        raise FrameBridgeError(f"{path} is no readable CSV table in UTF-8: {_first_line(error)}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FrameBridgeError(f"{path} is no readable text file in UTF-8: {_first_line(error)}") from error


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path} is not an existing file")
    return _parse_json(_read_text(path), str(path))


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is no valid JSON: {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
