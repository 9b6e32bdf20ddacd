"""Where the clips and their captions are: the entries of finetrainers' dataset file, and what they lead to."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc

from framebridge_plugin.data.captions import clean_caption
from framebridge_plugin.data.clips import ClipSettings
from framebridge_plugin.data.decoding.decoders import load_decoder
from framebridge_plugin.data.layouts import find_clips, local_data_root
from framebridge_plugin.data.tables import parse_json, read_text
from framebridge_plugin.data.ucf101 import load_ucf101
from framebridge_plugin.data.webvid import load_webvid
from framebridge_plugin.errors import UsageError

logger = logging.getLogger(__name__)

_UCF101_KEYS = ("split", "fold", "splits_dir")
SOURCE_KEYS = ("data_root", "class_root", *_UCF101_KEYS, "csv", "video_root", "refresh_index")
CAPTION_KEYS = ("id_token", "remove_common_llm_caption_prefixes")
CLIP_KEYS = (
    *("frame_sampling", "frame_stride", "window_frames", "window", "horizontal_flip"),
    *("decoder", "strict", "resize", "isolated"),
)
ENTRY_KEYS = ("dataset_type", *SOURCE_KEYS, *CAPTION_KEYS, "video_resolution_buckets", *CLIP_KEYS, "reshape_mode")


class ClipIndex(Sequence[tuple[str, str]]):
    """The rows of a data set, each the path of a video file and its caption.

    Args:
        rows: A data set with a column `path` of text.
        caption_column: Its column of captions: text, or a `ClassLabel`, whose name is the caption.
        id_token: Word put before each caption, or None.
        remove_common_prefixes: Whether to cut phrases such as "The video shows" from the start of captions.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        caption_column: str,
        *,
        id_token: str | None = None,
        remove_common_prefixes: bool = False,
    ) -> None:
        self._rows = rows
        self._caption_column = caption_column
        self._id_token = id_token
        self._remove_common_prefixes = remove_common_prefixes
        feature = rows.features[caption_column]
        self.description: str = rows.info.description or ""
        """What is left out or missing, a line for each kind."""
        self.class_names: list[str] | None = feature.names if isinstance(feature, datasets.ClassLabel) else None
        """The classes in the order of their labels, where the captions are names of classes."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[item] for item in range(*number.indices(len(self)))]
        row = self._rows[number]
        return row["path"], self._caption(row[self._caption_column])

    def batches(self, size: int = 65_536) -> Iterator[tuple[list[str], list[str]]]:
        """Yields all rows in order as lists of paths and of captions, `size` rows at a time."""
        columns = self._rows.select_columns(["path", self._caption_column]).with_format("arrow")
        for batch in columns.iter(batch_size=size):
            yield batch["path"].to_pylist(), [self._caption(text) for text in batch[self._caption_column].to_pylist()]

    def common_folder(self) -> str:
        """The innermost folder that all files lie in."""
        paths = self._rows.select_columns("path").with_format("arrow").iter(batch_size=65_536)
        bounds = [pc.min_max(batch["path"]).as_py() for batch in paths]
        ends = [min(bound["min"] for bound in bounds), max(bound["max"] for bound in bounds)]
        return os.path.dirname(os.path.commonprefix(ends))

    def distinct_captions(self) -> Iterator[str]:
        """Yields every caption that occurs, without reading millions of rows one by one."""
        return map(self._caption, self._rows.unique(self._caption_column))

    def _caption(self, stored: Any) -> str:
        if self.class_names is not None:
            caption = self.class_names[stored]
        else:
            caption = clean_caption(stored, self._remove_common_prefixes)
        return caption if self._id_token is None else f"{self._id_token} {caption}"


def load_dataset_config(path: str | os.PathLike[str]) -> list[tuple[ClipIndex, ClipSettings]]:
    """Read finetrainers' dataset file and index every data set that it names.

    The file is JSON, `{"datasets": [entry, ...]}`, and if wanted "bad_files" (see `load_bad_file_policy`). An entry
    has the keys of `index_dataset`, and `video_resolution_buckets` with exactly one `[num_frames, height, width]`,
    `dataset_type` ("video"), and if wanted `frame_sampling`, `frame_stride`, `window_frames`, `window`,
    `horizontal_flip`, `decoder`, `strict`, `resize`, `isolated` (see `ClipSettings`). Relative paths in it start from
    the current folder, as in finetrainers.

    Args:
        path: The JSON file.

    Returns:
        The rows and the clip settings of each data set, in the order of the file.

    Raises:
        UsageError: The file is no such JSON, a key or value in it is wrong, or a decoder does not load.
        FrameBridgeError: A data set is missing, empty or inconsistent.
    """
    return index_datasets(_read_json(Path(path)), str(path))


def index_datasets(content: Any, where: str) -> list[tuple[ClipIndex, ClipSettings]]:
    """Index every data set of finetrainers' dataset file, given its content.

    Args:
        content: What the JSON says; see `load_dataset_config`.
        where: Where it stands, for the errors.

    Returns:
        The rows and the clip settings of each data set.

    Raises:
        UsageError: A key or value is wrong.
        FrameBridgeError: A data set is missing, empty or inconsistent.
    """
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f'{where}: no data sets in it; it must be {{"datasets": [{{"data_root": ...}}, ...]}}')
    loaded = []
    for number, entry in enumerate(entries):
        place = f"{where}: datasets[{number}]"
        _check_keys(entry, place)
        settings = _clip_settings(entry, place)
        load_decoder(settings.decoder)
        loaded.append((index_dataset(entry, Path.cwd()), settings))
    return loaded


def common_clip_shape(loaded: Iterable[tuple[ClipIndex, ClipSettings]]) -> tuple[int, int, int]:
    """Finds the one shape that a run's clips have.

    Args:
        loaded: What `load_dataset_config` returned.

    Returns:
        (frames, height, width)

    Raises:
        UsageError: They have several.
    """
    shapes = {(settings.num_frames, settings.height, settings.width) for _, settings in loaded}
    if len(shapes) > 1:
        raise UsageError(
            f"the data sets ask for clips of {len(shapes)} shapes {sorted(shapes)}; one run trains on one shape, set "
            "the same video_resolution_buckets for all"
        )
    return shapes.pop()


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

    One of these names them:
    - `data_root`, a folder in one of finetrainers' layouts or the id of such a data set on the Hugging Face Hub:
      `metadata.csv`, `.jsonl` or `.json` with the columns `file_name` and `caption` (or `prompt` or `text`); pairs of
      `x.mp4` and `x.txt`; or `videos.txt` and `prompts.txt` with one line per clip
      (finetrainers' tar and parquet layouts are refused);
    - `class_root`, a folder with one folder of videos per class, whose name is their caption, and if wanted `split`,
      `fold` and `splits_dir` (see `load_ucf101`);
    - `csv` and `video_root`, WebVid's tables and videos, and if wanted `refresh_index` (see `load_webvid`).

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
    captions = {
        "id_token": _checked(entry, "id_token", str, "text"),
        "remove_common_prefixes": bool(_checked(entry, "remove_common_llm_caption_prefixes", bool, "true or false")),
    }
    options = {key: entry[key] for key in (*_UCF101_KEYS, "refresh_index") if entry.get(key) is not None}
    allowed = {"class_root": _UCF101_KEYS, "csv": ("refresh_index",)}.get(given[0], ())
    if misplaced := [key for key in options if key not in allowed]:
        raise UsageError(f"{misplaced[0]} does not go with {given[0]}; leave it out")

    if given == ["data_root"]:
        root = local_data_root(str(entry["data_root"]), Path(base_dir))
        clips = find_clips(root)
        for note in clips.notes:
            logger.warning("%s: %s", root, note)
        rows = datasets.Dataset.from_dict(
            {"path": [os.path.join(root, name) for name in clips.names], "caption": clips.captions},
            info=datasets.DatasetInfo(description="\n".join(clips.notes)),
        )
        return ClipIndex(rows, "caption", **captions)
    paths = {key: Path(base_dir, os.path.expanduser(str(entry[key]))) for key in given}
    if given == ["class_root"]:
        if "splits_dir" in options:
            options["splits_dir"] = Path(base_dir, os.path.expanduser(str(options["splits_dir"])))
        return ClipIndex(load_ucf101(paths["class_root"], **options), "label", **captions)
    refresh = bool(options.get("refresh_index", False))
    return ClipIndex(load_webvid(paths["csv"], paths["video_root"], refresh=refresh), "name", **captions)


def _checked(entry: Mapping[str, Any], key: str, kind: type, wanted: str) -> Any:
    value = entry.get(key)
    if value is not None and not isinstance(value, kind):
        raise UsageError(f"{key} is {value!r}; it must be {wanted}")
    return value


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path} is not an existing file")
    return parse_json(read_text(path), str(path))
