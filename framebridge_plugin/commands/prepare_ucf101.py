"""Unpacking a corpus as it is distributed, with the tools that the user has, and counting what came out."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from framebridge_plugin.data.listing import is_video
from framebridge_plugin.data.tables import MAX_TEXT
from framebridge_plugin.data.ucf101_classes import UCF101_CLASSES, read_split
from framebridge_plugin.errors import FrameBridgeError, print_line
from framebridge_plugin.files import open_regular

UCF101_CLIPS = 13_320
MAX_UNPACKED_BYTES = 32 * 2**30
"""Several times as much as the corpus takes; an archive may be made to fill the disk."""

_TOO_LARGE = f"it unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB"
_LOOK_EVERY_S = 1.0

UCF101_GROUPS = 25
"""Scenes in each class; a clip's name ends in _gXX_cYY, group and clip."""

_VIDEOS, _SPLITS = "UCF-101", "ucfTrainTestlist"
_SPLIT_FILES = ("classInd.txt", *(f"{half}list0{fold}.txt" for half in ("train", "test") for fold in (1, 2, 3)))

# What the tool is called -> its arguments for (archive, folder). A 7z without its RAR part, or an old bsdtar, is
# installed in many places and cannot read this archive: then the next one has a go.
UNPACKERS: Mapping[str, Callable[[str, str], list[str]]] = {
    "unar": lambda archive, folder: [
        *("-quiet", "-no-directory", "-force-overwrite", "-output-directory", folder, archive)
    ],
    "unrar": lambda archive, folder: ["x", "-o+", "-idq", archive, f"{folder}/"],
    "7zz": lambda archive, folder: ["x", "-y", "-bd", f"-o{folder}", archive],
    "7z": lambda archive, folder: ["x", "-y", "-bd", f"-o{folder}", archive],
    "bsdtar": lambda archive, folder: ["-x", "-f", archive, "-C", folder],
}


def prepare_ucf101(archive: Path, folder: Path, splits: Path | None = None) -> None:
    """Unpack UCF-101 and its official splits, and check that all is there.

    The videos come to lie in `folder`/UCF-101, the lists in `folder`/ucfTrainTestlist, where `load_ucf101` looks for
    them. What is there already is not unpacked again.
    """
    videos = folder / _VIDEOS
    if not videos.is_dir():
        _unpack_videos(archive, folder)
    if splits is not None:
        _unpack_splits(splits, folder / _SPLITS)
    if problem := "; ".join(_missing(folder)):
        raise FrameBridgeError(
            f"{videos} is not the whole of UCF-101: {problem}; remove it and unpack {archive.name} again"
        )
    print_line(f"{videos}: {len(UCF101_CLASSES)} classes, {UCF101_CLIPS} clips")


def _unpack_videos(archive: Path, folder: Path) -> None:
    if not archive.is_file():
        raise FrameBridgeError(f"{archive} is not an existing file; docs/data.md says where it is to be had")
    is_zip = archive.suffix.lower() == ".zip"
    tools = ["zipfile"] if is_zip else list(filter(shutil.which, UNPACKERS))
    if not tools:
        raise FrameBridgeError(
            f"nothing here can unpack {archive.name}: install one of {', '.join(UNPACKERS)} (such as `apt install "
            "unar`, `brew install unar`)"
        )
    # Beside its place and moved into it, so that half of it is never taken for the whole.
    partial = folder / f".{_VIDEOS}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    failures = []
    for name in tools:
        print_line(f"{name} unpacks {archive} ...")
        problem = _unpack_zip(archive, partial) if is_zip else _run_unpacker(name, archive, partial)
        found = [path for path in (partial / _VIDEOS, *partial.glob(f"*/{_VIDEOS}")) if path.is_dir()]
        if problem is None and found:
            found[0].rename(folder / _VIDEOS)
            break
        failures.append(f"{name}: {problem or f'it holds no folder {_VIDEOS}'}")
        shutil.rmtree(partial)
        partial.mkdir()
    shutil.rmtree(partial)
    if len(failures) == len(tools):
        others = [] if is_zip else [name for name in UNPACKERS if name not in tools]
        raise FrameBridgeError(
            f"{archive} cannot be unpacked ({'; '.join(failures)}); get it again"
            + (f", or install one of {', '.join(others)}" if others else "")
        )


