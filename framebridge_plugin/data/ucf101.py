"""UCF-101 as a `datasets` data set; any other folder with one folder of videos per class loads the same way."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import pyarrow as pa

from framebridge_plugin.data.building import build_or_open
from framebridge_plugin.data.class_folders import index_class_folders
from framebridge_plugin.data.ucf101_classes import SPLITS_FOLDER, ucf101_class_names
from framebridge_plugin.errors import FrameBridgeError, UsageError

logger = logging.getLogger(__name__)

Split = Literal["all", "train", "test"]

_FOLDS = (1, 2, 3)
_GROUP = re.compile(r"_g(\d+)_c\d+\.\w+$")


def load_ucf101(
    root: str | os.PathLike[str],
    split: Split = "all",
    fold: int = 1,
    splits_dir: str | os.PathLike[str] | None = None,
    *,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Load UCF-101, or another folder with one folder of videos per class.

    The folders are listed at every call, which takes milliseconds; the index is built again when a file was added or
    removed.

    Args:
        root: The folder of the class folders ("UCF-101" in the archive).
        split: "all" as the reference trains, or a half of one of the official folds. The folds keep the groups apart,
            whose clips show the same scene.
        fold: 1, 2 or 3; without effect for "all".
        splits_dir: The folder "ucfTrainTestlist" with trainlist01.txt and so on; by default beside `root`.
        cache_dir: Folder for the index; by default the cache of `datasets`.

    Returns:
        Rows with `path` (absolute), `label`, a `ClassLabel` of the names that `ucf101_class_names` gives, and `group`,
        the number of the scene in its class, 1 to 25 (-1 where a file's name has none).

    Raises:
        UsageError: There is no such split or fold.
        FrameBridgeError: A folder or list is missing, or there are no videos.
    """
    if split not in get_args(Split):
        raise UsageError(f"split is {split!r}; it must be one of {', '.join(get_args(Split))}")
    if fold not in _FOLDS:
        raise UsageError(f"fold is {fold!r}; it must be one of {', '.join(map(str, _FOLDS))}")
    folder = Path(root).expanduser().absolute()
    files, labels = index_class_folders(folder)
    if split != "all":
        lists = folder.parent / SPLITS_FOLDER if splits_dir is None else Path(splits_dir).expanduser().absolute()
        wanted = _read_list(lists / f"{split}list{fold:02}.txt")
        # Without regard to case: the archive's list and folder do not always agree (HandstandPushups).
        chosen = [number for number, file in enumerate(files) if file.lower() in wanted]
        if not chosen:
            raise FrameBridgeError(f"{folder}: none of its videos is in {lists}/{split}list{fold:02}.txt")
        if missing := len(wanted) - len(chosen):
            logger.warning(
                "%s: %d of the %d videos of the %s split of fold %d are missing",
                *(folder, missing, len(wanted), split, fold),
            )
        files, labels = [files[number] for number in chosen], [labels[number] for number in chosen]
    return build_or_open(
        _UCF101,
        refresh=False,
        cache_dir=cache_dir,
        root=str(folder),
        files=tuple(files),
        labels=tuple(labels),
        classes=tuple(ucf101_class_names(folder)),
    )


def _read_list(path: Path) -> set[str]:
    """The lower-case file names in one of the official lists, whose lines may end with a label."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FrameBridgeError(
            f"{path} cannot be read; unpack UCF101TrainTestSplits-RecognitionTask.zip and give its folder as "
            "splits_dir"
        ) from error
    return {line.split()[0].lower() for line in lines if line.strip()}


@dataclass
class _UCF101Config(datasets.BuilderConfig):
    root: str = ""
    files: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


class _UCF101(datasets.ArrowBasedBuilder):
    BUILDER_CONFIG_CLASS = _UCF101Config

    def _info(self) -> datasets.DatasetInfo:
        features = {
            "path": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(self.config.classes)),
            "group": datasets.Value("int32"),
        }
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train")]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        numbers = {name: number for number, name in enumerate(self.config.classes)}
        groups = [_GROUP.search(file) for file in self.config.files]
        columns = {
            "path": pa.array([f"{self.config.root}/{file}" for file in self.config.files], pa.string()),
            "label": pa.array([numbers[label] for label in self.config.labels], pa.int64()),
            "group": pa.array([int(group[1]) if group else -1 for group in groups], pa.int32()),
        }
        yield 0, pa.table(columns)
