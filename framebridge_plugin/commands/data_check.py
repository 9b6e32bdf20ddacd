"""Reading a whole corpus once, to find the files that cannot give a clip."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.data import DataLoader, Dataset

from framebridge_plugin.data.bad_files import BadFile, read_bad_files
from framebridge_plugin.data.clips import clip_frames
from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.data.decoding.isolation import read_video_isolated
from framebridge_plugin.data.folders import ClipRows, index_datasets
from framebridge_plugin.data.showing import Conversion
from framebridge_plugin.errors import FrameBridgeError, print_line, say
from framebridge_plugin.files import write_whole, writing
from framebridge_plugin.progress import Progress
from framebridge_plugin.signals import leave_to_main_process

CLIPS_AT_A_TIME = 8
"""A reading process takes so many at a time; what Ctrl-C loses is no more than a few of these."""

_LATEST = 1 - 2**-53
_FULL_LIMIT_S = 3600.0  # A long film is decoded from end to end.


def check_data(content: Mapping[str, Any], output: Path, *, nproc: int, full: bool = False) -> int:
    """Read every clip of a recipe's data, as a run would, and print a table of what cannot be read.

    Every file is opened, indexed and decoded: the clip that begins last in it, or with "start" windows the one that
    begins first; with `full`, all of it. Decoders run in processes of their own, so that one that crashes or hangs is
    one more finding. While a check is under way, `<output>.progress` says how far it has come: after Ctrl-C or a kill,
    the same call goes on from there. Returns the exit code.
    """
    rows = ClipRows(index_datasets(content, "the recipe's data"))
    progress = _Progress(output, rows, full)
    with writing(output):
        file = progress.resume()
    with file:
        if progress.done:
            say(f"going on after {progress.done} of {len(rows)} clips")
        try:
            for found in _read(_Checks(rows, full), progress.done, nproc):
                with writing(output):
                    file.writelines(json.dumps(entry).encode() + b"\n" for entry in found if entry is not None)
                    file.flush()
                    progress.save(len(found), file.tell())
        except KeyboardInterrupt:
            say(f"{progress.done} of {len(rows)} clips are checked; the same command goes on")
            raise
    progress.path.unlink()
    bad_files = read_bad_files(output)
    for index, _ in rows.datasets:
        for note in filter(None, index.description.split("\n")):
            print_line(f"{index.common_folder()}: {note}")
    for line in _table(bad_files, len(rows), output):
        print_line(line)
    return 1 if bad_files else 0


class _Checks(Dataset[BadFile | None]):
    """What is wrong with every clip of the data sets, one after the other, or None."""

    def __init__(self, rows: ClipRows, full: bool) -> None:
        self.rows = rows
        self.full = full

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> BadFile | None:
        path, _, settings = self.rows[number]

        def choose(length: int) -> Sequence[int]:
            window = clip_frames(path, length, settings, _LATEST)
            return sorted({0, *window, length - 1}) if self.full else window

        # What a run holds at full size is held so here; a full check holds more frames than a clip has.
        holds_all = settings.isolated and settings.resize == "torch" and not self.full
        cover = None if holds_all else (settings.height, settings.width)
        options = {"decoder": settings.decoder, "strict": settings.strict, "conversion": Conversion(cover)}
        try:
            read_video_isolated(path, choose, time_limit_s=_FULL_LIMIT_S if self.full else None, **options)
        except ClipError as error:
            return {"path": os.path.abspath(path), "kind": error.kind, "reason": error.reason}
        except RuntimeError as error:
            # What nobody thought of, with a traceback of many lines: worth a report to us, but no end of the check.
            reason = f"its reader failed ({str(error).splitlines()[-1]})"
            return {"path": os.path.abspath(path), "kind": "crashed", "reason": reason}
        return None


class _Progress:
    """How far a check has come: in the file beside its result, which is there only as long as it is not at its end."""

    def __init__(self, output: Path, rows: ClipRows, full: bool) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.progress")
        self.done = 0
        self._rows = rows
        self._what = {
            "clips": [len(index) for index, _ in rows.datasets],
            "settings": [settings.fingerprint() for _, settings in rows.datasets],
            "full": full,
        }

    def resume(self) -> BinaryIO:
        """Opens the result file for what comes next, cut to what belongs to the clips that are done."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            state = json.loads(self.path.read_text())
            is_same = state["what"] == self._what and state["last"] == self._rows[state["done"] - 1][0]
            if is_same and self.output.stat().st_size >= state["bytes"]:
                self.done, size = state["done"], state["bytes"]
        file = self.output.open("ab")
        file.truncate(size)
        return file

    def save(self, clips: int, size: int) -> None:
        self.done += clips
        last = self._rows[self.done - 1][0]
        state = {"what": self._what, "done": self.done, "bytes": size, "last": last}
        write_whole(self.path, json.dumps(state))


def _read(checks: _Checks, start: int, nproc: int) -> Iterator[list[BadFile | None]]:
    options: dict[str, Any] = {"collate_fn": list, "worker_init_fn": leave_to_main_process}
    loader = DataLoader(checks, CLIPS_AT_A_TIME, sampler=range(start, len(checks)), num_workers=nproc, **options)
    bad = 0
    with Progress(len(checks), "Checking", initial=start, unit="clip") as bar:
        try:
            for found in loader:
                yield found
                bad += sum(entry is not None for entry in found)
                bar.update(len(found))
                bar.set_postfix(bad=bad)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise FrameBridgeError(
                "a reading process was killed, probably for lack of memory; the same command goes on, with a smaller "
                "--nproc if need be"
            ) from error


def _table(bad_files: Sequence[Mapping[str, Any]], clips: int, output: Path) -> Iterator[str]:
    yield f"{clips} clips: {clips - len(bad_files)} can be read, {len(bad_files)} cannot"
    if not bad_files:
        return
    counts = Counter(entry["kind"] for entry in bad_files)
    width = max(map(len, counts))
    for kind, count in counts.most_common():
        example = next(entry for entry in bad_files if entry["kind"] == kind)
        yield f"  {kind:{width}} {count:>{len(str(len(bad_files)))}}  such as {example['path']}: {example['reason']}"
    yield f"all of them: {output}"
