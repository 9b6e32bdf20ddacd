"""What videos are made of: true clips, chosen by a seed and never replaced by others, or images alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from framebridge_plugin.data.bad_files import BadFile
from framebridge_plugin.data.clips import ClipSettings
from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.data.decoding.exact import read_first_picture
from framebridge_plugin.data.folders import ClipIndex
from framebridge_plugin.data.listing import is_video
from framebridge_plugin.data.permutation import KeyedPermutation
from framebridge_plugin.data.stream import ClipStream
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.media import picture_levels
from framebridge_plugin.resizing import resize_and_crop


class Clip(NamedTuple):
    """What a video is made of, and what it is compared with.

    Attributes:
        number: Its place in the evaluation, to which its seed belongs.
        source: The file that it is from.
        condition: A caption, or the name of a class.
        frames: The true clip, uint8 [F, 3, H, W], whose first frame is the image; of an image alone that one frame.
    """

    number: int
    source: str
    condition: Any
    frames: torch.Tensor


class Inputs(Protocol):
    """What videos are made of, by number.

    Attributes:
        has_truth: Whether there is a true clip for each.
    """

    has_truth: bool

    def __len__(self) -> int: ...

    def read(self, number: int) -> Clip | BadFile:
        """What a number is made of, or why it cannot be read."""
        ...

    def source(self, number: int) -> str:
        """The file of a number."""
        ...

    def condition(self, number: int) -> Any:
        """The caption or class of a number."""
        ...


class TrueClips:
    """The first clips of an order of all rows that a seed decides, each with the window that it decides.

    Args:
        datasets: Rows and clip settings, as `index_datasets` returns them.
        seed: What chooses them.
        count: How many; None takes all, `DEFAULT_COUNT` at most.

    Raises:
        UsageError: There are fewer.
    """

    DEFAULT_COUNT = 64
    has_truth = True

    def __init__(self, datasets: Sequence[tuple[ClipIndex, ClipSettings]], seed: int, count: int | None) -> None:
        self._stream = ClipStream(datasets, seed, max_attempts=1)
        self._order = KeyedPermutation(self._stream.epoch_size, seed, 0)
        if count is not None and count > self._stream.epoch_size:
            raise UsageError(f"--count {count}: the data has {self._stream.epoch_size} clips; take no more")
        self._count = count or min(self._stream.epoch_size, self.DEFAULT_COUNT)

    def __len__(self) -> int:
        return self._count

    def read(self, number: int) -> Clip | BadFile:
        """The clip of a number, or why it cannot be read."""
        sample = self._stream.sample(number)
        if sample["skipped"]:
            return sample["skipped"][0]
        return Clip(number, self.source(number), sample["caption"], sample["video"])

    def source(self, number: int) -> str:
        """The file of a number."""
        return os.path.abspath(self._stream.rows[self._order[number]][0])

    def condition(self, number: int) -> Any:
        """The caption or class of a number."""
        return self._stream.rows[self._order[number]][1]


class Images:
    """Pictures and the first frames of videos, each several times, one after the other.

    Args:
        pairs: File and condition of each.
        times: Videos of each.
        size: Height and width to which they are resized and cropped as clips are.
    """

    has_truth = False

    def __init__(self, pairs: Sequence[tuple[Path, Any]], times: int, size: tuple[int, int]) -> None:
        self._pairs, self._times, self._size = pairs, times, size

    def __len__(self) -> int:
        return len(self._pairs) * self._times

    def read(self, number: int) -> Clip | BadFile:
        """The image of a number, or why it cannot be read."""
        path, condition = self._pairs[number // self._times]
        try:
            picture = Image.fromarray(read_first_picture(str(path))) if is_video(path.name) else path
            levels = torch.from_numpy(picture_levels(picture)).permute(2, 0, 1)
        except ClipError as error:
            return {"path": self.source(number), "kind": error.kind, "reason": error.reason}
        except FrameBridgeError as error:
            return {"path": self.source(number), "kind": "no_picture", "reason": str(error).removeprefix(f"{path}: ")}
        pixels = (resize_and_crop(levels[None], *self._size) * 255).round().to(torch.uint8)
        return Clip(number, self.source(number), condition, pixels)

    def source(self, number: int) -> str:
        """The file of a number."""
        return os.path.abspath(self._pairs[number // self._times][0])

    def condition(self, number: int) -> Any:
        """The prompt, class or label of a number."""
        return self._pairs[number // self._times][1]
