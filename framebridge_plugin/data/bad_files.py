"""Files that cannot be read: what a run does about them, and the account that it keeps."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from framebridge_plugin.data.tables import read_json, text_lines
from framebridge_plugin.errors import FrameBridgeError, UsageError, get_logger
from framebridge_plugin.files import write_whole, writing
from framebridge_plugin.processes import of_all_ranks
from framebridge_plugin.settings.base import CheckedSettings
from framebridge_plugin.settings.data import BadFilesSection

logger = get_logger(__name__)

SHARE_COUNTS_FROM = 64
"""Attempts before the share of bad ones means anything."""

_SHOWN = 5


class BadFile(TypedDict):
    """A file that cannot give a clip: its path, the kind of fault in one word, and the reason in a few."""

    path: str
    kind: str
    reason: str


class BadFilePolicy(CheckedSettings, BadFilesSection):
    """What a run does about files that cannot be read.

    "raise" ends the run at the first one; "skip" puts the clip that follows in the shuffled order in its place;
    "quarantine" skips too, and adds the file to `quarantine_file`, which runs may share; what that lists when a run
    starts is not opened in it. The limits are counted by each process, from its start on; they and the defaults are in
    `settings.data.BadFilesSection`.

    Raises:
        UsageError: A value is out of its range, or does not go with another.
    """

    called = "bad_files"

    @property
    def max_attempts(self) -> int:
        """Files that are tried for one sample before the run is given up."""
        return 1 if self.policy == "raise" else self.max_in_a_row


def load_bad_file_policy(path: str | os.PathLike[str]) -> BadFilePolicy:
    """Read the policy out of finetrainers' dataset file, where it stands beside "datasets" under "bad_files".

    Args:
        path: The JSON file.

    Returns:
        The policy; the default one if the file has none.

    Raises:
        UsageError: A key or value is wrong.
        FrameBridgeError: The file cannot be read.
    """
    return bad_file_policy(read_json(Path(path)), str(path))


def bad_file_policy(content: Any, where: str) -> BadFilePolicy:
    """The policy in a dataset file's content; the default one if it has none."""
    values = content.get("bad_files") if isinstance(content, dict) else None
    try:
        return BadFilePolicy(**(values or {}))
    except (TypeError, UsageError) as error:
        raise UsageError(f"{where}: {error}") from error


def read_bad_files(path: str | os.PathLike[str] | None) -> list[dict[str, Any]]:
    """Read a list of bad files, if there is one; lines without a path, such as one cut short, are left out."""
    if path is None or not os.path.exists(path):
        return []
    entries = []
    for number, line in text_lines(Path(path)):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            entries.append(entry)
        elif line:
            logger.warning("%s:%d names no path and is left out", path, number)
    return entries


def files_to_skip(quarantine: str | os.PathLike[str] | None) -> frozenset[str]:
    """Absolute paths of the files in a quarantine, which a run that begins now does not open."""
    # `finetrainers data check` lists the files that its decoder reads wrongly, too; those are sound.
    entries = (entry for entry in read_bad_files(quarantine) if entry.get("kind") != "wrong_container")
    return frozenset(os.path.abspath(entry["path"]) for entry in entries)


def describe(entry: Mapping[str, Any]) -> str:
    """One line about a bad file: path, kind and reason."""
    return f"{entry['path']}: {entry.get('kind')}: {entry.get('reason')}"


class TooManyBadFilesError(FrameBridgeError):
    """More files are bad than the policy allows; the lines of the message are a report."""


