"""Copies and hard links of folders, and folders that are whole or not there at all. The standard library alone."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from framebridge_plugin.backbones.files import component_files
from framebridge_plugin.backbones.fingerprint import component_fingerprint, short_digest
from framebridge_plugin.backbones.manifest import (
    MANIFEST_FILE,
    DamagedError,
    FileFacts,
    file_facts,
    folder_problem,
    read_manifest,
    write_manifest,
)
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import check_within

_FICLONE = 0x40049409
"""Linux' request for a copy that shares its blocks until either is written to."""
_CHUNK = 1 << 23
_PARTIAL, _OLD, _REMOVED = ".partial", ".old", ".removed"
"""How the hidden names end of a folder that is being written, of the one that it replaces, and of one that goes."""


def copy_file(source: Path, destination: Path) -> FileFacts:
    """Copies a file, sharing blocks where the file system can; returns what a manifest says of it."""
    with source.open("rb") as original, destination.open("wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
        except OSError:
            size, digest = 0, hashlib.sha256()
            while chunk := original.read(_CHUNK):
                copy.write(chunk)
                size += len(chunk)
                digest.update(chunk)
            return FileFacts(size, digest.hexdigest())
    return file_facts(destination)


def copy_tree(source: Path, destination: Path) -> dict[str, FileFacts]:
    """Copies a component's folder, so that no file of the copy shares its bytes with the original; returns what a
    manifest says of the files.
    """
    if destination.is_dir() and destination.samefile(source):
        return {}
    destination.mkdir(parents=True, exist_ok=True)
    return {name: copy_file(path, destination / name) for name, path in component_files(source)}


def link_tree(source: Path, destination: Path) -> dict[str, FileFacts]:
    """Fills the folder `destination` with hard links to the files of `source`, or with copies where the file system
    has none; returns what its manifest says of them. What this does not name is left out, and a link refused.
    """
    try:
        files = read_manifest(source).files
    except DamagedError as error:
        raise FrameBridgeError(f"nothing can be taken from {source}: {error}") from error
    for name in (*files, MANIFEST_FILE):
        check_within(source / name, source)
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy((source / name).resolve(), destination / name)
    return dict(files)


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def run_copy(parent: Path, name: str, source: Path) -> Path:
    """The run's own copy of a component in the folder `parent`, made once, with its manifest: `link_run_copy` takes
    it from checkpoint to checkpoint. Its name says what it is a copy of.
    """
    fingerprint = component_fingerprint(source)
    folder = parent / f"{name}-{short_digest(fingerprint)}"
    if not _is_copy(folder, fingerprint):
        try:
            with written_whole(folder) as partial:
                write_manifest(partial, copy_tree(source, partial))
        except OSError as error:
            tidy(parent)
            raise FrameBridgeError(f"cannot copy {source} to {folder}: {error}; free disk space") from error
    return folder


def _is_copy(folder: Path, fingerprint: Mapping[str, str]) -> bool:
    """Whether a folder, perhaps a stranger's, holds a component of this fingerprint, whole, and nothing else."""
    if folder.is_symlink() or not folder.is_dir() or folder_problem(folder) is not None:
        return False
    try:
        return (
            read_manifest(folder).files.keys() == fingerprint.keys() and component_fingerprint(folder) == fingerprint
        )
    except FrameBridgeError:
        return False


def link_run_copy(source: Path, destination: Path) -> dict[str, FileFacts]:
    """Links the files of a `run_copy`; returns what its manifest says of them."""
    files = link_tree(source, destination)
    (destination / MANIFEST_FILE).unlink()
    return files


# Whole or not there at all


def check_is_free(folder: Path) -> None:
    """Refuses a place for a new folder where something is already, other than an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FrameBridgeError(f"{folder.absolute()}: exists and is not an empty folder; choose another folder")


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder to write into, which is put in the place of `folder` at the end, or goes if anything fails."""
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Asks the disk to have every file of a folder, and the folders from the innermost to itself."""
    for parent, _, files in os.walk(folder, topdown=False):
        for path in (*(Path(parent, file) for file in files), Path(parent)):
            sync(path)


def sync(path: Path) -> None:
    """Asks the disk to have a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(new: Path, folder: Path) -> None:
    """Gives a finished folder its name once the disk has it; what had the name before is removed after that."""
    sync_tree(new)
    old = folder.with_name(f".{folder.name}{_OLD}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder that a kill must not leave half there."""
    removed = folder.with_name(f".{folder.name}{_REMOVED}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def tidy(parent: Path) -> None:
    """Ends what a kill interrupted in a folder of folders: the names that they had are theirs again."""
    for path in sorted(parent.glob(".*")):
        folder = parent / path.name[1:].removesuffix(_OLD)
        if path.name.endswith(_OLD) and not folder.exists():
            path.rename(folder)
        elif path.name.endswith((_OLD, _PARTIAL, _REMOVED)):
            shutil.rmtree(path, ignore_errors=True)
