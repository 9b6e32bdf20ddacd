"""Data sets of one folder per class, such as UCF-101: the folder's name is the class, and the caption of its clips."""

from __future__ import annotations

import os
import unicodedata

from framebridge_plugin.data.listing import VIDEO_EXTENSIONS, LeftOut, is_utf8, is_video, list_folder
from framebridge_plugin.errors import FrameBridgeError

# What file systems, archives and storage appliances put beside the user's folders.
_SYSTEM_FOLDERS = ("lost+found", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir")


def class_names(root: str | os.PathLike[str]) -> list[str]:
    """The names of the classes in Unicode's composed form (NFC) and in code-point order, as the reference has them."""
    return list(class_folders(root)[0])


def class_folders(root: str | os.PathLike[str]) -> tuple[dict[str, list[str]], LeftOut]:
    """The videos of each class relative to the root, both in order, and what is left out; at least one class.

    An empty folder is a class, so that the numbers do not depend on which clips are there. No classes are hidden
    folders, those that systems make, those whose names are not UTF-8, links to folders, and those that hold something,
    but no videos.
    """
    left_out = LeftOut()
    folders = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if not entry.is_dir():
                    if is_video(entry.name):
                        left_out.add("videos in no folder of a class", entry.name)
                elif entry.is_symlink():
                    left_out.add("links to folders", entry.name)
                elif entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS:
                    left_out.add("folders that are hidden or a system's", entry.name)
                elif not is_utf8(entry.name):
                    left_out.add("names not in UTF-8", entry.name)
                else:
                    folders.append(entry.name)
    except OSError as error:
        raise FrameBridgeError(
            f"class_root {root} cannot be listed: {error.strerror}; give an existing folder"
        ) from error
    if not folders:
        but = ", but links to some, which are not followed" if "links to folders" in left_out.counts else ""
        raise FrameBridgeError(f"{root} holds no folders{but}; give a folder with one folder of videos per class")
    classes: dict[str, list[str]] = {}
    for folder in sorted(folders, key=lambda name: unicodedata.normalize("NFC", name)):
        try:
            held, links = list_folder(os.path.join(root, folder))
        except OSError as error:
            raise FrameBridgeError(
                f"{root}/{folder} cannot be listed: {error.strerror}; make it readable, or move it if it is no class"
            ) from error
        names = left_out.usable(held, folder)
        videos = [f"{folder}/{name}" for name in names if is_video(name)]
        if videos or not any(not name.startswith(".") for name in held):
            left_out.links += [f"{folder}/{name}" for name in links if is_video(name)]
            classes.setdefault(unicodedata.normalize("NFC", folder), []).extend(videos)
            for name in names:
                if not is_video(name):
                    left_out.add("files that are no videos by their extension", f"{folder}/{name}")
        else:
            left_out.add("folders without videos", folder)
    if not classes:
        raise no_videos(root, left_out)
    return classes, left_out


def no_videos(root: str | os.PathLike[str], left_out: LeftOut) -> FrameBridgeError:
    """What is wrong with a folder without a single video."""
    return FrameBridgeError(
        f"{root}: its folders hold no videos; the videos ({', '.join(VIDEO_EXTENSIONS)}) lie right in the folder of "
        "their class" + (f"; left out: {left_out}" if left_out.counts else "")
    )