def _run_unpacker(name: str, archive: Path, folder: Path) -> str | None:
    """Has a tool unpack an archive; returns what is wrong, or nothing."""
    command = [name, *UNPACKERS[name](os.path.abspath(archive), os.path.abspath(folder))]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as tool:
            try:
                while tool.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        tool.wait(_LOOK_EVERY_S)
                    if problem := _unpacked_problem(folder):
                        return problem
            finally:
                tool.kill()
        if tool.returncode == 0:
            return _unpacked_problem(folder)
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    return lines[-1] if lines else f"exit code {tool.returncode}"


def _unpacked_problem(folder: Path) -> str | None:
    """What of what has been unpacked so far no archive of videos holds."""
    size = 0
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            with contextlib.suppress(FileNotFoundError):  # a name that the tool has just changed
                status = os.lstat(os.path.join(place, name))
                if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                    return f"it holds a link, a pipe or a device, {os.path.join(os.path.relpath(place, folder), name)}"
                size += status.st_size
    return _TOO_LARGE if size > MAX_UNPACKED_BYTES else None


def _unpack_zip(archive: Path, folder: Path) -> str | None:
    """Unpacks all but what macOS adds; says what is wrong with the archive, or nothing."""
    try:
        with open_regular(archive) as file, zipfile.ZipFile(file) as content:
            if sum(info.file_size for info in content.infolist()) > MAX_UNPACKED_BYTES:
                return _TOO_LARGE
            for info in content.infolist():
                member = info.filename
                parts = member.replace("\\", "/").split("/")
                if member.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
                    return f"it names a place outside of itself, {member}"
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    return f"it holds a link, a pipe or a device, {member}"
                if "__MACOSX" not in parts:
                    content.extract(member, folder)
    except _ZIP_ERRORS as error:
        return str(error) or type(error).__name__
    return None


# What zipfile raises for a damaged archive, one with a password, and a compression that it does not know.
_ZIP_ERRORS = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _unpack_splits(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open_regular(archive) as file, zipfile.ZipFile(file) as content:
            members = {os.path.basename(name): name for name in content.namelist()}
            if missing := [name for name in _SPLIT_FILES if name not in members]:
                raise FrameBridgeError(
                    f"{archive} lacks {', '.join(missing)}; it should be UCF101TrainTestSplits-RecognitionTask.zip"
                )
            if sum(content.getinfo(members[name]).file_size for name in _SPLIT_FILES) > MAX_TEXT:
                raise FrameBridgeError(f"{archive} unpacks to more than {MAX_TEXT >> 20} MiB, which no lists are")
            for name in _SPLIT_FILES:
                (folder / name).write_bytes(content.read(members[name]))
    except _ZIP_ERRORS as error:
        raise FrameBridgeError(f"{archive} cannot be unpacked ({error}); get it again") from error


def _missing(folder: Path) -> Iterator[str]:
    """Says what the folder lacks: by the official lists if they are there, else by the numbers of scenes and clips."""
    groups: dict[str, set[str]] = {}
    clips: set[str] = set()
    for name in UCF101_CLASSES:
        path = folder / _VIDEOS / name
        files = [file for file in os.listdir(path) if is_video(file)] if path.is_dir() else []
        clips.update(f"{name}/{file}".lower() for file in files)
        groups[name] = {match[1] for file in files if (match := re.search(r"_g(\d+)_c\d+\.", file))}
    if absent := [name for name, found in groups.items() if not found]:
        yield f"{len(absent)} of {len(UCF101_CLASSES)} classes are missing or empty ({_some(absent)})"
    lists = [folder / _SPLITS / f"{half}list01.txt" for half in ("train", "test")]
    if all(path.is_file() for path in lists):
        listed = [clip for path in lists for clip in read_split(path)]
        if missing := [clip for clip in listed if clip.lower() not in clips]:
            yield f"{len(missing)} of {len(listed)} clips are missing ({_some(sorted(missing))})"
        return
    partial = [name for name, found in groups.items() if 0 < len(found) < UCF101_GROUPS]
    if partial:
        yield _some([f"{name} has {len(groups[name])} of {UCF101_GROUPS} scenes" for name in partial])
    if len(clips) != UCF101_CLIPS:
        yield f"{len(clips)} of {UCF101_CLIPS} clips are there"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
