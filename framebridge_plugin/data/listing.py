"""Names of files as disks give them: which are videos, which are in the way, and how listed ones are found."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from framebridge_plugin.errors import FrameBridgeError, escaped

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
    """How much of a data set is not used: a count and an example for each reason."""

    def __init__(self) -> None:
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

    def __str__(self) -> str:
        counted = ((count, reason, escaped(self._examples[reason])) for reason, count in sorted(self.counts.items()))
        return ", ".join(f"{count} {reason} (such as {example})" for count, reason, example in counted)


class FileFinder:
    """Finds files below a folder by names that may differ in Unicode normal form or the case of the extension."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, tuple[str, dict[str, str]]] = {}

    def find(self, name: str) -> str | None:
        """The name as the disk spells it, or None; each folder is listed once, instead of asking for every file."""
        folder, file_name = os.path.split(os.path.normpath(name))
        if folder not in self._folders:
            self._folders[folder] = self._list(folder)
        actual, names = self._folders[folder]
        found = names.get(file_name) or names.get(name_key(file_name))
        return None if found is None else os.path.join(actual, found)

    def _list(self, folder: str) -> tuple[str, dict[str, str]]:
        """The folder as the disk spells it, and in it the names of files by themselves and by their keys."""
        if not (self._root / folder).is_dir():
            folder = (self.find(folder) if os.path.basename(folder) else None) or folder
        path = self._root / folder
        try:
            names = sorted(os.listdir(path), reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as error:
            raise FrameBridgeError(f"{path} cannot be listed: {error.strerror}; make it readable") from error
        return folder, {name_key(name): name for name in names} | {name: name for name in names}
