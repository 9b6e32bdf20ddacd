"""Rules of a recipe that concern several fields, the disk, or the processes that were started."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from framebridge_plugin.folder_checks import (
    ClipShapeRule,
    clip_shape_rule,
    folder_problem,
    local_path,
    part_problem,
    read_json,
)
from framebridge_plugin.recipe_schema import DataSection, Recipe

Problem = tuple[str, str]
"""A dotted path, and what is wrong there and what to do about it."""

VALIDATION_SUFFIXES = (".csv", ".json", ".parquet", ".arrow")


def recipe_problems(recipe: Recipe) -> Iterator[Problem]:
    """Check everything that does not depend on how the command was launched.

    Args:
        recipe: A recipe whose single values are right.

    Yields:
        Dotted path and message of each problem.
    """
    yield from _objective_problems(recipe)
    yield from _training_problems(recipe)
    yield from _parallelism_problems(recipe)
    yield from _model_problems(recipe)
    yield from _data_problems(recipe)
    yield from _output_problems(recipe)
    yield from _validation_problems(recipe)


def launch_problems(recipe: Recipe, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Check the recipe against the number of processes that were started.

    Args:
        recipe: A recipe whose single values are right.
        environment: Environment variables; torchrun sets WORLD_SIZE.

    Yields:
        Dotted path and message of each problem.
    """
    try:
        world_size = int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        world_size = 0
    if world_size < 1:
        yield "parallelism", f"WORLD_SIZE should be a positive number, not {environment['WORLD_SIZE']!r}: use torchrun"
        return
    parallelism = recipe.parallelism
    wanted = parallelism.dp_degree * parallelism.dp_shards
    if parallelism.parallel_backend == "accelerate" and world_size > 1:
        yield "parallelism.parallel_backend", _ACCELERATE.format(processes=world_size)
    elif wanted != world_size:
        yield (
            "parallelism.dp_degree",
            f"dp_degree x dp_shards is {wanted}, but the number of processes is {world_size}: launch with `torchrun "
            f"--nproc-per-node {wanted} --no-python finetrainers ...`, or set parallelism.dp_degree={world_size}",
        )


_ACCELERATE = (
    "accelerate does not synchronise gradients in finetrainers 0.2.0, so {processes} processes would train "
    "{processes} different models: use parallel_backend=ptd"
)


def _objective_problems(recipe: Recipe) -> Iterator[Problem]:
    ours = recipe.framebridge
    if ours.objective == "diffusion" and ours.target != "v":
        yield "framebridge.target", f"objective diffusion predicts v, not {ours.target}"
    if ours.beta_min == ours.beta_max == 0:
        yield "framebridge.beta_max", "should be above 0 when beta_min is 0: there would be no noise at all"


def _training_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.training.training_type == "full-finetune":
        for name in sorted(recipe.lora.model_fields_set):
            yield f"lora.{name}", "has no effect with training_type full-finetune: remove it, or override lora=null"
        if recipe.precision.layerwise_upcasting_modules:
            path = "precision.layerwise_upcasting_modules"
            yield path, "weights stored in fp8 cannot be trained: set training.training_type=lora, or []"
    optimization = recipe.optimization
    if optimization.lr_scheduler == "constant" and optimization.lr_warmup_steps:
        yield (
            "optimization.lr_warmup_steps",
            "constant has no warm-up: set lr_scheduler=constant_with_warmup, or 0 here",
        )
    if recipe.precision.allow_tf32 and recipe.precision.float32_matmul_precision == "highest":
        yield "precision.allow_tf32", "float32_matmul_precision=highest switches TF32 off again: set it to high"
    if recipe.dataset.precomputation_once and not recipe.dataset.enable_precomputation:
        yield "dataset.precomputation_once", "needs dataset.enable_precomputation=true"
    modules, scopes = recipe.compile.compile_modules, recipe.compile.compile_scopes
    if scopes is not None and not (modules and len(scopes) in (1, len(modules))):
        yield (
            "compile.compile_scopes",
            f"{len(scopes)} scope(s) for {len(modules)} compile_modules: give one each",
        )


def _parallelism_problems(recipe: Recipe) -> Iterator[Problem]:
    parallelism = recipe.parallelism
    processes = parallelism.dp_degree * parallelism.dp_shards
    if parallelism.parallel_backend == "accelerate" and processes > 1:
        yield "parallelism.parallel_backend", _ACCELERATE.format(processes=processes)
    for name in ("pp_degree", "cp_degree", "tp_degree"):
        if getattr(parallelism, name) > 1:
            yield f"parallelism.{name}", "only 1 is supported: share the work by dp_degree and dp_shards"
    if recipe.validation.enable_model_cpu_offload and processes > 1:
        yield "validation.enable_model_cpu_offload", "works with one process only"


