"""The loader of clips, as the recipe describes it."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from framebridge_plugin.data.stream import ClipRates, ClipStream
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.signals import leave_to_main_process

# How torch's own errors begin; those of the data set begin otherwise, also where a worker passes them on.
_TIMED_OUT, _DIED = "DataLoader timed out", "DataLoader worker (pid"


def sample_loader(samples: Dataset, args: Any, positions: Iterable[int] | None = None) -> DataLoader:
    """Reads samples of a stream, or those at `positions`, one by one; read it within `explained_reading_errors`."""
    workers, settings = args.dataloader_num_workers, args.framebridge_trainer
    return DataLoader(
        samples,
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        pin_memory=args.pin_memory,
        prefetch_factor=settings.dataloader_prefetch_factor if workers else None,
        timeout=settings.dataloader_timeout if workers else 0,
        worker_init_fn=leave_to_main_process,
    )


def median_clip_rate(stream: ClipStream, args: Any) -> float | None:
    """Frames per second of a run's first clips, their median; None where no file says it.

    The reading processes look it up, since files may hang.
    """
    rates = ClipRates(stream)
    with explained_reading_errors():
        known = [rate for rate in sample_loader(rates, args, range(len(rates))) if rate is not None]
    return round(statistics.median(known), 3) if known else None


@contextlib.contextmanager
def explained_reading_errors() -> Iterator[None]:
    """Says of a hang or death of a reading process what to do about it.

    torch raises a death wherever the main thread is at the time, not only where a sample is waited for: the whole
    loop that reads belongs into the block.
    """
    try:
        yield
    except RuntimeError as error:
        # While it waits for a sample, torch puts the death of a worker behind an error that says less, or one of an
        # empty queue behind the death.
        texts = [" ".join(str(e).split()).rstrip(".") for e in (error.__cause__, error)]
        text = next((text for text in texts if text.startswith((_TIMED_OUT, _DIED))), "")
        if text.startswith(_TIMED_OUT):
            raise FrameBridgeError(
                f"no clip came from the reading processes ({text}): a decoder or the storage hangs; set "
                "framebridge.data.isolated=true, so that a hang costs one clip, or raise "
                "framebridge.dataloader_timeout if the storage is slow; `finetrainers data check` finds the file"
            ) from error
        if text.startswith(_DIED):
            raise FrameBridgeError(
                f"a reading process died ({text}): set framebridge.data.isolated=true, so that a decoder that crashes "
                "costs one clip, or lower dataloader.dataloader_num_workers if memory ran out; `finetrainers data "
                "check` finds the file"
            ) from error
        raise
