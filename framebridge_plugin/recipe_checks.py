"""Rules of a recipe that concern several fields, the disk, or the processes that were started."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from framebridge_plugin.errors import UsageError
from framebridge_plugin.folder_checks import (
    ClipShapeRule,
    clip_shape_rule,
    folder_problem,
    local_path,
    part_problem,
    read_json,
    writing_problem,
)
from framebridge_plugin.media import read_image
from framebridge_plugin.recipe_schema import DataSection, DiffusionSection, Recipe


class Problem(NamedTuple):
    """Something that keeps a recipe from being run.

    Attributes:
        where: A dotted path.
        message: What is wrong there, and what to do about it.
        on_disk: Whether the recipe itself is fine, and a file or folder is not there as it says.
    """

    where: str
    message: str
    on_disk: bool = False


VALIDATION_SUFFIXES = (".csv", ".json", ".parquet", ".arrow")
_SIZES = ("num_frames", "height", "width")

# What a user would expect to change the run, and does not.
_WITHOUT_EFFECT = {
    "model.variant": "finetrainers 0.2.0 reads the plain weight files only, and precision.* sets the number formats",
    "model.tokenizer_2_id": "CogVideoX has one tokenizer",
    "model.tokenizer_3_id": "CogVideoX has one tokenizer",
    "model.text_encoder_2_id": "CogVideoX has one text encoder",
    "model.text_encoder_3_id": "CogVideoX has one text encoder",
    "optimization.beta3": "no optimiser of finetrainers 0.2.0 has a third moment",
} | {
    f"diffusion.{name}": "neither the bridge nor the diffusion baseline is trained by flow matching"
    for name in DiffusionSection.model_fields
}

# Attention providers by the beginning of their names.
_PROVIDER_PACKAGES = {
    "flash": ("flash_attn", "flash-attn"),
    "xformers": ("xformers", "xformers"),
    "sage": ("sageattention", "sageattention"),
    "_sage": ("sageattention", "sageattention"),
}


def recipe_problems(recipe: Recipe) -> Iterator[Problem]:
    """Check everything that does not depend on how the command was launched.

    Args:
        recipe: A recipe whose single values are right.

    Yields:
        Each problem.
    """
    rule = clip_shape_rule(_part_folder(recipe, "vae"), _part_folder(recipe, "transformer"))
    yield from _no_effect_problems(recipe)
    yield from _objective_problems(recipe)
    yield from _training_problems(recipe)
    yield from _parallelism_problems(recipe)
    yield from _attention_problems(recipe)
    yield from _model_problems(recipe)
    yield from _data_problems(recipe, rule)
    yield from _validation_problems(recipe, rule)
    if problem := writing_problem(Path(recipe.checkpoints.output_dir)):
        yield Problem("checkpoints.output_dir", problem, on_disk=True)


def launch_problems(recipe: Recipe, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Check the recipe against the number of processes that were started.

    Args:
        recipe: A recipe whose single values are right.
        environment: Environment variables; torchrun sets WORLD_SIZE.

    Yields:
        Each problem.
    """
    try:
        world_size = int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        world_size = 0
    if world_size < 1:
        yield Problem(
            "parallelism", f"WORLD_SIZE should be a positive number, not {environment['WORLD_SIZE']!r}: use torchrun"
        )
        return
    parallelism = recipe.parallelism
    wanted = parallelism.dp_degree * parallelism.dp_shards
    if parallelism.parallel_backend == "accelerate" and world_size > 1:
        yield Problem("parallelism.parallel_backend", _ACCELERATE.format(processes=world_size))
    elif wanted != world_size:
        yield Problem(
            "parallelism.dp_degree",
            f"dp_degree x dp_shards is {wanted}, but the number of processes is {world_size}: launch with `torchrun "
            f"--nproc-per-node {wanted} --no-python finetrainers ...`, or set parallelism.dp_degree={world_size}",
        )


_ACCELERATE = (
    "accelerate does not synchronise gradients in finetrainers 0.2.0, so {processes} processes would train "
    "{processes} different models: use parallel_backend=ptd"
)


def _no_effect_problems(recipe: Recipe) -> Iterator[Problem]:
    for where, reason in _WITHOUT_EFFECT.items():
        section, _, name = where.partition(".")
        values = getattr(recipe, section)
        if getattr(values, name) != type(values).model_fields[name].default:
            yield Problem(where, f"has no effect: {reason}; remove it")


def _objective_problems(recipe: Recipe) -> Iterator[Problem]:
    ours = recipe.framebridge
    if ours.objective == "diffusion" and ours.target != "v":
        yield Problem("framebridge.target", f"objective diffusion predicts v, not {ours.target}")
    if ours.beta_min == ours.beta_max == 0:
        yield Problem("framebridge.beta_max", "should be above 0 when beta_min is 0: there would be no noise at all")


