"""Rules for a recipe's data and validation samples: what can be told without decoding a video."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.facts import ClipRule
from framebridge_plugin.data.class_folders import class_names
from framebridge_plugin.data.layouts import find_clips
from framebridge_plugin.data.tables import (
    OPTIONAL_WEBVID_COLUMNS,
    WEBVID_COLUMNS,
    TextError,
    csv_files,
    read_json,
    read_table,
)
from framebridge_plugin.data.ucf101_classes import read_split, split_list
from framebridge_plugin.data.validation_rows import VALIDATION_SUFFIXES, read_validation_rows
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import is_web_address, local_path, why_no_file, writing_problem
from framebridge_plugin.media import read_image
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.schema import Recipe
from framebridge_plugin.settings.data import BadFilesSection, SourceSection, dataset_entries
from framebridge_plugin.settings.sampling import most_steps

_SIZES = ("num_frames", "height", "width")


def data_problems(recipe: Recipe, rule: ClipRule) -> Iterator[Problem]:
    """Check where the clips come from and their shape."""
    data, dataset_config = recipe.framebridge.data, recipe.dataset.dataset_config
    if data is None and dataset_config is None:
        yield Problem("framebridge.data", "the recipe names no data: give framebridge.data, or dataset.dataset_config")
    elif data is not None and dataset_config is not None:
        yield Problem("dataset.dataset_config", "the data is named twice: remove this, or framebridge.data")
    if data is not None:
        for name, message in data.conflicts():
            yield Problem(f"framebridge.data.{name}".rstrip("."), message)
        yield from _file_problems("framebridge.data", data)
        for name, message in rule.problems(data.num_frames, data.height, data.width):
            yield Problem(f"framebridge.data.{name}", message)
    if dataset_config is not None:
        yield from _dataset_json_problems(dataset_config, rule, recipe.framebridge.bad_files)
    yield from _bad_files_problems(recipe)


def _bad_files_problems(recipe: Recipe) -> Iterator[Problem]:
    section, bad_files = "framebridge.bad_files", recipe.framebridge.bad_files
    for name, message in bad_files.conflicts():
        yield Problem(f"{section}.{name}", message)
    if bad_files.policy == "quarantine" and bad_files.quarantine_file is not None:
        file = Path(bad_files.quarantine_file)
        if problem := f"{file} is no file" if file.exists() and not file.is_file() else writing_problem(file.parent):
            yield Problem(f"{section}.quarantine_file", problem, on_disk=True)
    if bad_files.policy == "raise":
        for name in ("max_share", "max_in_a_row"):
            if getattr(bad_files, name) != type(bad_files).model_fields[name].default:
                yield Problem(f"{section}.{name}", "has no effect with policy raise: remove it")


def _dataset_json_problems(dataset_config: str, rule: ClipRule, bad_files: BadFilesSection) -> Iterator[Problem]:
    where = "dataset.dataset_config"
    try:
        content = read_json(Path(dataset_config))
    except ValueError as error:
        yield Problem(where, str(error), on_disk=True)
        return
    try:
        entries = dataset_entries(content, dataset_config)
    except UsageError as error:
        yield Problem(where, str(error))
        return
    if "bad_files" in content and bad_files != BadFilesSection():
        yield Problem("framebridge.bad_files", f"{dataset_config} has bad_files of its own: remove one of the two")
    for shape in {(entry.num_frames, entry.height, entry.width): None for entry in entries}:
        for name, message in rule.problems(*shape):
            yield Problem(where, f"{name} in {list(shape)}: {message}")


def _file_problems(section: str, data: SourceSection) -> Iterator[Problem]:
    for name in sorted({*data.source} - {"csv"}):
        if name == "data_root" and local_path(data.data_root or "") is None:
            continue  # on the hub: found, or not, when the data is read
        folder = Path(getattr(data, name))
        if not folder.is_dir():
            yield Problem(f"{section}.{name}", f"no such folder: {folder}", on_disk=True)
        elif next(os.scandir(folder), None) is None:
            yield Problem(f"{section}.{name}", f"{folder} is empty", on_disk=True)
    if data.csv is not None:
        try:
            problems = [problem for table in csv_files(data.csv) if (problem := _file_problem(table))]
        except FrameBridgeError as error:
            problems = [str(error)]
        for problem in problems:
            yield Problem(f"{section}.csv", problem, on_disk=True)


def content_problems(recipe: Recipe) -> Iterator[Problem]:
    """Check the lists, tables and captions of the data that is there, with the reader that a run has."""
    data, config = recipe.framebridge.data, str(recipe.dataset.dataset_config)
    if data is not None:
        yield from _text_problems(f"framebridge.data.{data.source[0]}", data)
    else:
        for entry in dataset_entries(read_json(Path(config)), config):
            yield from _text_problems("dataset.dataset_config", entry)


def _text_problems(where: str, source: SourceSection) -> Iterator[Problem]:
    try:
        if source.csv is not None:
            for table in csv_files(source.csv):
                for _ in islice(read_table(table, WEBVID_COLUMNS, OPTIONAL_WEBVID_COLUMNS), _CHECKED_BLOCKS):
                    pass
        elif source.class_root is not None:
            root = Path(source.class_root).absolute()
            class_names(root)
            if source.split != "all":
                read_split(split_list(root, source.split, source.fold, source.splits_dir))
        elif (root := Path(str(source.data_root))).is_dir():
            find_clips(root)
    except FrameBridgeError as error:
        yield Problem(where, str(error), on_disk=not isinstance(error, TextError | UsageError))


_CHECKED_BLOCKS = 16
"""Of each table, a quarter of a million rows, which takes a second; the others are read when the index is built."""


def heldout_problems(recipe: Recipe) -> Iterator[Problem]:
    """Check where the held-out clips come from."""
    where, heldout, source = "validation.heldout", recipe.validation.heldout, recipe.heldout_source
    if heldout is None:
        return
    problems = [Problem(f"{where}.{name}".rstrip("."), message) for name, message in heldout.conflicts()]
    if source is None and not problems:
        what = "names no clips, and the data is no half of a fold, whose other half could be taken"
        problems.append(Problem(where, f"{what}: give data_root, class_root or csv, or set framebridge.data.split"))
    elif source is heldout and not problems:
        problems += _file_problems(where, heldout)
    yield from problems
    if source is not None and not problems and (source is heldout or Path(str(source.class_root)).is_dir()):
        yield from _text_problems(where, source)


def validation_problems(
    recipe: Recipe, rule: ClipRule, caption_problem: Callable[[str], str | None]
) -> Iterator[Problem]:
    """Check the file of samples to validate with, and the pictures that it names."""
    if recipe.validation.validation_dataset_file is None:
        return
    where, path = "validation.validation_dataset_file", Path(recipe.validation.validation_dataset_file)
    if path.suffix.lower() not in VALIDATION_SUFFIXES:
        yield Problem(where, f"should end in {', '.join(VALIDATION_SUFFIXES)}")
        return
    if problem := _file_problem(path):
        yield Problem(where, problem, on_disk=True)
        return
    try:
        rows = read_validation_rows(path)
    except FrameBridgeError as error:
        yield Problem(where, str(error))
        return
    if not rows:
        yield Problem(where, f"{path} has no rows")
    for number, row in enumerate(rows, start=1):
        for message in _row_problems(row, rule, caption_problem):
            yield Problem(where, f"{path}: row {number}: {message}")
        for message in _row_file_problems(row):
            yield Problem(where, f"{path}: row {number}: {message}", on_disk=True)


def _row_problems(
    row: Mapping[str, Any], rule: ClipRule, caption_problem: Callable[[str], str | None]
) -> Iterator[str]:
    if row.get("caption") in (None, "") or not (row.get("image_path") or row.get("video_path")):
        yield "lacks caption, or image_path (or video_path)"
    elif not isinstance(row["caption"], str):
        yield f"caption should be text, not {row['caption']!r}: put it in quotes"
    elif problem := caption_problem(row["caption"]):
        yield f"caption: {problem}"
    sizes = {}
    for name in (*_SIZES, "num_inference_steps", "export_fps"):
        value, most = row.get(name), most_steps("trailing") if name == "num_inference_steps" else math.inf
        if value is not None and not (type(value) is int and 1 <= value <= most):
            wanted = "1 or more" if most == math.inf else f"1 to {most}"
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
        path = str(row.get(name) or "")
        if not path or is_web_address(path):
            continue
        if (name == "video_path" or not Path(path).exists()) and (reason := why_no_file(Path(path))):
            yield f"{name}: {reason}: {path}"
        elif name == "image_path":
            try:
                read_image(path)
            except UsageError as error:
                yield f"image_path: {error}"


def _file_problem(path: Path) -> str | None:
    if reason := why_no_file(path):
        return f"{reason}: {path}"
    return f"{path} is empty" if path.stat().st_size == 0 else None
