"""What `finetrainers sample` was asked for, checked as far as that goes without loading a model."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.manifest import folder_problem
from framebridge_plugin.commands.sample_model import examine_model
from framebridge_plugin.data.listing import is_video
from framebridge_plugin.errors import UsageError, say
from framebridge_plugin.files import local_path, why_no_file, writing_problem
from framebridge_plugin.media import read_image
from framebridge_plugin.settings.sampling import SamplerSection, SampleSection

DATA_FILE = "dataset_config.json"


class SampleRequest(SampleSection):
    """One call of `finetrainers sample`; every error is a line of one `UsageError`."""

    model: str
    """A run's folder, a model's folder, or an id on the Hugging Face Hub."""
    output: Path
    """The mp4 to write; several videos take its name with a number."""
    images: tuple[Path, ...] = ()
    """Pictures, or videos whose first frame is taken; each is the first frame of its videos."""
    data_rows: tuple[int, ...] = ()
    """In place of `images`, rows of the run's data set, whose captions are the default conditions."""
    prompts: tuple[str, ...] = ()
    """For models of text, as for the others `class_names` or `labels`: one for all images, or one per image."""
    class_names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    transformer: str | None = None
    """Folder or id of a fine-tuned network, or of a model that holds one, to put into a `model` of text."""
    base: str | None = None
    """Where the model that a LoRA was trained on is now; None takes what the LoRA says."""
    allow_other_base: bool = False

    def __init__(self, **values: Any) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        problems = []
        try:
            super().__init__(**values)
        except ValidationError as failure:
            for error in failure.errors(include_url=False):
                name = str(error["loc"][0])
                values.pop(name, None)
                problems.append(f"{_option(name)} {error['input']}: {error['msg'].removeprefix('Input ')}")
            super().__init__(**values)  # for the other errors
        problems += [f"{_option(name)}: {message}" for name, message in self.conflicts()]
        problems += [*self._input_problems(), *self._file_problems(), *self._model_problems(*self._examined)]
        if problems:
            raise UsageError(*problems)

    @functools.cached_property
    def _examined(self) -> tuple[SavedModel | None, list[str]]:
        return examine_model(self.model, self.transformer, self.base, self.allow_other_base)

    @property
    def num_images(self) -> int:
        """Number of first frames."""
        return len(self.images) or len(self.data_rows)

    @property
    def saved(self) -> SavedModel | None:
        """The model; None for an id on the hub."""
        return self._examined[0]

    def condition_of(self, image: int) -> str | int | None:
        """The prompt, class or label of an image, by its position; None leaves it to the data set."""
        given = self.prompts or self.class_names or self.labels or (None,)
        return given[image if len(given) > 1 else 0]

    def sampler_settings(self, facts: BackboneFacts) -> dict[str, Any]:
        """The settings of the scheduler, with the defaults of a backbone."""
        given = self.model_dump(include=set(SamplerSection.model_fields))
        return given if "grid" in self.model_fields_set else given | {"grid": facts.sampling.get("grid", self.grid)}

    def video_paths(self) -> list[Path]:
        """Where the videos go, those of the first image first: `output`, or `name-0.mp4` and so on beside it."""
        count = self.num_images * self.num_videos
        if count == 1:
            return [self.output]
        digits = len(str(count - 1))
        return [self.output.with_name(f"{self.output.stem}-{i:0{digits}}.mp4") for i in range(count)]

    def contact_sheet_path(self) -> Path:
        """Where the contact sheet goes."""
        return self.output.with_suffix(".png")

    def data_file(self) -> Path | None:
        """The description of the data that a run wrote in the folder above its model; None without one."""
        path = local_path(self.model)
        if path is None:
            return None
        folder = path.absolute()
        # A run holds checkpoints/step_000100/model/.
        return next((path / DATA_FILE for path in (folder, *folder.parents[:3]) if (path / DATA_FILE).is_file()), None)

    def check_download(self, folder: Path) -> SavedModel:
        """Checks what could not be checked of an id on the hub, given the folder of its files."""
        saved, problems = examine_model(str(folder), self.transformer, self.base, self.allow_other_base)
        problems = self._model_problems(saved, problems)
        if saved is None or problems:
            raise UsageError(*problems)
        return saved

    def _model_problems(self, saved: SavedModel | None, problems: list[str]) -> list[str]:
        if saved is None:
            return problems
        if self.verify and not problems:
            if (problem := folder_problem(Path(saved), digests=True)) is not None:
                return [f"--verify: {problem}"]
            say(f"--verify: every file of {os.fspath(saved)} is as its manifest says")
        problems = [*problems, *self._condition_problems(saved)]
        found = saved.clip_rule.problems(self.num_frames, self.height, self.width)
        return problems + [f"--{option.replace('_', '-')}: {message}" for option, message in found]

    def _condition_problems(self, saved: SavedModel) -> list[str]:
        """Errors in what depends on the backbone: the conditions, and options that not all have."""
        facts, problems = saved.facts, []
        if facts.condition == "text":
            given = {"--class-name": self.class_names, "--label": self.labels}
            takes, remedy = "text, not classes", "--prompt"
            missing = "--prompt: give one for all images, or one for each"
        else:
            given = {"--prompt": self.prompts}
            takes, remedy = "classes, not text", "--class-name"
            missing = "--class-name: give one for all images, or one for each (or give their numbers by --label)"
            if self.use_dynamic_cfg:
                problems.append("--use-dynamic-cfg: is for models of text; leave it out")
        what = f"a {facts.title} model takes {takes}; give {remedy}"
        wrong = [f"{option}: {what}" for option, values in given.items() if values]
        options = ("steps", *SamplerSection.model_fields, "guidance_scale")
        sampled = [_option(name) for name in options if name in self.model_fields_set]
        if "scheduler" not in facts.parts and sampled:
            what = "this model gives its video in one call, without a sampler"
            problems.append(f"{', '.join(sampled)}: {what}; leave {'it' if len(sampled) == 1 else 'them'} out")
        if (classes := saved.known_classes) is not None:
            option = "--class-name" if self.class_names else "--label"
            for name in dict.fromkeys(map(str, self.class_names or self.labels)):
                if problem := classes.problem(name):
                    problems.append(f"{option} {name}: {problem}")
        if not wrong and not self.data_rows and self.condition_of(0) is None:
            problems.append(missing)
        return wrong + problems

    def _input_problems(self) -> list[str]:
        """Errors in the number of images and conditions."""
        checks = {
            "--image: give at least one, or rows of the run's data set by --data-index": self.num_images > 0,
            "--data-index: the images come from files or from the data set; leave it out, or --image": (
                not (self.images and self.data_rows)
            ),
            "--data-index: should be 0 or more": all(row >= 0 for row in self.data_rows),
        }
        given = {"--prompt": self.prompts, "--class-name": self.class_names, "--label": self.labels}
        given = {option: values for option, values in given.items() if values}
        checks[f"{' and '.join(given)}: give one kind of them"] = len(given) <= 1
        for option, values in given.items():
            wanted = f"give one for all, or one for each of the {self.num_images} images"
            checks[f"{option}: {wanted}, not {len(values)}"] = len(values) in (1, self.num_images)
        return [problem for problem, fine in checks.items() if not fine]

    def _file_problems(self) -> list[str]:
        problems = []
        for path in self.images:
            if is_video(path.name) and not path.is_dir():
                if reason := why_no_file(path):
                    problems.append(f"--image {path}: {reason}")
                continue  # decoded when the libraries are loaded
            try:
                read_image(path)
            except UsageError as error:
                problems.append(f"--image {error}")
        if self.data_rows and self.data_file() is None:
            problems.append(
                f"--data-index: {self.model} is not in the folder of a run with a {DATA_FILE}; give --image"
            )
        if self.output.suffix != ".mp4":
            return [*problems, f"--output {self.output}: should end in .mp4"]
        if problem := writing_problem(self.output.parent):
            return [*problems, f"--output {self.output}: {problem}"]
        for path in (*self.video_paths(), self.contact_sheet_path()):
            if path.is_dir():
                problems.append(f"--output {path}: is a folder")
            elif path.exists() and not os.access(path, os.W_OK):
                problems.append(f"--output {path}: exists and is not writable")
        return problems


def _option(name: str) -> str:
    singular = {"images": "image", "data_rows": "data-index", "prompts": "prompt", "class_names": "class-name"}
    return f"--{singular.get(name, name).replace('_', '-')}"
