"""The true clips of an evaluation: chosen by a seed, read as a run reads its own, and never replaced by others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from framebridge_plugin.data.bad_files import BadFile
from framebridge_plugin.data.clips import ClipSettings
from framebridge_plugin.data.folders import ClipIndex
from framebridge_plugin.data.permutation import KeyedPermutation
from framebridge_plugin.data.stream import ClipStream
from framebridge_plugin.errors import UsageError


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


class TrueClips:
    """The first clips of an order of all rows that a seed decides, each with the window that it decides.

    Args:
        datasets: Rows and clip settings, as `index_datasets` returns them.
        seed: The evaluation's seed.
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
