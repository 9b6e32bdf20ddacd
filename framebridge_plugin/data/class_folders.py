"""Data sets of one folder per class, such as UCF-101: the folder's name is the class, and the caption of its clips."""

from __future__ import annotations

import os
from pathlib import Path

from framebridge_plugin.errors import FrameBridgeError

VIDEO_EXTENSIONS = ("mp4", "mov", "m4v", "mkv", "webm", "avi")


def class_names(root: str | os.PathLike[str]) -> list[str]:
    """List the classes of a data set.

    Args:
        root: Folder with one folder per class; hidden folders are no classes.

    Returns:
        The names of its folders in code-point order (capitals first), as the reference numbers them; an empty folder
        is a class too, so that the numbers do not depend on which clips are there.

    Raises:
        FrameBridgeError: It is no folder, or has no folders in it.
    """
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise FrameBridgeError(
            f"class_root {root} cannot be listed: {error.strerror}; give an existing folder"
        ) from error
    if not names:
        raise FrameBridgeError(f"{root} holds no folders; give a folder with one folder of videos per class")
    return names


def index_class_folders(root: Path) -> tuple[list[str], list[str]]:
    """List the clips of every class, asking the disk once per folder.

    Args:
        root: Folder with one folder per class.

    Returns:
        The clips' file names relative to `root`, in order of class and name, and the class of each.

    Raises:
        FrameBridgeError: It is no such folder, or holds no videos.
    """
    names, labels = [], []
    for label in class_names(root):
        videos = sorted(name for name in os.listdir(root / label) if is_video(name))
        names += [f"{label}/{name}" for name in videos]
        labels += [label] * len(videos)
    if not names:
        raise FrameBridgeError(
            f"{root}: its folders hold no videos; the videos ({', '.join(VIDEO_EXTENSIONS)}) lie right in the folder "
            "of their class"
        )
    return names, labels


def is_video(name: str) -> bool:
    """Tell by the extension, in capitals or not, whether a file should be a video.

    Args:
        name: A file name.

    Returns:
        Whether its extension is one of `VIDEO_EXTENSIONS`.
    """
    return name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS and not name.startswith(".")
