"""The loader of clips, as the recipe describes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader, Dataset


def sample_loader(samples: Dataset, args: Any, positions: Iterable[int] | None = None) -> DataLoader:
    """Reads samples one by one, in their order, with as many processes as the recipe says.

    Args:
        samples: The stream, or what gives a sample for a position.
        args: finetrainers' arguments, with ours.
        positions: Which ones to read, where `samples` is no stream.

    Returns:
        The loader; it yields samples, not batches.
    """
    workers, settings = args.dataloader_num_workers, args.framebridge_trainer
    return DataLoader(
        samples,
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        pin_memory=args.pin_memory,
        prefetch_factor=settings.dataloader_prefetch_factor if workers else None,
        timeout=settings.dataloader_timeout if workers else 0,
    )