def _training_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.training.training_type == "full-finetune":
        for name in sorted(recipe.lora.model_fields_set):
            yield Problem(
                f"lora.{name}", "has no effect with training_type full-finetune: remove it, or override lora=null"
            )
        if recipe.precision.layerwise_upcasting_modules:
            path = "precision.layerwise_upcasting_modules"
            yield Problem(path, "weights stored in fp8 cannot be trained: set training.training_type=lora, or []")
    optimization = recipe.optimization
    if optimization.lr_scheduler == "constant" and optimization.lr_warmup_steps:
        yield Problem(
            "optimization.lr_warmup_steps",
            "constant has no warm-up: set lr_scheduler=constant_with_warmup, or 0 here",
        )
    if recipe.precision.allow_tf32 and recipe.precision.float32_matmul_precision == "highest":
        yield Problem(
            "precision.allow_tf32", "float32_matmul_precision=highest switches TF32 off again: set it to high"
        )
    if recipe.dataset.precomputation_once and not recipe.dataset.enable_precomputation:
        yield Problem("dataset.precomputation_once", "needs dataset.enable_precomputation=true")
    modules, scopes = recipe.compile.compile_modules, recipe.compile.compile_scopes
    if scopes is not None and not (modules and len(scopes) in (1, len(modules))):
        yield Problem(
            "compile.compile_scopes",
            f"{len(scopes)} scope(s) for {len(modules)} compile_modules: give one each",
        )


def _parallelism_problems(recipe: Recipe) -> Iterator[Problem]:
    parallelism = recipe.parallelism
    processes = parallelism.dp_degree * parallelism.dp_shards
    if parallelism.parallel_backend == "accelerate" and processes > 1:
        yield Problem("parallelism.parallel_backend", _ACCELERATE.format(processes=processes))
    for name in ("pp_degree", "cp_degree", "tp_degree"):
        if getattr(parallelism, name) > 1:
            yield Problem(f"parallelism.{name}", "only 1 is supported: share the work by dp_degree and dp_shards")
    if recipe.optimization.optimizer.endswith(("-bnb", "-8bit")) and parallelism.dp_shards > 1:
        yield Problem(
            "optimization.optimizer",
            f"{recipe.optimization.optimizer} does not work on sharded weights: take adamw, or dp_degree in place of "
            "dp_shards",
        )
    if recipe.validation.enable_model_cpu_offload and processes > 1:
        yield Problem("validation.enable_model_cpu_offload", "works with one process only")


def _attention_problems(recipe: Recipe) -> Iterator[Problem]:
    for name, values in recipe.attention:
        for value in values or ():
            component, _, provider = value.partition(":")
            package = next((p for start, p in _PROVIDER_PACKAGES.items() if provider.startswith(start)), None)
            if component == "vae":
                yield Problem(f"attention.{name}", f"{value}: CogVideoX's VAE has no attention; remove it")
            elif package is not None and importlib.util.find_spec(package[0]) is None:
                remedy = f"`pip install {package[1]}`, or take {component}:native"
                yield Problem(f"attention.{name}", f"{value} needs the package {package[1]}: {remedy}")


