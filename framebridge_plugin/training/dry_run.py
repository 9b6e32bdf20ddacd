"""What a start would say, short of loading weights: `finetrainers train --dry-run` where the files are there."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig

from framebridge_plugin.data import ClipStream
from framebridge_plugin.data.bad_files import BadFilePolicy, bad_file_policy, describe, files_to_skip
from framebridge_plugin.data.folders import common_clip_shape, index_datasets
from framebridge_plugin.errors import FrameBridgeError, say
from framebridge_plugin.files import NotFetchedError, without_network
from framebridge_plugin.processes import is_first
from framebridge_plugin.recipe import Recipe
from framebridge_plugin.training.finetrainers.registration import add_lora_layers, recipe_arguments, register
from framebridge_plugin.training.precomputation.fingerprint import run_fingerprint
from framebridge_plugin.training.precomputation.store import LatentStore, read_manifest
from framebridge_plugin.training.resume_settings import run_settings
from framebridge_plugin.training.run import build_specification, pin_downloads, refuse_start
from framebridge_plugin.training.run_identity import check_run
from framebridge_plugin.training.starting import start_layers
from framebridge_plugin.training.validation import check_heldout, check_samples


def check_start(recipe: Recipe, allowed: Collection[str] = (), processes: int = 1) -> None:
    """Goes through a start of the recipe up to where weights would be loaded; writes nothing in the run's folder.

    Args:
        recipe: A checked recipe.
        allowed: Groups of settings in which it may differ from the checkpoint that it would go on from.
        processes: How many are to be started.

    Raises:
        FrameBridgeError: What the start would raise.
    """
    refuse_start(recipe)
    register()  # before finetrainers is imported
    pin_downloads(recipe)
    with without_network():
        _check(recipe, allowed, processes)


def _check(recipe: Recipe, allowed: Collection[str], processes: int) -> None:
    from framebridge_plugin.training.refusals import refuse_unsupported
    from framebridge_plugin.training.stored_checkpoints import check_settings, find_checkpoints, stored_settings

    args: Any = None
    specification: Any = None
    datasets: Any = None
    content = recipe.dataset_config()
    with _if_here("the data"):
        datasets = index_datasets(content, "the recipe's data")
        clip_shape = common_clip_shape(datasets)
    with _if_here("the model"):
        args = recipe_arguments(recipe, "", processes)  # no file: nothing here reads one
        refuse_unsupported(args)
        specification = build_specification(recipe, args)
        specification.load_scheduler()
    if datasets is not None and args is not None:
        _check_first_clip(args, datasets, bad_file_policy(content, "the recipe's data"))
    if specification is None:
        return
    specification.clip_shape = clip_shape if datasets is not None else specification.clip_shape
    with _if_here("the LoRA layers"):
        _check_lora(args, specification)
    if datasets is None:
        return
    with _if_here("the validation samples"):
        check_samples(args, specification, datasets)
    with _if_here("the held-out clips"):
        check_heldout(content, specification, datasets)
    with _if_here("the stored latents, and what a resume may not change"):
        if args.precomputed is not None:
            LatentStore(args.precomputed, run_fingerprint(args, specification, datasets))
        settings = run_settings(args, specification, datasets)
        allowed = check_run(Path(args.output_dir), settings, allowed)
        for checkpoint in find_checkpoints(Path(args.output_dir, "checkpoints"), args.resume_from_checkpoint)[:1]:
            check_settings(checkpoint, stored_settings(checkpoint), settings, allowed)


@contextlib.contextmanager
def _if_here(what: str) -> Iterator[None]:
    try:
        yield
    except NotFetchedError as error:
        if is_first():
            say(f"not checked: {what}, and what depends on it: {error}; a dry run takes nothing from the network")


def _check_first_clip(args: Any, datasets: Any, policy: BadFilePolicy) -> None:
    """Reads what the run would read first."""
    skipped = files_to_skip(policy.quarantine_file)
    if args.precomputed is not None and (store := read_manifest(Path(args.precomputed))) and "latents" in store.holds:
        return
    stream = ClipStream(datasets, args.seed, max_attempts=policy.max_attempts, files_to_skip=skipped)
    sample = stream.sample(0)
    if not len(sample["video"]):
        bad_files = [f"  {describe(entry)}" for entry in sample["skipped"][:5]]
        raise FrameBridgeError("no clip can be read where the run would begin", *bad_files)


def _check_lora(args: Any, specification: Any) -> None:
    if args.training_type != "lora":
        return
    config = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=args.target_modules)
    network = specification.adapter.blank_network()
    add_lora_layers(specification, network, config)
    start_layers(args, specification, network)
