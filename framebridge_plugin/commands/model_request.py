"""What a command that samples from a model was asked for, checked as far as that goes without loading the model."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.manifest import folder_problem
from framebridge_plugin.commands.sample_model import examine_model
from framebridge_plugin.errors import UsageError, say
from framebridge_plugin.files import local_path
from framebridge_plugin.settings.sampling import CallSection, SamplerSection


class ModelRequest(CallSection):
    """A model and how videos are made with it; every error is a line of one `UsageError`."""

    singular: ClassVar[dict[str, str]] = {}
    """Options that are named otherwise than their settings."""

    model: str
    """A run's folder, a model's folder, or an id on the Hugging Face Hub."""
    output: Path
    """Where to."""
    transformer: str | None = None
    """Folder or id of a fine-tuned network, or of a model that holds one, to put into a `model` of text."""
    base: str | None = None
    """Where the model that a LoRA was trained on is now; None takes what the LoRA says."""
    allow_other_base: bool = False
    prompts: tuple[str, ...] = ()
    """For models of text, as for the others `class_names` or `labels`: one for all images, or one per image."""
    class_names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def __init__(self, **values: Any) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        problems = []
        try:
            super().__init__(**values)
        except ValidationError as failure:
            for error in failure.errors(include_url=False):
                name = str(error["loc"][0])
                values.pop(name, None)
                problems.append(f"{self._option(name)} {error['input']}: {error['msg'].removeprefix('Input ')}")
            super().__init__(**values)  # for the other errors
        problems += [f"{self._option(name)}: {message}" for name, message in self.conflicts()]
        problems += [*self._input_problems(), *self._file_problems(), *self._model_problems(*self._examined)]
        if problems:
            raise UsageError(*problems)

    @functools.cached_property
    def _examined(self) -> tuple[SavedModel | None, list[str]]:
        return examine_model(self.model, self.transformer, self.base, self.allow_other_base)

    @property
    def saved(self) -> SavedModel | None:
        """The model; None for an id on the hub."""
        return self._examined[0]

    @property
    def conditions_come_with_images(self) -> bool:
        """Whether there need be no condition among the options."""
        return False

    def sampler_settings(self, facts: BackboneFacts) -> dict[str, Any]:
        """The settings of the scheduler, with the defaults of a backbone."""
        given = self.model_dump(include=set(SamplerSection.model_fields))
        return given if "grid" in self.model_fields_set else given | {"grid": facts.sampling.get("grid", self.grid)}

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
        return problems + [f"{self._option(option)}: {message}" for option, message in found]

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
        sampled = [self._option(name) for name in options if name in self.model_fields_set]
        if "scheduler" not in facts.parts and sampled:
            what = "this model gives its video in one call, without a sampler"
            problems.append(f"{', '.join(sampled)}: {what}; leave {'it' if len(sampled) == 1 else 'them'} out")
        if (classes := saved.known_classes) is not None:
            option = "--class-name" if self.class_names else "--label"
            for name in dict.fromkeys(map(str, self.class_names or self.labels)):
                if problem := classes.problem(name):
                    problems.append(f"{option} {name}: {problem}")
        if not (wrong or self.conditions_come_with_images or self.prompts or self.class_names or self.labels):
            problems.append(missing)
        return wrong + problems

    def _input_problems(self) -> list[str]:
        """Errors in the inputs, each for itself."""
        return []

    def _file_problems(self) -> list[str]:
        """Errors in the files that are read and written."""
        return []

    @classmethod
    def _option(cls, name: str) -> str:
        return f"--{cls.singular.get(name, name).replace('_', '-')}"


def file_of_run(model: str, name: str) -> Path | None:
    """A file that a run wrote in the folder above a model of its; None if there is none."""
    path = local_path(model)
    if path is None:
        return None
    folder = path.absolute()
    # A run holds checkpoints/step_000100/model/.
    return next((path / name for path in (folder, *folder.parents[:3]) if (path / name).is_file()), None)