class BadFileTracker:
    """Keeps a run's account of its bad files, in the process that trains; those that read only pass on what they saw.

    Each path is logged once, and written once, with the sample that met it first, to `<output_dir>/bad_files.jsonl`
    and the quarantine. All ranks append to the same files: a line goes out in one call, in append mode and under a
    lock, so that lines are never mixed up, and what a rank has found is on the disk when it stops the run.

    A run that resumes forgets what was found after its checkpoint, and will find it again. It leaves the same files
    unopened as the run that it goes on with (`<output_dir>/quarantined.jsonl`), whatever the quarantine lists by now:
    a clip that was read in part of the epochs only would change the samples otherwise.

    Args:
        policy: What to do.
        output_dir: The run's folder.
        rank: This process among those that share the data.
        world_size: Number of those processes.
        start: Samples that all ranks together have consumed before.
        resumed: Whether the run goes on with an earlier one.
        barrier: Waits for all ranks; the first of them prepares the files before it.

    Raises:
        FrameBridgeError: A file cannot be read or written.
    """

    def __init__(
        self,
        policy: BadFilePolicy,
        output_dir: str | os.PathLike[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        resumed: bool = False,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy = policy
        self.path = Path(output_dir) / "bad_files.jsonl"
        self._first, self._world_size, self._sample = start + rank, world_size, 0
        quarantined = self.path.with_name("quarantined.jsonl")
        if rank == 0:
            with writing(self.path.parent):
                self._prepare(quarantined, start, resumed)
        barrier()
        self.files_to_skip = files_to_skip(quarantined)
        """Files in quarantine since before the run: those that `ClipStream` does not open."""
        if rank == 0 and self.files_to_skip:
            count = len(self.files_to_skip)
            logger.warning("%d files in quarantine are left out; they are listed in %s", count, quarantined)
        self._written = {entry["path"] for entry in read_bad_files(self.path)}
        self._unshared: list[str] = []
        self._in_quarantine = {entry["path"] for entry in read_bad_files(policy.quarantine_file)}
        self._attempts = self._bad = 0
        self._found: dict[str, Mapping[str, Any]] = {}

    def _prepare(self, quarantined: Path, start: int, resumed: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_bad_files(self.path) if resumed and entry.get("sample", start) < start]
        _write_lines(self.path, kept)
        if self.policy.quarantine_file is None:
            quarantined.unlink(missing_ok=True)
            return
        quarantine = Path(self.policy.quarantine_file)
        quarantine.parent.mkdir(parents=True, exist_ok=True)
        quarantine.open("a").close()
        if not (resumed and quarantined.is_file()):
            _write_lines(quarantined, read_bad_files(quarantine))

    def watch(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Passes samples on, and keeps account of the files that could not be read for them.

        Args:
            samples: What a `ClipStream`, or a `DataLoader` of one, yields, in its order; or other samples with
                `skipped`, all of which have a clip.

        Yields:
            Each sample without `skipped`.

        Raises:
            FrameBridgeError: The policy allows no more bad files, the decoder is not one for such files
                (`UsageError`), or a file of the account cannot be written.
        """
        for sample in samples:
            skipped, has_clip = sample["skipped"], "video" not in sample or len(sample["video"]) > 0
            for bad_file in skipped:
                if bad_file["kind"] == "wrong_container":
                    # The file is sound, and a later run with another decoder must not find it in a list.
                    raise UsageError(f"cannot read the clip {bad_file['path']}: {bad_file['reason']}")
                self._note(bad_file)
            self._sample += 1
            self._attempts += len(skipped) + has_clip
            self._bad += len(skipped)
            self._check(skipped, has_clip)
            yield {key: value for key, value in sample.items() if key != "skipped"}

    def count(self) -> int:
        """Counts the bad files that all ranks have met so far; every rank has to call it."""
        if self._world_size > 1:
            self._written.update(*of_all_ranks(self._unshared))
        self._unshared = []
        return len(self._written)

    def _note(self, bad_file: Mapping[str, Any]) -> None:
        entry = {**bad_file, "path": os.path.abspath(bad_file["path"])}
        self._found.setdefault(entry["path"], entry)
        if entry["path"] not in self._written:
            logger.warning("cannot read the clip %s%s", describe(entry), _FATE[self.policy.policy])
            _append_line(self.path, {"sample": self._first + self._sample * self._world_size, **entry})
            self._written.add(entry["path"])
            self._unshared.append(entry["path"])
        if self.policy.quarantine_file is not None and entry["path"] not in self._in_quarantine:
            _append_line(Path(self.policy.quarantine_file), entry)
            self._in_quarantine.add(entry["path"])

    def _check(self, skipped: Sequence[Mapping[str, Any]], has_clip: bool) -> None:
        policy, shown = self.policy, skipped
        if policy.policy == "raise" and skipped:
            problem, remedy = "a clip cannot be read", "set framebridge.bad_files.policy=skip to go on without it"
        elif len(skipped) == policy.max_in_a_row:
            problem = f"{len(skipped)} clips in a row cannot be read"
            remedy = "raise framebridge.bad_files.max_in_a_row"
        elif not has_clip and not skipped:
            problem, remedy = "every clip is in quarantine", f"check the data and {policy.quarantine_file}"
        elif not has_clip:
            problem, remedy = "no clip of the data can be read", "check the data"
        elif self._attempts >= SHARE_COUNTS_FROM and self._bad > policy.max_share * self._attempts:
            shown = list(self._found.values())
            problem = f"{self._bad} of {self._attempts} attempts to read a clip failed"
            remedy = f"raise framebridge.bad_files.max_share, which is {policy.max_share}"
        else:
            return
        report = [f"  {describe(entry)}" for entry in shown[:_SHOWN]]
        if report:
            report.append(f"all of them, {len(self._written)} so far: {self.path}")
        remedy = f"`finetrainers data check` reads all of the data; or {remedy}"
        raise TooManyBadFilesError(problem, *report, remedy)


_FATE = {"raise": "", "skip": "; another one takes its place", "quarantine": "; it is in quarantine now"}


def _write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def _append_line(path: Path, entry: Mapping[str, Any]) -> None:
    line = json.dumps(entry).encode() + b"\n"
    with writing(path), path.open("ab") as file:
        # Appending is atomic on local disks, but not on NFS; some Lustre systems have no locks, but there it is.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line)
