"""What `finetrainers evaluate` was asked for, checked as far as that goes without loading the model."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.folders import place_problem
from framebridge_plugin.commands.model_request import ModelRequest, file_of_run
from framebridge_plugin.data.clips import ClipSettings
from framebridge_plugin.data.folders import ClipIndex, index_datasets
from framebridge_plugin.data.listing import is_video
from framebridge_plugin.data.validation_rows import read_validation_rows
from framebridge_plugin.errors import FrameBridgeError, UsageError, say
from framebridge_plugin.evaluation.requirements import detector_problem, network_problem
from framebridge_plugin.files import local_path, writing_problem
from framebridge_plugin.processes import STORE, is_first
from framebridge_plugin.recipe import load_recipe
from framebridge_plugin.settings.data import dataset_entries
from framebridge_plugin.settings.sampling import EvaluateSection

_DATA = ("framebridge.data", "dataset.dataset_config")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_CLIP = ("num_frames", "height", "width")


class Preset(NamedTuple):
    """What `--preset` sets, where the command line does not: options, and overrides of the recipe."""

    options: Mapping[str, Any]
    overrides: tuple[str, ...]


PRESETS = {
    "ucf101": Preset(
        {"count": 2048, "fvd_frames": 16},
        (*(f"framebridge.data.{name}" for name in ("num_frames=16", "height=256", "width=256", "window=random")),),
    ),
    "msrvtt": Preset(
        {"count": 2048, "fvd_frames": 16},
        (*(f"framebridge.data.{name}" for name in ("height=256", "width=256", "window=random")),),
    ),
}
"""FVD as StyleGAN-V and Latte compute it on UCF-101, and as zero-shot models are compared on MSR-VTT."""


class EvaluateRequest(EvaluateSection, ModelRequest):
    """One call of `finetrainers evaluate`; every error is a line of one `UsageError`.

    Its `output` is a folder; frames, height and width are those of the clips.
    """

    also: tuple[str, ...] = ()
    """Trained networks, of `NETWORKS`, that look at the videos, too."""
    vbench: Path | None = None
    """A folder for the videos by the names that VBench-I2V wants."""

    @property
    def conditions_come_with_images(self) -> bool:
        """Those of clips do."""
        return True

    def _input_problems(self) -> list[str]:
        given = {"prompt": self.prompts, "class-name": self.class_names, "label": self.labels}
        problems = [f"--{name}: clips have their own; leave it out" for name, values in given.items() if values]
        if self.num_videos > 1:
            problems.append("--num-videos: is for --images; leave it out")
        if (self.fvd_frames or 0) > (self.num_frames or 0):
            problems.append(f"--fvd-frames {self.fvd_frames}: the clips have {self.num_frames} frames; take no more")
        return problems

    def _file_problems(self) -> list[str]:
        folders = {"output": self.output, "vbench": self.vbench}
        problems = [
            f"--{name} {folder}: {problem}"
            for name, folder in folders.items()
            if folder is not None and (problem := writing_problem(folder))
        ]
        if self.fvd_features is not None and (path := local_path(self.fvd_features)) is not None:
            problems += filter(None, [detector_problem(path, self.fvd_sha256)])
        return [*problems, *filter(None, map(network_problem, self.also))]

    @classmethod
    def _option(cls, name: str) -> str:
        return f"framebridge.data.{name}" if name in _CLIP else super()._option(name)


class ImagesRequest(EvaluateRequest):
    """An evaluation of images alone: pictures, videos whose first frame is taken, folders and tables of them."""

    singular: ClassVar[dict[str, str]] = {"prompts": "prompt", "class_names": "class-name", "labels": "label"}

    images: tuple[Path, ...]

    @functools.cached_property
    def pairs(self) -> list[tuple[Path, Any]]:
        """File and condition of each image; a `UsageError` where there are none, or no condition for one."""
        found: list[tuple[Path, Any]] = []
        for path in self.images:
            if path.is_dir():
                names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
                taken = [name for name in names if name.lower().endswith(_PICTURES) or is_video(name)]
                if not taken:
                    raise UsageError(f"--images {path}: no pictures or videos are in it")
                found += [(path / name, None) for name in taken]
            elif path.suffix.lower() == ".csv":
                rows = read_validation_rows(path)
                files = [row.get("image_path") or row.get("video_path") for row in rows]
                if None in files:
                    raise UsageError(f"--images {path}: each row needs image_path or video_path, and caption")
                found += [(Path(str(file)), row.get("caption")) for file, row in zip(files, rows, strict=True)]
            else:
                found.append((path, None))
        if missing := next((path for path, _ in found if not path.is_file()), None):
            raise UsageError(f"--images {missing}: no such file")
        given: Sequence[Any] = self.prompts or self.class_names or self.labels
        if given and len(given) not in (1, len(found)):
            raise UsageError(
                f"--images: {len(given)} conditions for {len(found)} images; give one for all, or for each"
            )
        if self.count is not None and self.count > len(found):
            raise UsageError(f"--count {self.count}: there are {len(found)} images; take no more")
        if given:
            found = [(path, given[row if len(given) > 1 else 0]) for row, (path, _) in enumerate(found)]
        return found[: self.count]

    @property
    def conditions_come_with_images(self) -> bool:
        """Those of tables do."""
        return all(condition is not None for _, condition in self.pairs)

    def _input_problems(self) -> list[str]:
        compares = {"also": self.also, "fvd-features": self.fvd_features}
        problems = [
            f"--{name}: needs true clips, which images alone are not" for name in filter(compares.get, compares)
        ]
        return problems + (["--clip-seed: is for clips; leave it out"] if self.clip_seed else [])

    def _condition_problems(self, saved: SavedModel) -> list[str]:
        problems = super()._condition_problems(saved)
        if saved.known_classes is not None and not problems:
            found = dict.fromkeys(str(condition) for _, condition in self.pairs)
            problems = [f"--images: {problem}" for name in found if (problem := saved.known_classes.problem(name))]
        return problems

    @classmethod
    def _option(cls, name: str) -> str:
        return super(EvaluateRequest, cls)._option(name)


def read_request(given: Mapping[str, Any]) -> tuple[EvaluateRequest, dict[str, Any] | None]:
    """The request of a command line, and the content of the dataset file of its clips, None for images alone."""
    own = {name: value for name, value in given.items() if name in ImagesRequest.model_fields}
    recipe, overrides = given["recipe"], [*given["overrides"]]
    if (preset := PRESETS.get(given["preset"])) is not None:
        own |= {name: value for name, value in preset.options.items() if own.get(name) is None}
        overrides = [*preset.overrides, *overrides]
        said = [f"--{name.replace('_', '-')} {value}" for name, value in preset.options.items()]
        _say_once(
            f"preset {given['preset']}: {' '.join([*said, *preset.overrides])}; what is given here goes before it"
        )
        if own.get("fvd_features") is None or own.get("images"):
            raise UsageError(f"--preset {given['preset']}: is for FVD of clips; give --fvd-features, and no --images")
    if own.get("images"):
        if recipe is not None or overrides:
            raise UsageError("--images: the images alone are evaluated; leave --recipe and overrides out")
        try:
            return ImagesRequest(**own), None
        except FrameBridgeError as error:
            raise UsageError(*error.args) from error
    own.pop("images", None)
    for name in _CLIP:
        if own.pop(name, None) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: of clips it is framebridge.data.{name}=...; give that")
    content = _load_clip_data(given["model"], recipe, overrides)
    shapes = {(e.num_frames, e.height, e.width) for e in dataset_entries(content, "the recipe's data")}
    if len(shapes) > 1:
        raise UsageError(f"the data sets have clips of several shapes {sorted(shapes)}; evaluate them one by one")
    shape: dict[str, Any] = dict(zip(_CLIP, shapes.pop(), strict=True))
    if shape["num_frames"] < 2:
        raise UsageError("framebridge.data.num_frames: videos of one frame do not move; take two frames or more")
    return EvaluateRequest(**own, **shape), content


def clips_trained_on(model: str) -> list[tuple[ClipIndex, ClipSettings]] | None:
    """What the run that a model belongs to was trained on, by its recipe; None where that is not to be seen here."""
    if (path := file_of_run(model, "recipe.yaml")) is None:
        return None
    try:
        return index_datasets(_load_content(path, ()), str(path))
    except FrameBridgeError:
        return None


def _load_clip_data(model: str, recipe: str | None, overrides: list[str]) -> dict[str, Any]:
    """The content of the dataset file that a recipe, or that of the model's run, stands for; no clip is mirrored."""
    folder, path = local_path(model), recipe or file_of_run(model, "recipe.yaml")
    if folder is not None and not folder.exists():
        raise UsageError(f"--model {place_problem(folder)}")
    if path is None:
        raise UsageError(
            f"--model {model} is not in the folder of a run with a recipe.yaml; say by --recipe where the clips are"
        )
    content = _load_content(path, overrides)
    entries = [
        {name: value for name, value in entry.items() if name != "horizontal_flip"} for entry in content["datasets"]
    ]
    return content | {"datasets": entries}


def _say_once(line: str) -> None:
    """Says it in one process of a command, be it the one that starts the others."""
    if is_first() and STORE not in os.environ:
        say(line)


def _load_content(recipe: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The content of the dataset file that a recipe stands for, in which nothing need be held out."""
    overrides = [*overrides, "validation.heldout=null"]
    return load_recipe(recipe, overrides, needed=lambda where: where.startswith(_DATA)).dataset_config()