def _model_problems(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    path = local_path(model.pretrained_model_name_or_path)
    if path is not None and (problem := folder_problem(path)) is not None:
        yield "model.pretrained_model_name_or_path", problem
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        replacement = getattr(model, f"{part}_id")
        path = None if replacement is None else local_path(replacement)
        if path is not None and (problem := part_problem(path, part)) is not None:
            yield f"model.{part}_id", problem


def _part_folder(recipe: Recipe, part: str) -> Path | None:
    replacement = getattr(recipe.model, f"{part}_id")
    if replacement is not None:
        return local_path(replacement)
    path = local_path(recipe.model.pretrained_model_name_or_path)
    return None if path is None else path / part


def _data_problems(recipe: Recipe) -> Iterator[Problem]:
    data, dataset_config = recipe.framebridge.data, recipe.dataset.dataset_config
    rule = clip_shape_rule(_part_folder(recipe, "vae"), _part_folder(recipe, "transformer"))
    if data is None and dataset_config is None:
        yield "framebridge.data", "the recipe names no data: give framebridge.data, or dataset.dataset_config"
    elif data is not None and dataset_config is not None:
        yield "dataset.dataset_config", "the data is named twice: remove this, or framebridge.data"
    if data is not None:
        yield from _source_problems(data)
        for name, message in rule.problems(data.num_frames, data.height, data.width):
            yield f"framebridge.data.{name}", message
    if dataset_config is not None:
        yield from (("dataset.dataset_config", message) for message in _dataset_json_problems(dataset_config, rule))


def _dataset_json_problems(dataset_config: str, rule: ClipShapeRule) -> Iterator[str]:
    """Check the shapes of the clips; the other keys are checked by the reader of the data."""
    try:
        entries = read_json(Path(dataset_config)).get("datasets")
    except ValueError as error:
        yield str(error)
        return
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        yield f"{dataset_config} should hold a list 'datasets' with one entry per data set"
        return
    for bucket in (bucket for entry in entries for bucket in entry.get("video_resolution_buckets") or []):
        if isinstance(bucket, list) and len(bucket) == 3 and all(type(size) is int for size in bucket):
            yield from (f"{name} in {bucket}: {message}" for name, message in rule.problems(*bucket))


def _source_problems(data: DataSection) -> Iterator[Problem]:
    section = "framebridge.data"
    given = {name for name in ("data_root", "csv", "video_root") if getattr(data, name) is not None}
    if given not in ({"data_root"}, {"csv", "video_root"}):
        found = " and ".join(sorted(given)) or "neither"
        yield section, f"give either data_root, or csv with video_root, not {found}"
    for name in sorted(given - {"csv"}):
        folder = Path(getattr(data, name))
        if not folder.is_dir():
            yield f"{section}.{name}", f"no such folder: {folder}"
        elif next(os.scandir(folder), None) is None:
            yield f"{section}.{name}", f"{folder} is empty"
    if data.csv is not None:
        table = Path(data.csv)
        problem = _file_problem(table) or _columns_problem(table, {"videoid", "name"})
        if problem is not None:
            yield f"{section}.csv", problem


def _output_problems(recipe: Recipe) -> Iterator[Problem]:
    output_dir = Path(recipe.checkpoints.output_dir).absolute()
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not existing.is_dir():
        yield "checkpoints.output_dir", f"{existing} is a file: name another folder"
    elif not os.access(existing, os.W_OK):
        yield "checkpoints.output_dir", f"{existing} is not writable: name another folder"


def _validation_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.validation.validation_dataset_file is None:
        return
    path = Path(recipe.validation.validation_dataset_file)
    if path.suffix not in VALIDATION_SUFFIXES:
        problem: str | None = f"should end in {', '.join(VALIDATION_SUFFIXES)}"
    else:
        problem = _file_problem(path) or _rows_problem(path)
    if problem is not None:
        yield "validation.validation_dataset_file", problem


def _rows_problem(path: Path) -> str | None:
    """Look for the images of a validation file; what is neither CSV nor JSON is left to its reader."""
    try:
        rows = _read_rows(path)
    except (ValueError, csv.Error) as error:
        return f"{path} cannot be read ({error})"
    for number, row in enumerate(rows or (), start=1):
        source = row.get("image_path") or row.get("video_path")
        if not row.get("caption") or not source:
            return f"{path}: row {number} lacks caption, or image_path (or video_path)"
        if not str(source).startswith("http") and not Path(source).is_file():
            return f"{path}: row {number} names {source}, which does not exist"
    return f"{path} has no rows" if rows == [] else None


def _read_rows(path: Path) -> list[dict[str, Any]] | None:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".json":
        rows = read_json(path).get("data")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it should hold a list 'data' of objects")
        return rows
    return None


def _file_problem(path: Path) -> str | None:
    if not path.is_file():
        return f"no such file: {path}"
    return f"{path} is empty" if path.stat().st_size == 0 else None


def _columns_problem(path: Path, columns: set[str]) -> str | None:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return f"{path} is not a readable CSV file ({error})"
    missing = columns - set(header)
    return f"{path} has no column {' and '.join(sorted(missing))}, only {', '.join(header)[:200]}" if missing else None
