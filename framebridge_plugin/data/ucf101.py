"""UCF-101 as a `datasets` data set; any other folder with one folder of videos per class loads the same way."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import get_args

import datasets

from framebridge_plugin.data.class_folders import class_folders, no_videos
from framebridge_plugin.data.ucf101_classes import foreign_classes, label_names, read_split, split_list
from framebridge_plugin.errors import FrameBridgeError, UsageError, escaped, get_logger
from framebridge_plugin.settings.data import Fold, Split

logger = get_logger(__name__)

_GROUP = re.compile(r"_g(\d+)_c\d+\.\w+$")


def load_ucf101(
    root: str | os.PathLike[str],
    split: Split = "all",
    fold: Fold = 1,
    splits_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """Load UCF-101, or another folder with one folder of videos per class.

    The folders are listed at every call, which takes milliseconds.

    Args:
        root: The folder of the class folders ("UCF-101" in the archive).
        split: "all" as the reference trains, or a half of one of the official folds. The folds keep the groups apart,
            whose clips show the same scene.
        fold: 1, 2 or 3; without effect for "all".
        splits_dir: The folder "ucfTrainTestlist" with trainlist01.txt and so on; by default beside `root`.

    Returns:
        Rows with `path` (absolute), `label`, a `ClassLabel` of the names that `ucf101_class_names` gives, and `group`,
        the number of the scene in its class, 1 to 25 (-1 where a file's name has none).

    Raises:
        UsageError: There is no such split or fold.
        FrameBridgeError: A folder or list is missing, or there are no videos.
    """
    if split not in get_args(Split):
        raise UsageError(f"split is {split!r}; it must be one of {', '.join(get_args(Split))}")
    if fold not in get_args(Fold):
        raise UsageError(f"fold is {fold!r}; it must be one of {', '.join(map(str, get_args(Fold)))}")
    folder = Path(root).expanduser().absolute()
    found, left_out = class_folders(folder)
    labels = {file: label for label, files in found.items() for file in files}
    if not labels:
        raise no_videos(folder, left_out)
    classes = label_names(list(found))
    notes = []
    if foreign := foreign_classes(classes):
        notes.append(
            f"most of its folders are classes of UCF-101, but not {', '.join(foreign[:5])}"
            f"{f' and {len(foreign) - 5} more' if len(foreign) > 5 else ''}: the labels are not UCF-101's numbers"
        )
    if split != "all":
        path = split_list(folder, split, fold, splits_dir)
        listed = {_key(name): name for name in read_split(path)}
        labels = {file: label for file, label in labels.items() if _key(file) in listed}
        if not labels:
            raise FrameBridgeError(f"{folder}: none of its videos is in {path}; the {split} half is what that lists")
        missing = [listed[key] for key in sorted(listed.keys() - set(map(_key, labels)))]
        if missing:
            notes.append(
                f"{len(missing)} of the {len(listed)} videos of the {split} split of fold {fold} are missing, such as "
                f"{missing[0]}: bad files, where their class has a folder"
            )
        present = {_key(name): name for name in found}
        for name in missing:
            if label := present.get(_key(name.partition("/")[0])):
                labels[name] = label
    notes += left_out.notes(folder)
    for note in notes:
        logger.warning("%s: %s", folder, note)
    groups = [_GROUP.search(file) for file in labels]
    columns = {
        "path": [f"{folder}/{file}" for file in labels],
        "label": list(labels.values()),
        "group": [int(group[1]) if group else -1 for group in groups],
    }
    features = datasets.Features(
        path=datasets.Value("string"), label=datasets.ClassLabel(names=classes), group=datasets.Value("int32")
    )
    info = datasets.DatasetInfo(description="\n".join(map(escaped, notes)), features=features)
    return datasets.Dataset.from_dict(columns, info=info)


def _key(name: str) -> str:
    # The archive's list and folder do not always agree in case (HandstandPushups), nor disks in their normal form.
    return unicodedata.normalize("NFC", name).casefold()
