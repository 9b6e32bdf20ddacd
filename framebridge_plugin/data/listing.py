"""Names of files as disks give them: which are videos, which are in the way, and how listed ones are found."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from framebridge_plugin.errors import FrameBridgeError, escaped
from framebridge_plugin.files import leads_out

_SURROGATE = re.compile("[\ud800-\udfff]")

VIDEO_EXTENSIONS = ("mp4", "mov", "m4v", "mkv", "webm", "avi")


def is_video(name: str) -> bool:
    """Tell by the extension, in capitals or not, whether a file should be a video; no hidden file is."""
    return extension(name) in VIDEO_EXTENSIONS and not name.startswith(".")


def extension(name: str) -> str:
    """What stands behind a name's last dot, in small letters."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def name_key(name: str) -> str:
    """What two spellings of one name share, whatever their Unicode normal form and the case of their extension."""
    stem, dot, ending = name.rpartition(".")
    key = f"{stem}.{ending.lower()}" if dot else name
    return key if key.isascii() else unicodedata.normalize("NFC", key)


def is_utf8(name: str) -> bool:
    """Whether a file's name is text; Python puts surrogates in the place of bytes that are none."""
    return _SURROGATE.search(name) is None


class LeftOut:
    """How much of a data set is not used: a count and an example for each reason; and which videos are links."""

    def __init__(self) -> None:
        self.links: list[str] = []
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        """Counts one more thing that is left out for a reason, a noun in the plural."""
        self.counts[reason] += 1
        self._examples[reason] = min(example, self._examples.get(reason, example))

    def usable(self, names: Iterable[str], folder: str = "") -> list[str]:
        """The names, sorted, that are neither hidden nor anything but UTF-8; hidden clips are counted."""
        usable = []
        for name in names:
            if name.startswith("."):
                if extension(name) in (*VIDEO_EXTENSIONS, "txt"):
                    self.add("hidden files", os.path.join(folder, name))
            elif name.isascii() or is_utf8(name):
                usable.append(name)
            else:
                self.add("names not in UTF-8", os.path.join(folder, name))
        return sorted(usable)

    def notes(self, root: str | os.PathLike[str]) -> list[str]:
        """What is said of it: the links that lead out of the data set, which are used, and what is left out."""
        links = [name for name in self.links if leads_out(os.path.join(root, name), root)]
        notes = [f"{len(links)} videos are links to files elsewhere, such as {min(links)!r}"] if links else []
        return [*notes, f"left out: {self}"] if self.counts else notes

    def __str__(self) -> str:
        counted = ((count, reason, escaped(self._examples[reason])) for reason, count in sorted(self.counts.items()))
        return ", ".join(f"{count} {reason} (such as {example})" for count, reason, example in counted)


def list_folder(path: str | os.PathLike[str]) -> tuple[list[str], set[str]]:
    """The names in a folder, and which of them are links."""
    with os.scandir(path) as scan:
        entries = [(entry.name, entry.is_symlink()) for entry in scan]
    return [name for name, _ in entries], {name for name, is_link in entries if is_link}


def check_names(root: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Refuse names in a table or list by which files outside of the data set would be read."""
    home = os.path.normpath(root)
    suspects = (name for name in names if name.startswith("/") or ".." in name)
    outside = [name for name in suspects if not os.path.normpath(os.path.join(home, name)).startswith(f"{home}/")]
    if outside:
        what = f"{len(outside)} names lead out of it, first {outside[0]!r}"
        raise FrameBridgeError(f"{root}: {what}; put the videos, or links to them, into it")


def linked_folder(path: str | os.PathLike[str]) -> FrameBridgeError:
    """What is wrong with a link to a folder within a data set."""
    return FrameBridgeError(f"{path} is a link to a folder, which is not followed; put the folder itself there")


class FileFinder:
    """Finds files below a folder by names that may differ in normal form or the case of the extension; notes links."""

    def __init__(self, root: Path, links: list[str]) -> None:
        self._root = root
        self._links = links
        self._folders: dict[str, tuple[str, dict[str, str], set[str]]] = {}

    def find(self, name: str) -> str | None:
        """The name as the disk spells it, or None; each folder is listed once, instead of asking for every file."""
        folder, file_name = os.path.split(os.path.normpath(name))
        if folder not in self._folders:
            self._folders[folder] = self._list(folder)
        actual, names, links = self._folders[folder]
        found = names.get(file_name) or names.get(name_key(file_name))
        if found is None:
            return None
        path = os.path.join(actual, found)
        if found in links:
            self._links.append(path)
        return path

    def _list(self, folder: str) -> tuple[str, dict[str, str], set[str]]:
        """The folder as the disk spells it, the names in it by themselves and by their keys, and its links."""
        if not (self._root / folder).is_dir():
            folder = (self.find(folder) if os.path.basename(folder) else None) or folder
        path = self._root / folder
        parts = os.path.relpath(path, self._root).split("/")
        for end in range(len(parts)):
            if parts != ["."] and (part := self._root.joinpath(*parts[: end + 1])).is_symlink():
                raise linked_folder(part)
        try:
            names, links = list_folder(path)
        except (FileNotFoundError, NotADirectoryError):
            names, links = [], set()
        except OSError as error:
            raise FrameBridgeError(f"{path} cannot be listed: {error.strerror}; make it readable") from error
        names.sort(reverse=True)
        return folder, {name_key(name): name for name in names} | {name: name for name in names}, links
