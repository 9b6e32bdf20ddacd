"""From the data sets to the batches that the trainer's loop takes."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from finetrainers import utils
from finetrainers.data import initialize_preprocessor

from framebridge_plugin.data import BadFileTracker, ClipIndex, ClipSettings, ClipStream, load_bad_file_policy
from framebridge_plugin.progress import Progress
from framebridge_plugin.training.draws import pixel_noise
from framebridge_plugin.training.loading import median_clip_rate, sample_loader
from framebridge_plugin.training.precomputation.numbering import Captions
from framebridge_plugin.training.precomputation.store import PARTS, LatentStore
from framebridge_plugin.training.precomputation.stream import StoredCaptions, StoredStream
from framebridge_plugin.training.specification import BridgeSpecification
from framebridge_plugin.training.stopping import StoppedReadingError


class TrainingBatches(Iterator[tuple[dict[str, Any], dict[str, Any]]]):
    """Collated batches for ever, from the first clip not yet trained on.

    Each is (conditions, latents), dictionaries of tensors on the device. What the network computes with has the
    network's precision in the conditions, and float32 in the latents, since a bridge mixes those with coefficients
    from .002 to 170; labels stay integers.
    """

    def __init__(
        self,
        args: Any,
        specification: BridgeSpecification,
        datasets: Sequence[tuple[ClipIndex, ClipSettings]],
        prepare_data: Callable[..., tuple[Iterator[dict], Iterator[dict]]],
        *,
        backend: Any,
        data_rank: int,
        data_world_size: int,
        samples_seen: int,
        store: LatentStore | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self._args, self._specification, self._backend = args, specification, backend
        once = args.enable_precomputation and args.precomputation_once
        start = 0 if once else samples_seen
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
        place = {"rank": data_rank, "world_size": data_world_size, "start": start}
        stream: ClipStream | StoredStream
        self.clip_rate: float | None
        """Frames per second at which the clips are seen; None if nothing says it."""
        holds = () if store is None else store.manifest.holds
        stored_captions: StoredCaptions | None = None
        if store is not None and "captions" in holds:
            dropout = args.framebridge_objective.caption_dropout
            stored_captions = StoredCaptions(store, dropout, specification.adapter.drop_caption)
        if store is None or "latents" not in holds:
            skipped = self.bad_files.files_to_skip
            stream = ClipStream(
                datasets,
                args.seed,
                **place,
                max_attempts=policy.max_attempts,
                files_to_skip=skipped,
                draw=pixel_noise(specification),
            )
            self.clip_rate = median_clip_rate(stream, args)
        else:
            self.clip_rate = store.manifest.clip_rate
            stream = StoredStream(store, args.seed, stored_captions or Captions(datasets), **place)
        samples = self.bad_files.watch(sample_loader(stream, args))
        self._items: Iterator[tuple[dict[str, Any], dict[str, Any]]]
        if len(holds) < len(PARTS):
            processors: dict[str, Callable[..., Any]] = {
                "condition": specification.prepare_conditions,
                "latent": functools.partial(specification.prepare_latents, compute_posterior=True),
            }
            # What is stored needs no model.
            if "latents" in holds:
                specification.latent_models, processors["latent"] = {}, lambda latents, **_: latents
            if stored_captions is not None:
                specification.condition_models = {}
                processors["condition"] = functools.partial(_stored_conditions, Captions(datasets), stored_captions)
            encoded = self._encoded(samples if stop is None else _until(stop, samples), processors, prepare_data)
            seen = samples_seen // data_world_size % args.precomputation_items if once else 0
            self._items = itertools.islice(encoded, seen, None)
        else:
            self._items = ((sample["conditions"], sample["latents"]) for sample in samples)

    def _encoded(
        self,
        samples: Iterator[dict],
        processors: Mapping[str, Callable[..., dict]],
        prepare_data: Callable[..., tuple[Iterator[dict], Iterator[dict]]],
    ) -> Iterator[tuple[dict, dict]]:
        args = self._args
        preprocessor = initialize_preprocessor(
            rank=self._backend.rank,
            num_items=args.precomputation_items if args.enable_precomputation else 1,
            processor_fn={kind: self._counted(kind, process) for kind, process in processors.items()},
            save_dir=args.precomputation_dir,
            enable_precomputation=args.enable_precomputation,
        )
        while True:
            if preprocessor.requires_data:
                with contextlib.ExitStack() as self._bars:
                    conditions, latents = prepare_data(preprocessor, samples)
            yield next(conditions), next(latents)

    def _counted(self, kind: str, process: Callable[..., dict]) -> Callable[..., dict]:
        """Shows how many of a block that is encoded in advance are done."""
        args, bar, name = self._args, None, {"condition": "caption", "latent": "clip"}[kind]
        if not args.enable_precomputation:
            return process

        def counted(**item: Any) -> dict:
            nonlocal bar
            if bar is None or bar.n == args.precomputation_items:
                title, here = f"Encoding {name}s", self._backend.is_main_process
                bar = Progress(args.precomputation_items, title, unit=name, disable=not here, leave=False)
                self._bars.enter_context(bar)
            result = process(**item)
            bar.update()
            return result

        return counted

    def __next__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        items = list(itertools.islice(self._items, self._args.batch_size))
        return collated(self._specification, items, self._backend.device, self._args.transformer_dtype)


def collated(
    specification: BridgeSpecification,
    items: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch of samples as `TrainingBatches` gives it, all of it on the device."""
    conditions = specification.collate_conditions([item[0] for item in items])
    latents = specification.collate_latents([item[1] for item in items])
    # Lists are labels.
    conditions = {name: torch.tensor(v) if isinstance(v, list) else v for name, v in conditions.items()}
    return (
        _cast(utils.align_device_and_dtype(conditions, device), dtype),
        utils.align_device_and_dtype(latents, device),
    )


def _until(stop: Callable[[], bool], samples: Iterator[dict]) -> Iterator[dict]:
    for sample in samples:
        if stop():
            raise StoppedReadingError
        yield sample


def _stored_conditions(
    numbers: Captions, stored: StoredCaptions, caption: str, sample_seed: int, **_: Any
) -> dict[str, Any]:
    return stored.conditions(numbers.number(caption), sample_seed)


def _cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
