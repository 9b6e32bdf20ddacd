"""The endless stream of training clips: a function of (seed, position) alone."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, NotRequired, TypedDict, TypeVar

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from framebridge_plugin.data.bad_files import BadFile, BadFilePolicy
from framebridge_plugin.data.clips import ClipSettings, clip_rate, read_pixels
from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.data.folders import ClipIndex, ClipRows
from framebridge_plugin.data.permutation import KeyedPermutation
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.randomness import derive_seed

Sample_co = TypeVar("Sample_co", covariant=True)

RATE_CLIPS = 32
"""Clips whose rate is looked up to say how fast a model's videos are to be shown."""


class Sample(TypedDict):
    """One training sample.

    `video` is uint8 of shape [F, 3, H, W], which crosses processes as a quarter of what `resizing.as_floats` makes of
    it; `sample_seed`, in [0, 2^63 - 1], belongs to this sample in this epoch and seeds whatever else is drawn for it.
    `skipped` lists the files that should have given its clip and could not be read. With F = 0 there is no clip:
    nothing that may be tried can be read. `drawn` is what the stream's `draw` made of it.
    """

    caption: str
    video: torch.Tensor
    sample_seed: int
    skipped: list[BadFile]
    drawn: NotRequired[dict[str, torch.Tensor]]


class EndlessStream(IterableDataset[Sample_co], Generic[Sample_co]):
    """What `sample` gives at the positions start + rank, start + rank + world_size, ..., shared by loader workers."""

    def __init__(self, seed: int, rank: int, world_size: int, start: int) -> None:
        super().__init__()
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[Sample_co]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in itertools.count(first, step):
            yield self.sample(self.start + self.rank + number * self.world_size)

    def sample(self, position: int) -> Sample_co:
        """The sample at a place in the endless sequence of all ranks: epoch * size of an epoch + offset."""
        raise NotImplementedError


class ClipStream(EndlessStream[Sample]):
    """Yields training samples for ever.

    Every epoch visits each row once, in an order keyed by (seed, epoch). Rank r takes the positions start + r,
    start + r + world_size, ... of that endless sequence. Every random choice for a sample is keyed by (seed, epoch,
    row), so neither the number of ranks nor that of loader workers changes a sample, and `start` alone resumes a run.

    For the sequence not to depend on the number of workers, the `DataLoader` needs `batch_size=1` or `None`.

    A clip that cannot be read is replaced by the following row of the epoch, and named in the sample. Whether a run
    goes on is decided where all samples arrive: `BadFileTracker.watch` takes them from the stream or its `DataLoader`.

    Args:
        datasets: Rows and clip settings of each data set, as `load_dataset_config` returns them.
        seed: Seed of the run.
        rank: This process, in [0, world_size - 1].
        world_size: Number of processes that share the data.
        start: Number of samples that all ranks together have already consumed.
        max_attempts: Number of files that are tried for a sample before it comes without a clip.
        files_to_skip: Absolute paths of files that are passed over unopened and not named.
        draw: Makes of a clip and its `sample_seed` what is drawn for it, in the process that reads it.

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
        *,
        max_attempts: int = BadFilePolicy().max_attempts,
        files_to_skip: Collection[str] = (),
        draw: Callable[[torch.Tensor, int], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        super().__init__(seed, rank, world_size, start)
        self.rows = ClipRows(datasets)
        self.max_attempts = max_attempts
        self.files_to_skip = files_to_skip
        self.draw = draw
        if not len(self.rows):
            raise FrameBridgeError("the data sets hold no clips; give at least one")

    @property
    def epoch_size(self) -> int:
        """Number of rows of all data sets together."""
        return len(self.rows)

    def sample(self, position: int) -> Sample:
        """Reads the sample at a place in the endless sequence of all ranks: epoch * epoch_size + offset."""
        epoch, offset = divmod(position, self.epoch_size)
        order = KeyedPermutation(self.epoch_size, self.seed, epoch)
        sample_seed = derive_seed(self.seed, epoch, order[offset])
        skipped: list[BadFile] = []
        for replacement in range(self.epoch_size):
            path, caption, settings = self.rows[order[(offset + replacement) % self.epoch_size]]
            if self.files_to_skip and os.path.abspath(path) in self.files_to_skip:
                continue
            # A stream of its own for the clip's window and flip, so that nothing drawn from sample_seed repeats it;
            # a replacement keeps the seed of its slot, so that it is not the same clip twice in the epoch.
            generator = torch.Generator().manual_seed(derive_seed(sample_seed, "clip"))
            try:
                video_FCHW = read_pixels(path, settings, generator)
            except ClipError as error:
                skipped.append({"path": path, "kind": error.kind, "reason": error.reason})
                if len(skipped) == self.max_attempts:
                    break
            else:
                clip: Sample = {
                    "caption": caption,
                    "video": video_FCHW,
                    "sample_seed": sample_seed,
                    "skipped": skipped,
                }
                if self.draw is not None:
                    clip["drawn"] = self.draw(video_FCHW, sample_seed)
                return clip
        # Nothing is raised here: a reading process does not know how the others fare.
        no_clip = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return {"caption": "", "video": no_clip, "sample_seed": sample_seed, "skipped": skipped}


class ClipRates(Dataset[float | None]):
    """The rates at which the first `RATE_CLIPS` clips of a run go by as in life, the same for every rank and resume.

    In frames per second; a file that does not say it, or cannot be opened, has None.
    """

    def __init__(self, stream: ClipStream) -> None:
        self._stream = stream
        self._order = KeyedPermutation(stream.epoch_size, stream.seed, 0)

    def __len__(self) -> int:
        return min(self._stream.epoch_size, RATE_CLIPS)

    def __getitem__(self, offset: int) -> float | None:
        path, _, settings = self._stream.rows[self._order[offset]]
        if os.path.abspath(path) in self._stream.files_to_skip:
            return None
        try:
            return clip_rate(path, settings)
        except ClipError:
            return None
