"""What a name stands for; reading strangers' files, none that never ends or leads out; writing small ones whole."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import stat
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from framebridge_plugin.errors import FrameBridgeError, UsageError, first_line, say
from framebridge_plugin.processes import is_first

MAX_DOWNLOAD_BYTES = 2**30
_TIMEOUT_S = 60.0
_MOST_LEVELS = 50  # of JSON


class NotRegularError(OSError):
    """A pipe, a socket or a device, which may never come to an end."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; other things are an `OSError`, at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = IsADirectoryError if stat.S_ISDIR(mode) else NotRegularError
        raise kind(None, "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file", os.fspath(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a regular file, or of a link to one; an `OSError` for other things, and for a file over `limit`."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(None, f"it is larger than {limit >> 20} MiB", os.fspath(path))
    return content


def why_no_file(path: Path) -> str | None:
    """Why there is no regular file, nor a link to one."""
    try:
        open_regular(path).close()
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or str(error)
    return None


def whole_number(text: str) -> int:
    """The whole number that a stranger's file says; a ValueError if it is longer than Python reads."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a whole number of {len(text)} digits is too long to be read") from None


def check_depth(content: Any) -> None:
    """A ValueError for what JSON says, if it is nested so deeply that nobody could walk through it."""
    level = [content]
    for _ in range(_MOST_LEVELS):
        nodes = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [value for values in nodes for value in values]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def write_whole(path: Path, text: str) -> None:
    """Writes a small file that a reader, or a kill, finds as it was before or as it is then."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_through(path: Path, write: Callable[[Path], None]) -> None:
    """Has a file written in a folder beside its place, and moves it there when all of it is on the disk."""
    from safetensors import SafetensorError

    folder = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors makes files that nobody else can read
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise FrameBridgeError(
            f"cannot write {path}: {error}; make room and run the same command again: what is written is kept"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_partial_files(folder: Path) -> None:
    """Removes what killed processes left behind of `write_through`."""
    for partial in folder.rglob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def writing_problem(folder: Path) -> str | None:
    """Why a folder cannot be written into, or made."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir():
        return f"{existing} is a file: name another folder"
    try:
        tempfile.TemporaryFile(dir=existing).close()  # root may write everywhere, but not into /proc
    except OSError:
        return f"{existing} is not writable: name another folder"
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the errors of a disk within the block into a `FrameBridgeError` that says what cannot be written."""
    try:
        yield
    except OSError as error:
        raise FrameBridgeError(f"cannot write {error.filename or path}: {error.strerror or error}") from error


def leads_out(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether what a path in a folder leads to lies outside of it; a hub cache's folder has its files in `blobs`."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    snapshot = hub_snapshot(home)
    is_blob = snapshot is not None and real.parent == snapshot.parent.parent / "blobs"
    return not real.is_relative_to(home) and not is_blob


def check_within(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """`FrameBridgeError` if `leads_out`."""
    if leads_out(path, folder):
        raise FrameBridgeError(
            f"{path} leads to {os.path.realpath(path)}, outside of the folder that was given; put the file there"
        )


def foreign_entry(folder: Path) -> str | None:
    """What somebody put into a folder that is written into, so that something else is written in its place."""
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            try:
                mode = path.lstat().st_mode
            except OSError:  # of a process that writes there, and gone by now
                continue
            if stat.S_ISLNK(mode) and leads_out(path, folder):
                return f"{path} is a link to {os.path.realpath(path)}, outside of {folder}"
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                return f"{path} is neither a file nor a folder"
    return None


def hub_snapshot(folder: Path) -> Path | None:
    """The commit in the hub's cache that a folder belongs to: <cache>/models--owner--name/snapshots/<commit>."""
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith(("models--", "datasets--")):
            return parent
    return None


def local_path(name: str, base: str | os.PathLike[str] = ".") -> Path | None:
    """The path that a name stands for, existing or not; None for a hub id (`owner/name`, and no folder `owner`)."""
    path = Path(base, name)
    looks_like_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return None if looks_like_id and not path.exists() and not path.parent.is_dir() else path


class NotFetchedError(FrameBridgeError):
    """Something is not on this machine, and nothing is taken from the network now."""


downloaded: dict[str, str] = {}
"""The commit of each name that this process took from the hub."""
_pinned: dict[str, str] = {}
_announced: set[tuple[str, str]] = set()
_is_online = True


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Nothing is taken from the network within the block: what no cache has is a `NotFetchedError`."""
    global _is_online
    _is_online, before = False, _is_online
    try:
        yield
    finally:
        _is_online = before


def pin(commits: Mapping[str, str]) -> None:
    """From here on takes these names from the hub at these commits, where no revision is asked for."""
    _pinned.clear()
    _pinned.update(commits)


def download(name: str, what: str, *, look: Callable[[], None] = lambda: None, **settings: Any) -> Path:
    """The folder of a repository of the Hugging Face Hub, or of the hub's cache: of one commit, by which it is called.

    It is announced first; then `look` may refuse what is there. `what` the name is for begins the error's line; the
    settings are those of `huggingface_hub.snapshot_download`.
    """
    import huggingface_hub

    revision = settings.get("revision") or _pinned.get(name)
    if _is_online:
        if (name, revision or "main") not in _announced and is_first():
            where = f"the Hugging Face Hub, revision {revision or 'main'}"
            say(f"{name} is no folder here: it is taken from {where}")
        look()
    else:
        settings["local_files_only"] = True
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, **settings | ({"revision": revision} if revision else {}))
        )
    except (OSError, ValueError) as error:
        if not _is_online:
            raise NotFetchedError(f"{name} is not in the hub's cache") from error
        raise FrameBridgeError(
            f"{what} {name!r} is neither a folder nor to be had from the hub ({first_line(error)}); check the name, "
            "or download it and give the folder"
        ) from error
    if not _is_online and not _is_whole(folder, settings.get("allow_patterns")):
        raise NotFetchedError(f"{name} is not whole in the hub's cache")
    _announced.update({(name, revision or "main"), (name, folder.name)})
    downloaded[name] = folder.name
    return folder


def _is_whole(folder: Path, patterns: Sequence[str] | None) -> bool:
    """Whether the cache has what is wanted of a repository: anything, and weights beside a network's config."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if patterns is not None:
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    wants_weights = any(pattern.endswith(".safetensors") for pattern in patterns or ())
    weights = {os.path.dirname(name) for name in names if name.endswith(".safetensors")}
    networks = {os.path.dirname(name) for name in names if os.path.basename(name) == "config.json"}
    return bool(names) and not (wants_weights and networks - weights)


@contextlib.contextmanager
def local_copy(address: str) -> Iterator[Path]:
    """A file for as long as it is read: itself, or what a web address gives, whose errors name the address."""
    if not is_web_address(address):
        yield Path(address)
        return
    if not _is_online:
        raise NotFetchedError(f"{address} is not fetched")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "download")
        try:
            with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer, path.open("wb") as file:
                while block := answer.read(2**20):
                    file.write(block)
                    if file.tell() > MAX_DOWNLOAD_BYTES:
                        raise OSError(f"it is larger than {MAX_DOWNLOAD_BYTES / 2**30:g} GiB")
        except (OSError, ValueError) as error:
            raise FrameBridgeError(f"{address} cannot be downloaded: {first_line(error)}") from error
        try:
            yield path
        except FrameBridgeError as error:
            raise UsageError(str(error).replace(str(path), address)) from error


def is_web_address(name: str) -> bool:
    """Whether a name is that of something in the web, and not of a file."""
    return name.startswith(("http://", "https://"))
