"""Where the clips and their captions are: the entries of finetrainers' dataset file, and what they lead to."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc

from framebridge_plugin.data.clips import ClipSettings
from framebridge_plugin.data.decoding.decoders import load_decoder
from framebridge_plugin.data.layouts import find_clips, local_data_root
from framebridge_plugin.data.tables import read_json
from framebridge_plugin.data.ucf101 import load_ucf101
from framebridge_plugin.data.webvid import load_webvid
from framebridge_plugin.errors import FrameBridgeError, UsageError, escaped, get_logger
from framebridge_plugin.settings.data import DatasetSource, HeldoutSource, dataset_entries

logger = get_logger(__name__)

# The phrases that finetrainers removes under the same option: language models like to begin captions so.
_SUBJECTS = ("video", "clip", "image", "picture")
_VERBS = ("shows", "depicts", "features", "captures", "highlights", "introduces", "presents")
COMMON_PREFIXES = (
    "In the video,",
    "In this video,",
    "In this video clip,",
    "In the clip,",
    "Caption:",
    *(f"{word} {subject} {verb}" for word, subject, verb in product(("This", "The"), _SUBJECTS, _VERBS)),
    *(f"The animation {verb}" for verb in _VERBS),
)


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

    def batches(self) -> Iterator[tuple[list[str], list[str]]]:
        """Yields all rows in order as lists of paths and of captions."""
        for batch in self._tables("path", self._caption_column):
            yield batch["path"].to_pylist(), [self._caption(text) for text in batch[self._caption_column].to_pylist()]

    def common_folder(self) -> str:
        """The innermost folder that all files lie in."""
        bounds = [pc.min_max(batch["path"]).as_py() for batch in self._tables("path")]
        ends = [min(bound["min"] for bound in bounds), max(bound["max"] for bound in bounds)]
        return os.path.dirname(os.path.commonprefix(ends))

    def distinct_captions(self) -> Iterator[str]:
        """Yields every caption that occurs, without reading millions of rows one by one."""
        return map(self._caption, self._rows.unique(self._caption_column))

    def _tables(self, *columns: str) -> Iterator[Any]:
        return self._rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=65_536)

    def _caption(self, stored: Any) -> str:
        caption = stored.strip() if self.class_names is None else self.class_names[stored]
        if self._remove_common_prefixes and self.class_names is None:
            prefix = next((prefix for prefix in COMMON_PREFIXES if caption.startswith(prefix)), "")
            caption = caption.removeprefix(prefix).strip()
        return caption if self._id_token is None else f"{self._id_token} {caption}"


class ClipRows(Sequence[tuple[str, str, ClipSettings]]):
    """The rows of several data sets, one after the other, each with the settings of its clips."""

    def __init__(self, datasets: Iterable[tuple[ClipIndex, ClipSettings]]) -> None:
        self.datasets = list(datasets)
        self._ends = list(accumulate(len(index) for index, _ in self.datasets))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:
        dataset = bisect_right(self._ends, number)
        index, settings = self.datasets[dataset]
        return *index[number - self._ends[dataset] + len(index)], settings


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
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not an existing file")
    return index_datasets(read_json(path), str(path))


def index_datasets(content: Any, where: str) -> list[tuple[ClipIndex, ClipSettings]]:
    """Do what `load_dataset_config` does, given the content of the file, and where it stands for the errors."""
    loaded = []
    for entry in dataset_entries(content, where):
        load_decoder(entry.decoder)
        clips = ClipSettings(**entry.model_dump(include=set(ClipSettings.model_fields)))
        loaded.append((_index(entry, Path.cwd()), clips))
    return loaded


def index_heldout(
    content: Any, datasets: Sequence[tuple[ClipIndex, ClipSettings]]
) -> tuple[ClipIndex, ClipSettings, int] | None:
    """Index the clips that are not trained on, which a dataset file names under "heldout", if it does.

    Args:
        content: The content of the file: there, the keys of `index_dataset`, and if wanted `clips`, how many.
        datasets: What is trained on.

    Returns:
        The rows, the clip settings of the first data set but for the mirroring, and how many clips are wanted; None
        without the key.

    Raises:
        UsageError: A key or value is wrong, or clips are trained on.
        FrameBridgeError: Clips are missing.
    """
    if "heldout" not in content:
        return None
    source = HeldoutSource(**content["heldout"])
    try:
        index = _index(source, Path.cwd())
    except FrameBridgeError as error:
        error.args = (f"validation.heldout: {error}",)
        raise
    if trained_on := files_among(datasets, [path for paths, _ in index.batches() for path in paths]):
        what = f"{len(trained_on)} of its {len(index)} clips are trained on, such as {trained_on[0]}"
        raise UsageError(f"validation.heldout: {what}; name others, or train on one half of a split")
    return index, datasets[0][1].model_copy(update={"horizontal_flip": False}), source.clips


def files_among(datasets: Iterable[tuple[ClipIndex, ClipSettings]], paths: Iterable[str]) -> list[str]:
    """Which of some files are those of rows of data sets, by links of the same name as well: each once."""
    wanted = {path: os.path.realpath(path) for path in paths}
    # Of millions of rows only those with a name in common are looked up on the disk.
    names = {os.path.basename(path) for pair in wanted.items() for path in pair}
    rows = (path for index, _ in datasets for found, _ in index.batches() for path in found)
    found = {os.path.realpath(path) for path in rows if os.path.basename(path) in names}
    return [path for path, real in wanted.items() if real in found]


def common_clip_shape(loaded: Iterable[tuple[ClipIndex, ClipSettings]]) -> tuple[int, int, int]:
    """The one shape (frames, height, width) that a run's clips have; `UsageError` if they have several."""
    shapes = {(settings.num_frames, settings.height, settings.width) for _, settings in loaded}
    if len(shapes) > 1:
        raise UsageError(
            f"the data sets ask for clips of {len(shapes)} shapes {sorted(shapes)}; one run trains on one shape, set "
            "the same video_resolution_buckets for all"
        )
    return shapes.pop()


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
    given: dict[str, Any] = {}
    for name, value in entry.items():
        if name in DatasetSource.model_fields and value is not None:
            given[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return _index(DatasetSource(**given), Path(base_dir))


def _index(source: DatasetSource, base_dir: Path) -> ClipIndex:
    options: dict[str, Any] = {
        "id_token": source.id_token,
        "remove_common_prefixes": source.remove_common_llm_caption_prefixes,
    }
    if source.csv is not None:
        table, videos = (Path(base_dir, str(path)) for path in (source.csv, source.video_root))
        return ClipIndex(load_webvid(table, videos, refresh=source.refresh_index), "name", **options)
    if source.class_root is not None:
        splits = None if source.splits_dir is None else Path(base_dir, source.splits_dir)
        rows = load_ucf101(Path(base_dir, source.class_root), source.split, source.fold, splits)
        return ClipIndex(rows, "label", **options)
    root = local_data_root(str(source.data_root), base_dir)
    names, captions, notes = find_clips(root)
    for note in notes:
        logger.warning("%s: %s", root, note)
    rows = datasets.Dataset.from_dict(
        {"path": [os.path.join(root, name) for name in names], "caption": captions},
        info=datasets.DatasetInfo(description="\n".join(map(escaped, notes))),
    )
    return ClipIndex(rows, "caption", **options)
