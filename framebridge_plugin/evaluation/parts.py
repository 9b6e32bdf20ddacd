"""The videos of an evaluation on the disk: a file for each call of the model, which is there as a whole or not.

protocol.json                     what all videos of the folder were made by
parts/000000.safetensors          videos, their numbers, and what was measured of them
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from framebridge_plugin.backbones.fingerprint import first_difference
from framebridge_plugin.data.bad_files import BadFile
from framebridge_plugin.errors import FrameBridgeError, UsageError, in_one_line
from framebridge_plugin.evaluation.measuring import Columns
from framebridge_plugin.files import write_through, write_whole, writing

PROTOCOL_FILE = "protocol.json"
_NUMBERS, _VIDEOS, _MEASURED = "numbers", "videos", "measured."


class Part(NamedTuple):
    """What one file holds: `numbers` of the clips, conditions, what was measured, and the files that gave no clip."""

    numbers: list[int]
    conditions: list[Any]
    columns: Columns
    bad_files: list[BadFile]


class PartFiles:
    """Files in a folder, one for `size` of `count` clips each; a file holds a row for each clip that can be read."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.folder, self.count, self.size = folder, count, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def numbers(self, part: int) -> range:
        """The clips of a part."""
        return range(part * self.size, min((part + 1) * self.size, self.count))

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"{part:06}.safetensors"

    def missing(self) -> list[int]:
        """The parts that are not there yet."""
        return [part for part in range(len(self)) if not self.path(part).is_file()]

    def write_columns(self, part: int, columns: Columns) -> None:
        """Writes values, a row for each clip."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: values.contiguous() for name, values in columns.items()}
        write_through(self.path(part), lambda path: save_file(tensors, path))

    def columns(self) -> Columns:
        """The values of all parts, in the order of the clips."""
        found = []
        for part in range(len(self)):
            with self._open(part) as file:
                found.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return _joined_columns(found)

    def _open(self, part: int) -> Any:
        try:
            return safe_open(self.path(part), "pt")
        except (OSError, SafetensorError) as error:
            raise FrameBridgeError(
                f"{self.path(part)} is damaged ({in_one_line(error)}); remove it and run the same command again"
            ) from error


class Parts(PartFiles):
    """The videos of an evaluation, and what was measured of them."""

    def __init__(self, output: Path, count: int, size: int) -> None:
        super().__init__(output / "parts", count, size)
        self.output = output

    def like(self, folder: Path) -> PartFiles:
        """Files of the same clips in another folder."""
        return PartFiles(folder, self.count, self.size)

    def check_protocol(self, protocol: Mapping[str, Any]) -> None:
        """Writes the protocol of a new folder; refuses one that holds the videos of another."""
        path = self.output / PROTOCOL_FILE
        protocol = json.loads(json.dumps(protocol))
        if path.is_file():
            try:
                there = json.loads(path.read_text(encoding="utf-8"))
                difference = first_difference(there, protocol)
            except (OSError, ValueError, AttributeError) as error:
                raise FrameBridgeError(f"{path} is damaged ({in_one_line(error)}); name another folder") from error
            if difference is not None:
                raise UsageError(
                    f"{self.output} holds another evaluation: {difference}; set that back, or name another folder"
                )
        elif self.output.is_dir() and any(not entry.name.startswith(".") for entry in self.output.iterdir()):
            raise UsageError(f"{self.output} holds something else; name another folder")
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(protocol, indent=2) + "\n")

    def write(self, part: int, videos: torch.Tensor, content: Part) -> None:
        """Writes a part; `videos` are uint8 [B, F, 3, H, W]."""
        tensors = {_VIDEOS: videos.contiguous(), _NUMBERS: torch.tensor(content.numbers, dtype=torch.int64)}
        tensors |= {f"{_MEASURED}{name}": values.contiguous() for name, values in content.columns.items()}
        said = json.dumps({"conditions": content.conditions, "bad_files": content.bad_files})
        # One entry: of several the order in the file is random.
        write_through(self.path(part), lambda path: save_file(tensors, path, {"said": said}))

    def read(self, part: int) -> Part:
        """What a part holds, but for the videos."""
        with self._open(part) as file:
            names = [name for name in file.keys() if name.startswith(_MEASURED)]  # noqa: SIM118
            columns = {name.removeprefix(_MEASURED): file.get_tensor(name) for name in names}
            return Part(file.get_tensor(_NUMBERS).tolist(), columns=columns, **json.loads(file.metadata()["said"]))

    def videos(self, part: int) -> torch.Tensor:
        """The videos of a part, uint8 [B, F, 3, H, W]."""
        with self._open(part) as file:
            return file.get_tensor(_VIDEOS)

    def video(self, number: int) -> torch.Tensor:
        """One video, uint8 [F, 3, H, W]."""
        part = number // self.size
        with self._open(part) as file:
            row = file.get_tensor(_NUMBERS).tolist().index(number)
            return file.get_slice(_VIDEOS)[row]

    def all(self) -> Part:
        """What all parts together hold, in the order of their numbers."""
        return joined([self.read(part) for part in range(len(self))])


def joined(parts: Sequence[Part]) -> Part:
    """Parts as one."""

    def of_all(name: str) -> Iterator[Any]:
        return (value for part in parts for value in getattr(part, name))

    columns = _joined_columns([part.columns for part in parts])
    return Part([*of_all("numbers")], [*of_all("conditions")], columns, [*of_all("bad_files")])


def _joined_columns(parts: Sequence[Columns]) -> Columns:
    """Columns below each other; a part without a clip has none."""
    full = [columns for columns in parts if columns]
    return {name: torch.cat([columns[name] for columns in full]) for name in (full[0] if full else ())}
