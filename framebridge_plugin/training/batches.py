"""From the data sets to the batches that the trainer's loop takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from finetrainers import utils
from finetrainers.data import initialize_preprocessor
from torch.utils.data import DataLoader

from framebridge_plugin.data import BadFileTracker, ClipStream, load_bad_file_policy


class TrainingBatches(Iterator[tuple[dict[str, Any], dict[str, Any]]]):
    """Collated batches for ever, from the first clip not yet trained on.

    Each is (conditions, latents), dictionaries of tensors on the device. What the network computes with has the
    network's precision in the conditions, and float32 in the latents, since a bridge mixes those with coefficients
    from .002 to 170; labels stay integers.

    Args:
        args: finetrainers' arguments.
        specification: The model's.
        datasets: What `load_dataset_config` returned.
        prepare_data: finetrainers' `_prepare_data`: loads what encodes clips and captions, and runs it.
        backend: finetrainers' parallel backend.
        data_rank: This process among those that share the data.
        data_world_size: Number of those processes.
        samples_seen: Clips that all of them together have trained on.
    """

    def __init__(
        self,
        args: Any,
        specification: Any,
        datasets: Sequence[Any],
        prepare_data: Callable[..., tuple[Iterator[dict], Iterator[dict]]],
        *,
        backend: Any,
        data_rank: int,
        data_world_size: int,
        samples_seen: int,
    ) -> None:
        self._args, self._specification, self._backend = args, specification, backend
        self._prepare_data = prepare_data
        position = samples_seen // data_world_size
        once = args.enable_precomputation and args.precomputation_once
        start = 0 if once else position
        policy = load_bad_file_policy(args.dataset_config)
        self.bad_files = BadFileTracker(
            policy,
            args.output_dir,
            rank=data_rank,
            world_size=data_world_size,
            start=start,
            resumed=samples_seen > 0,
            barrier=backend.wait_for_everyone,
        )
        stream = ClipStream(
            datasets,
            args.seed,
            data_rank,
            data_world_size,
            start,
            max_attempts=policy.max_attempts,
            known_files=self.bad_files.known_files,
        )
        loader = DataLoader(
            stream, batch_size=None, num_workers=args.dataloader_num_workers, pin_memory=args.pin_memory
        )
        self._samples = self.bad_files.watch(loader)
        self._preprocessor = initialize_preprocessor(
            rank=backend.rank,
            num_items=args.precomputation_items if args.enable_precomputation else 1,
            processor_fn={
                "condition": specification.prepare_conditions,
                "latent": functools.partial(specification.prepare_latents, compute_posterior=True),
            },
            save_dir=args.precomputation_dir,
            enable_precomputation=args.enable_precomputation,
        )
        self._skip = position % args.precomputation_items if once else 0

    def __next__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        items: list[tuple[dict, dict]] = []
        while len(items) < self._args.batch_size:
            if self._preprocessor.requires_data:
                self._conditions, self._latents = self._prepare_data(self._preprocessor, self._samples)
            items.append((next(self._conditions), next(self._latents)))
            if self._skip:
                self._skip -= 1
                items.clear()
        device = self._backend.device
        conditions = self._specification.collate_conditions([item[0] for item in items])
        latents = self._specification.collate_latents([item[1] for item in items])
        return (
            _cast(utils.align_device_and_dtype(conditions, device), self._args.transformer_dtype),
            utils.align_device_and_dtype(latents, device),
        )


def _cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
