"""The endless stream of training clips: a function of (seed, position) alone."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from torch.utils.data import IterableDataset, get_worker_info

from framebridge_plugin.data.clips import ClipSettings, read_clip
from framebridge_plugin.data.decoding import ClipError
from framebridge_plugin.data.folders import ClipIndex
from framebridge_plugin.data.permutation import KeyedPermutation
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.randomness import derive_seed

logger = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 16
FIRST_ATTEMPTS = 64
"""More than half of so many clips broken at the start means that the data set is wrong, not a few files."""


class Sample(TypedDict):
    """One training sample.

    `video` is float32 of shape [F, 3, H, W] in [-1, 1]; `sample_seed`, in [0, 2^63 - 1], belongs to this sample in
    this epoch and seeds whatever else is drawn for it.
    """

    caption: str
    video: torch.Tensor
    sample_seed: int


class BrokenDatasetError(FrameBridgeError):
    """Too many clips in a row, or too large a share at the start, cannot be read."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's error again with the whole traceback as its message; its last line is ours.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class ClipStream(IterableDataset[Sample]):
    """Yields training samples for ever.

    Every epoch visits each row once, in an order keyed by (seed, epoch). Rank r takes the positions r,
    r + world_size, ... of that endless sequence. Every random choice for a sample is keyed by (seed, epoch, row), so
    neither the number of ranks nor that of loader workers changes a sample, and `start` alone resumes a run.

    For the sequence not to depend on the number of workers, the `DataLoader` needs `batch_size=1` or `None`.

    A clip that cannot be read is logged and replaced by the following row of the epoch.

    Args:
        datasets: Rows and clip settings of each data set, as `load_dataset_config` returns them.
        seed: Seed of the run.
        rank: This process, in [0, world_size - 1].
        world_size: Number of processes that share the data.
        start: Number of samples that this rank has already consumed.

    Raises:
        FrameBridgeError: There are no rows.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[ClipIndex, ClipSettings]],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.datasets = list(datasets)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._ends = list(itertools.accumulate(len(index) for index, _ in self.datasets))
        if not self._ends or self._ends[-1] == 0:
            raise FrameBridgeError("the data sets hold no clips; give at least one")

    @property
    def epoch_size(self) -> int:
        """Number of rows of all data sets together."""
        return self._ends[-1]

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        attempts = _Attempts()
        for number in itertools.count(self.start + first, step):
            yield self._sample(self.rank + number * self.world_size, attempts)

    def _sample(self, position: int, attempts: _Attempts) -> Sample:
        epoch, offset = divmod(position, self.epoch_size)
        order = KeyedPermutation(self.epoch_size, self.seed, epoch)
        sample_seed = derive_seed(self.seed, epoch, order[offset])
        for replacement in itertools.count():
            row = order[(offset + replacement) % self.epoch_size]
            dataset = bisect.bisect_right(self._ends, row)
            index, settings = self.datasets[dataset]
            path, caption = index[row - (self._ends[dataset] - len(index))]
            # A stream of its own for the clip's window and flip, so that nothing drawn from sample_seed repeats it;
            # a replacement keeps the seed of its slot, so that it is not the same clip twice in the epoch.
            generator = torch.Generator().manual_seed(derive_seed(sample_seed, "clip"))
            try:
                video_FCHW = read_clip(path, settings, generator)
            except ClipError as error:
                attempts.failed(error)
                continue
            attempts.succeeded()
            return {"caption": caption, "video": video_FCHW, "sample_seed": sample_seed}
        raise AssertionError("unreachable")


class _Attempts:
    """Counts what could and could not be read, and stops the run when the data set as a whole is at fault."""

    def __init__(self) -> None:
        self.total = 0
        self.bad = 0
        self.bad_in_a_row = 0
        self.logged: set[str] = set()

    def succeeded(self) -> None:
        self.total += 1
        self.bad_in_a_row = 0

    def failed(self, error: ClipError) -> None:
        self.total += 1
        self.bad += 1
        self.bad_in_a_row += 1
        if error.path not in self.logged:
            self.logged.add(error.path)
            logger.warning("%s; another clip takes its place", error)
        remedy = f"check the data set; the last one: {error}"
        if self.bad_in_a_row == MAX_BAD_IN_A_ROW:
            raise BrokenDatasetError(f"{MAX_BAD_IN_A_ROW} clips in a row cannot be read; {remedy}")
        if self.total <= FIRST_ATTEMPTS and self.bad > FIRST_ATTEMPTS // 2:
            raise BrokenDatasetError(f"{self.bad} of the first {self.total} clips cannot be read; {remedy}")
