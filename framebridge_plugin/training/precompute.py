"""`finetrainers precompute`: the latents and text embeddings of a whole corpus, written once for many runs.

What is computed is what a live run computes for the first epochs: the same clips in the same order, the same draws.
Every process takes its share of the files that are not there yet, so that nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from framebridge_plugin.data import BadFileTracker, ClipIndex, ClipSettings, ClipStream, load_bad_file_policy
from framebridge_plugin.data.folders import index_datasets
from framebridge_plugin.data.stream import Sample
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training.fingerprint import first_difference, run_fingerprint
from framebridge_plugin.training.latent_store import (
    Manifest,
    Shard,
    read_manifest,
    read_skipped,
    remove_partial_files,
    write_shard,
)
from framebridge_plugin.training.registration import parse_arguments, register
from framebridge_plugin.training.run import build_specification, write_run_files

if TYPE_CHECKING:
    from framebridge_plugin.recipe import Recipe

SHARD_SIZE = 64
"""Clips in a file: so many are computed again, at most, for each process that is killed."""


def precompute(recipe: Recipe, store: Path, *, variants: int | None = None, shard_size: int | None = None) -> None:
    """Writes what is not there yet of a store of latents and embeddings, in this process and those beside it.

    Args:
        recipe: A checked recipe.
        store: The store's folder.
        variants: Epochs to store; by default what the store says that is there, else 1. More than it has adds to it.
        shard_size: Clips in a file, for a new store; by default 64.

    Raises:
        UsageError: If the store is made of files of another size.
        FrameBridgeError: If the store is that of another model, data set or setting, a file of the model cannot be
            read, too many clips cannot be read, or the disk is full.
    """
    register()
    content = recipe.dataset_config()
    args = parse_arguments(
        [*recipe.to_finetrainers_argv(store / "dataset_config.json"), *recipe.objective_argv(), "--caption_dropout=0"]
    )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    torch.set_float32_matmul_precision(args.float32_matmul_precision)
    datasets = index_datasets(content, "the recipe's data")
    specification = build_specification(recipe, args)
    specification.clip_shape = common_clip_shape(datasets)
    getattr(specification, "check_datasets", lambda _: None)(datasets)
    captions = _Captions(datasets)
    with _processes() as processes:
        manifest = _agree_on_manifest(
            store,
            Manifest(
                rows=sum(len(index) for index, _ in datasets),
                variants=variants or 0,
                captions=len(captions),
                empty_caption=captions.number(""),
                shard_size=shard_size or 0,
                fingerprint=run_fingerprint(args, specification, datasets),
            ),
        )
        missing: list[Shard] = []
        if processes.rank == 0:
            write_run_files(recipe, store)
            manifest.write(store)
            remove_partial_files(store)
            missing = manifest.missing(store)
        missing = processes.share(missing)
        work = _Work(args, specification, datasets, captions, store, processes, manifest)
        work.write_captions([shard for shard in missing if not shard.is_clips])
        work.write_clips([shard for shard in missing if shard.is_clips])
        processes.wait()
        if processes.rank == 0:
            _report(store, manifest, len(missing))