def _model_problems(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    path = local_path(model.pretrained_model_name_or_path)
    if path is not None and (problem := folder_problem(path)) is not None:
        yield Problem("model.pretrained_model_name_or_path", problem, on_disk=True)
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        replacement = getattr(model, f"{part}_id")
        path = None if replacement is None else local_path(replacement)
        if path is not None and (problem := part_problem(path, part)) is not None:
            yield Problem(f"model.{part}_id", problem, on_disk=True)


def _part_folder(recipe: Recipe, part: str) -> Path | None:
    replacement = getattr(recipe.model, f"{part}_id")
    if replacement is not None:
        return local_path(replacement)
    path = local_path(recipe.model.pretrained_model_name_or_path)
    return None if path is None else path / part


def _data_problems(recipe: Recipe, rule: ClipShapeRule) -> Iterator[Problem]:
    data, dataset_config = recipe.framebridge.data, recipe.dataset.dataset_config
    if data is None and dataset_config is None:
        yield Problem("framebridge.data", "the recipe names no data: give framebridge.data, or dataset.dataset_config")
    elif data is not None and dataset_config is not None:
        yield Problem("dataset.dataset_config", "the data is named twice: remove this, or framebridge.data")
    if data is not None:
        yield from _source_problems(data)
        for name, message in rule.problems(data.num_frames, data.height, data.width):
            yield Problem(f"framebridge.data.{name}", message)
    if dataset_config is not None:
        yield from _dataset_json_problems(dataset_config, rule)


def _dataset_json_problems(dataset_config: str, rule: ClipShapeRule) -> Iterator[Problem]:
    """Check the shapes of the clips; the other keys are checked by the reader of the data."""
    where = "dataset.dataset_config"
    try:
        entries = read_json(Path(dataset_config)).get("datasets")
    except ValueError as error:
        yield Problem(where, str(error), on_disk=True)
        return
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        yield Problem(where, f"{dataset_config} should hold a list 'datasets' with one entry per data set")
        return
    for bucket in (bucket for entry in entries for bucket in entry.get("video_resolution_buckets") or []):
        if isinstance(bucket, list) and len(bucket) == 3 and all(type(size) is int for size in bucket):
            for name, message in rule.problems(*bucket):
                yield Problem(where, f"{name} in {bucket}: {message}")


def _source_problems(data: DataSection) -> Iterator[Problem]:
    section = "framebridge.data"
    given = {name for name in ("data_root", "csv", "video_root") if getattr(data, name) is not None}
    if given not in ({"data_root"}, {"csv", "video_root"}):
        found = " and ".join(sorted(given)) or "neither"
        yield Problem(section, f"give either data_root, or csv with video_root, not {found}")
    for name in sorted(given - {"csv"}):
        folder = Path(getattr(data, name))
        if not folder.is_dir():
            yield Problem(f"{section}.{name}", f"no such folder: {folder}", on_disk=True)
        elif next(os.scandir(folder), None) is None:
            yield Problem(f"{section}.{name}", f"{folder} is empty", on_disk=True)
    if data.csv is not None:
        table = Path(data.csv)
        if problem := _file_problem(table):
            yield Problem(f"{section}.csv", problem, on_disk=True)
        elif problem := _columns_problem(table, {"videoid", "name"}):
            yield Problem(f"{section}.csv", problem)


def _validation_problems(recipe: Recipe, rule: ClipShapeRule) -> Iterator[Problem]:
    if recipe.validation.validation_dataset_file is None:
        return
    where, path = "validation.validation_dataset_file", Path(recipe.validation.validation_dataset_file)
    if path.suffix not in VALIDATION_SUFFIXES:
        yield Problem(where, f"should end in {', '.join(VALIDATION_SUFFIXES)}")
        return
    if problem := _file_problem(path):
        yield Problem(where, problem, on_disk=True)
        return
    try:
        rows = _read_rows(path)
    except (ValueError, csv.Error) as error:
        yield Problem(where, f"{path} cannot be read ({error})")
        return
    if not rows and rows is not None:
        yield Problem(where, f"{path} has no rows")
    for number, row in enumerate(rows or (), start=1):
        for message in _row_problems(row, rule):
            yield Problem(where, f"{path}: row {number}: {message}")
        for message in _row_file_problems(row):
            yield Problem(where, f"{path}: row {number}: {message}", on_disk=True)


def _read_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a validation file; None for what is neither CSV nor JSON, which is left to its reader."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: _typed(text) for name, text in row.items()} for row in csv.DictReader(file)]
    if path.suffix == ".json":
        rows = read_json(path).get("data")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it should hold a list 'data' of objects")
        return rows
    return None


def _typed(text: Any) -> Any:
    """What the text of a CSV file stands for, None for no text."""
    for number in (int, float):
        try:
            return number(text)
        except (TypeError, ValueError):
            pass
    return text or None


def _row_problems(row: Mapping[str, Any], rule: ClipShapeRule) -> Iterator[str]:
    if row.get("caption") in (None, "") or not (row.get("image_path") or row.get("video_path")):
        yield "lacks caption, or image_path (or video_path)"
    sizes = {}
    for name in (*_SIZES, "num_inference_steps", "export_fps"):
        value, largest = row.get(name), 1000 if name == "num_inference_steps" else math.inf
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            wanted = "1 to 1000" if largest == 1000 else "1 or more"
            yield f"{name} should be a whole number, {wanted}, not {value!r}"
        elif name in _SIZES:
            sizes[name] = value
    for name, message in rule.problems(*(sizes.get(name) for name in _SIZES)):
        yield f"{name}: {message}"
    scale = row.get("guidance_scale")
    if scale is not None and not (type(scale) in (int, float) and 0 <= scale < math.inf):
        yield f"guidance_scale should be a number of 0 or more, not {scale!r}"


def _row_file_problems(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("image_path", "video_path"):
        path = row.get(name)
        if path is None or str(path).startswith("http"):
            continue
        if not Path(str(path)).is_file():
            yield f"{name}: no such file: {path}"
        elif name == "image_path":
            try:
                read_image(str(path))
            except UsageError as error:
                yield f"image_path: {error}"


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
