"""Data sets of one folder per class, such as UCF-101: the folder's name is the class, and the caption of its clips."""

from __future__ import annotations

import os
from pathlib import Path

from framebridge_plugin.errors import FrameBridgeError

VIDEO_EXTENSIONS = ("mp4", "mov", "m4v", "mkv", "webm", "avi")
# What file systems, archives and storage appliances put beside the user's folders.
_SYSTEM_FOLDERS = ("lost+found", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir")


def class_names(root: str | os.PathLike[str]) -> list[str]:
    """List the classes of a data set.

    Args:
        root: Folder with one folder per class; no classes are hidden folders, those that systems make, such as
            lost+found and __MACOSX, and those that hold something, but no videos.

    Returns:
        The names of its folders in code-point order (capitals first), as the reference numbers them; an empty folder
        is a class too, so that the numbers do not depend on which clips are there.

    Raises:
        FrameBridgeError: It is no folder, has no such folders in it, or one that cannot be listed.
    """
    return list(_classes(root))


def index_class_folders(root: Path) -> tuple[list[str], list[str]]:
    """List the clips of every class, asking the disk once per folder.

    Args:
        root: Folder with one folder per class.

    Returns:
        The clips' file names relative to `root`, in order of class and name, and the class of each.

    Raises:
        FrameBridgeError: It is no such folder, holds no videos, or has a folder that cannot be listed.
    """
    names, labels = [], []
    for label, videos in _classes(root).items():
        names += [f"{label}/{name}" for name in videos]
        labels += [label] * len(videos)
    if not names:
        raise _no_videos(root)
    return names, labels


def _classes(root: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The videos of each class, both in order."""
    try:
        with os.scandir(root) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise FrameBridgeError(
            f"class_root {root} cannot be listed: {error.strerror}; give an existing folder"
        ) from error
    folders = [name for name in folders if name not in _SYSTEM_FOLDERS and not name.startswith(".")]
    if not folders:
        raise FrameBridgeError(f"{root} holds no folders; give a folder with one folder of videos per class")
    classes = {}
    for folder in folders:
        try:
            held = [name for name in os.listdir(os.path.join(root, folder)) if not name.startswith(".")]
        except OSError as error:
            raise FrameBridgeError(
                f"{root}/{folder} cannot be listed: {error.strerror}; make it readable, or move it if it is no class"
            ) from error
        videos = sorted(name for name in held if is_video(name))
        if videos or not held:
            classes[folder] = videos
    if not classes:
        raise _no_videos(root)
    return classes


def _no_videos(root: str | os.PathLike[str]) -> FrameBridgeError:
    return FrameBridgeError(
        f"{root}: its folders hold no videos; the videos ({', '.join(VIDEO_EXTENSIONS)}) lie right in the folder of "
        "their class"
    )


def is_video(name: str) -> bool:
    """Tell by the extension, in capitals or not, whether a file should be a video.

    Args:
        name: A file name.

    Returns:
        Whether its extension is one of `VIDEO_EXTENSIONS`.
    """
    return name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS and not name.startswith(".")
