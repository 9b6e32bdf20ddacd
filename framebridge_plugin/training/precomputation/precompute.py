"""`finetrainers precompute`: the latents and text embeddings of a whole corpus, written once for many runs.

What is computed is what a live run would compute in its first epochs: the same clips in the same order, with the same
draws. Every process takes its share of the files that are not there yet, so that nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from framebridge_plugin.data import BadFileTracker, ClipIndex, ClipSettings, ClipStream, load_bad_file_policy
from framebridge_plugin.data.bad_files import BadFile, bad_file_policy, files_to_skip
from framebridge_plugin.data.folders import ClipRows, common_clip_shape, index_datasets
from framebridge_plugin.data.stream import Sample
from framebridge_plugin.errors import FrameBridgeError, UsageError, say
from framebridge_plugin.files import remove_partial_files
from framebridge_plugin.folder_lock import FolderLock
from framebridge_plugin.processes import first_alone, is_first, of_all_ranks, process_count, rank
from framebridge_plugin.progress import Progress
from framebridge_plugin.training.captions import caption_cache
from framebridge_plugin.training.draws import pixel_noise
from framebridge_plugin.training.finetrainers.registration import recipe_arguments, register
from framebridge_plugin.training.loading import explained_reading_errors, median_clip_rate, sample_loader
from framebridge_plugin.training.precomputation.fingerprint import run_fingerprint
from framebridge_plugin.training.precomputation.numbering import Captions
from framebridge_plugin.training.precomputation.store import (
    PARTS,
    Manifest,
    Shard,
    check_fingerprint,
    compressed,
    latent_deviation,
    read_manifest,
    read_skipped,
    write_shard,
)
from framebridge_plugin.training.rendezvous import met, wait_for_all
from framebridge_plugin.training.run import build_specification, write_run_files

if TYPE_CHECKING:
    from framebridge_plugin.recipe import Recipe

SHARD_SIZE = 64
"""Samples in a file: a process that is killed loses its work on one file."""


@dataclass(frozen=True)
class Wanted:
    """What a store is to be.

    Attributes:
        variants: Epochs; more add to a store, without a number it stays as it is, and a new one has 1.
        shard_size: Samples in a file of a new store.
        only: "latents" or "captions", which is added to what there is; None for both.
        caption_dtype: Key of `CAPTION_DTYPES` for captions that are new; None for what the text encoder gives.
    """

    variants: int | None = None
    shard_size: int | None = None
    only: str | None = None
    caption_dtype: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """What is to be in it."""
        return PARTS if self.only is None else (self.only,)


def precompute(recipe: Recipe, store: Path, wanted: Wanted | None = None) -> None:
    """Writes what is not there yet of a store, in this process and the others that were started beside it."""
    wanted = wanted or Wanted()
    register()
    lock = FolderLock(store) if is_first() else contextlib.nullcontext()
    with lock, met() as device:
        job = first_alone(lambda: _prepare(recipe, store, wanted, device))
        missing: tuple[list[Shard], list[Shard]] = ([], [])
        if is_first():
            write_run_files(recipe, store)
            job.manifest.write(store)
            remove_partial_files(store)
            missing = job.manifest.missing(store)
        # Every process uses the list that the first one made.
        missing = of_all_ranks(missing)[0]
        if missing[0]:
            job.write_captions(missing[0])
        if missing[1]:
            with explained_reading_errors():
                job.write_clips(missing[1])
        wait_for_all()
        if is_first():
            _report(store, job.manifest, sum(map(len, missing)))
            if missing[1]:
                _say_scale(store, job.manifest, job.specification.adapter.vae_config)


def _prepare(recipe: Recipe, store: Path, wanted: Wanted, device: torch.device) -> _Job:
    """Everything before the first file is written."""
    args = recipe_arguments(recipe, "")  # no file: nothing here reads one
    # Captions are dropped when they are read, anew in every epoch.
    args.framebridge_objective = args.framebridge_objective.model_copy(update={"caption_dropout": 0.0})
    torch.set_float32_matmul_precision(args.float32_matmul_precision)
    content = recipe.dataset_config()
    datasets = index_datasets(content, "the recipe's data")
    policy = bad_file_policy(content, "the recipe's data")
    specification = build_specification(recipe, args)
    specification.clip_shape = common_clip_shape(datasets)
    specification.check_datasets(datasets)
    is_of_classes = specification.adapter.facts.condition == "class"
    if wanted.caption_dtype is not None and ("captions" not in wanted.parts or is_of_classes):
        what = "with --only latents" if not is_of_classes else "for a model of classes"
        raise UsageError(f"--caption-dtype has no effect {what}; leave it out")
    if wanted.variants is not None and "latents" not in wanted.parts:
        raise UsageError("--variants has no effect with --only captions; leave it out")
    captions = Captions(datasets)
    fingerprint = run_fingerprint(args, specification, datasets)
    manifest = read_manifest(store)
    if manifest is None:
        manifest = Manifest(
            rows=len(ClipRows(datasets)),
            variants=wanted.variants or 1,
            captions=len(captions),
            empty_caption=captions.number(""),
            shard_size=wanted.shard_size or SHARD_SIZE,
            fingerprint=fingerprint,
            holds=(),
        )
    else:
        check_fingerprint(store, manifest, fingerprint, to_read=False)
        if wanted.shard_size not in (None, manifest.shard_size):
            raise UsageError(
                f"--shard-size {wanted.shard_size}: {store} has files of {manifest.shard_size}; leave it out"
            )
        if "latents" in manifest.holds and (wanted.variants or manifest.variants) < manifest.variants:
            raise UsageError(
                f"--variants {wanted.variants}: {store} has {manifest.variants} already; leave it out, or precompute "
                "into another folder"
            )
        if "captions" in manifest.holds and wanted.caption_dtype not in (None, manifest.caption_dtype):
            there = manifest.caption_dtype or "what the text encoder gave"
            raise UsageError(f"--caption-dtype {wanted.caption_dtype}: {store} has captions in {there}; leave it out")
    if "latents" in wanted.parts and "latents" not in manifest.holds:
        clips = ClipStream(datasets, args.seed, files_to_skip=files_to_skip(policy.quarantine_file))
        manifest = dataclasses.replace(manifest, clip_rate=median_clip_rate(clips, args))
    manifest = dataclasses.replace(
        manifest,
        fingerprint=fingerprint,
        variants=wanted.variants or manifest.variants,
        holds=[part for part in PARTS if part in (*manifest.holds, *wanted.parts)],
        caption_dtype=wanted.caption_dtype or manifest.caption_dtype,
    )
    return _Job(args, specification, datasets, captions, store, manifest, device)


def _report(store: Path, manifest: Manifest, written: int) -> None:
    """Lists what could not be read, from all files, whichever process wrote them and when; says what there is."""
    shards = list(manifest.clip_shards())
    if written:
        bad_files = {bad_file["path"]: bad_file for shard in shards for bad_file in read_skipped(store / shard.name)}
        lines = [json.dumps(bad_files[path]) + "\n" for path in sorted(bad_files)]
        (store / "bad_files.jsonl").write_text("".join(lines), encoding="utf-8")
    parts = {"latents": f"{manifest.rows} clips x {manifest.variants}", "captions": f"{manifest.captions} captions"}
    held = ", ".join(parts[part] for part in PARTS if part in manifest.holds)
    there = len(shards) + len(list(manifest.caption_shards())) - written
    say(f"{store}: {held}; {written} files written, {there} were there")


def _say_scale(store: Path, manifest: Manifest, vae_config: Mapping[str, Any]) -> None:
    """Says how large the latents are, and the factor of the autoencoder that would make that 1."""
    deviation, clips = latent_deviation(store, manifest)
    wanted = ""
    if "scaling_factor" in vae_config and deviation > 0:
        factor = vae_config["scaling_factor"] / deviation
        wanted = f"; it is 1 with scaling_factor {factor:.4f} in the autoencoder's config, for a new network"
    say(f"standard deviation of the latents of {clips} clips: {deviation:.4f}{wanted}")


class _Positions(Dataset[Sample]):
    """The samples of a stream by their positions."""

    def __init__(self, stream: ClipStream) -> None:
        self._stream = stream

    def __getitem__(self, position: int) -> Sample:
        return self._stream.sample(position)


@dataclass
class _Job:
    """This process's part of the work."""

    args: Any
    specification: Any
    datasets: Sequence[tuple[ClipIndex, ClipSettings]]
    captions: Captions
    store: Path
    manifest: Manifest
    device: torch.device

    def write_captions(self, missing: Sequence[Shard]) -> None:
        mine = self._share(missing)
        components = self._load(self.specification.load_condition_models())
        if self.args.framebridge_trainer.caption_cache_dir is not None:
            self.specification.captions = caption_cache(self.args, self.specification, self._text_device)
        with self._progress("Captions", "caption", mine) as progress:
            for shard in mine:
                rows = []
                for number in range(shard.first, shard.first + shard.count):
                    caption = self.captions.text(number)
                    values = self.specification.prepare_conditions(caption=caption, sample_seed=0, **components)
                    rows.append(compressed(_on_cpu(values, "prepare_conditions"), self.manifest.caption_dtype))
                    progress.update()
                write_shard(self.store / shard.name, rows)

    def write_clips(self, missing: Sequence[Shard]) -> None:
        mine = self._share(missing)
        samples = self._samples(mine)
        components = self._load(self.specification.load_latent_models())
        with self._progress("Clips", "clip", mine) as progress:
            for shard in mine:
                rows, captions, skipped = [], [], {}
                for row, (sample, bad_files) in enumerate(itertools.islice(samples, shard.count)):
                    values = self.specification.prepare_latents(**sample, **components, compute_posterior=True)
                    rows.append(_on_cpu(values, "prepare_latents"))
                    captions.append(self.captions.number(sample["caption"]))
                    skipped[row] = bad_files
                    progress.update()
                write_shard(self.store / shard.name, rows, captions, skipped)
                if shard is mine[0]:
                    self._say_how_large(progress, shard, sum(shard.count for shard in missing))

    def _share(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        return shards[rank() :: process_count()]

    def _samples(self, shards: Sequence[Shard]) -> Iterator[tuple[dict[str, Any], list[BadFile]]]:
        """Yields the samples of files, one after another, and the clips that could not be read for each."""
        policy = load_bad_file_policy(self.store / "dataset_config.json")
        tracker = BadFileTracker(
            policy,
            self.store,
            rank=rank(),
            world_size=process_count(),
            resumed=True,  # what was in quarantine when the store was begun is left out of all of it
            barrier=wait_for_all,
        )
        stream = ClipStream(
            self.datasets,
            self.args.seed,
            max_attempts=policy.max_attempts,
            files_to_skip=tracker.files_to_skip,
            draw=pixel_noise(self.specification),
        )
        positions = itertools.chain.from_iterable(range(shard.first, shard.first + shard.count) for shard in shards)
        loader = sample_loader(_Positions(stream), self.args, positions)
        bad_files: list[list[BadFile]] = []

        def noted() -> Iterator[Sample]:
            for sample in loader:
                bad_files.append(sample["skipped"])
                yield sample

        return ((sample, bad_files.pop()) for sample in tracker.watch(noted()))

    def _load(self, components: dict[str, Any]) -> dict[str, Any]:
        from finetrainers import utils

        for name, component in components.items():
            if isinstance(component, torch.nn.Module):
                component.to(self._text_device if name == "text_encoder" else self.device)
        utils._enable_vae_memory_optimizations(
            components.get("vae"), self.args.enable_slicing, self.args.enable_tiling
        )
        return components

    @property
    def _text_device(self) -> torch.device:
        return torch.device(self.args.framebridge_trainer.text_encoder_device or self.device)

    def _progress(self, name: str, unit: str, shards: Sequence[Shard]) -> Progress:
        share = f" (process 1 of {process_count()})" if process_count() > 1 else ""
        total = sum(shard.count for shard in shards)
        return Progress(total, name + share, unit=unit, disable=not (is_first() and shards))

    def _say_how_large(self, progress: Progress, shard: Shard, clips: int) -> None:
        wanted = (self.store / shard.name).stat().st_size / shard.count * clips
        free = shutil.disk_usage(self.store).free
        if is_first() and wanted > free:
            progress.write(f"warning: the clips take about {wanted / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")


def _on_cpu(values: Mapping[str, Any], source: str) -> dict[str, torch.Tensor]:
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) or len(value) != 1:
            raise FrameBridgeError(
                f"{source} returns {name} as {type(value).__name__}; only tensors of one sample can be stored: train "
                "this model without precomputation"
            )
    return {name: value.detach().cpu() for name, value in values.items()}
