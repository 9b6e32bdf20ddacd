"""A whole recipe: the sections together, the defaults that depend on the model, and the ways out of it.

Rules that need more than one field, or a look at the disk, are in `framebridge_plugin.recipe.rules`. Importing this
module imports neither torch nor finetrainers.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from framebridge_plugin.backbones.facts import BackboneFacts, find_backbone
from framebridge_plugin.backbones.starting import find_start, goes_on
from framebridge_plugin.data.tables import read_json
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import local_path
from framebridge_plugin.settings import finetrainers as host
from framebridge_plugin.settings.base import Section
from framebridge_plugin.settings.bridge import DEFAULT_LATTE_SIZE, BeginningSection, ObjectiveSection, TrainerSection
from framebridge_plugin.settings.data import BadFilesSection, ClipSection, DataSection, SourceSection


class ModelSection(host.ModelSection):
    """Which pretrained model to start from, of a backbone that there is."""

    @field_validator("model_name")
    @classmethod
    def _check_backbone(cls, name: str) -> str:
        find_backbone(name)
        return name


class FrameBridgeSection(BeginningSection, TrainerSection, ObjectiveSection):
    """What is this package's own; a backbone's facts hold the defaults that are its own."""

    data: DataSection | None = Field(default=None, description="the data; or give dataset.dataset_config")
    bad_files: BadFilesSection = BadFilesSection()


class Recipe(Section):
    """A whole run, checked.

    Read one with `framebridge_plugin.recipe.load_recipe`, which also checks what concerns several fields and the
    disk. All relative paths are relative to the working directory of the command.
    """

    model: ModelSection
    framebridge: FrameBridgeSection = FrameBridgeSection()
    dataset: host.DatasetSection = host.DatasetSection()
    dataloader: host.DataloaderSection = host.DataloaderSection()
    training: host.TrainingSection
    optimization: host.OptimizationSection = host.OptimizationSection()
    parallelism: host.ParallelismSection = host.ParallelismSection()
    precision: host.PrecisionSection = host.PrecisionSection()
    checkpoints: host.CheckpointsSection
    validation: host.ValidationSection = host.ValidationSection()
    tracking: host.TrackingSection = host.TrackingSection()
    hub: host.HubSection = host.HubSection()
    compile: host.CompileSection = host.CompileSection()
    attention: host.AttentionSection = host.AttentionSection()
    lora: host.LoraSection = host.LoraSection()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_model_defaults(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Puts in the defaults that depend on the model, so that the resolved recipe shows them."""
        model, ours = data.get("model"), data.get("framebridge", {})
        if not isinstance(model, dict) or not isinstance(ours, dict):
            return data  # reported by the fields
        try:
            facts = find_backbone(str(model.get("model_name", ModelSection.model_fields["model_name"].default)))
        except FrameBridgeError:
            return data  # reported by the field
        defaults: dict[str, dict[str, Any]] = {"framebridge": {}}
        for path, value in facts.defaults.items():
            section, _, name = path.rpartition(".")
            defaults.setdefault(section or "framebridge", {})[name] = value
        trained = model.get("pretrained_model_name_or_path"), model.get("transformer_id"), ours.get("start_from")
        if facts.scratch_config is not None and all(name is None for name in trained):
            defaults["framebridge"]["latte_size"] = DEFAULT_LATTE_SIZE
        if not isinstance(training := data.get("training"), dict) or training.get("training_type") != "lora":
            defaults.pop("lora", None)
        for section, values in defaults.items():
            given = data.get(section) or {}
            if isinstance(given, dict):
                given = {name: value for name, value in given.items() if not (name in values and value is None)}
                data = data | {section: values | given}
        return data

    @property
    def backbone(self) -> BackboneFacts:
        """The model's facts."""
        return find_backbone(self.model.model_name)

    @property
    def is_from_scratch(self) -> bool:
        """Whether the run starts from a freshly initialised network."""
        trained = self.model.pretrained_model_name_or_path, self.model.transformer_id, self.framebridge.start_from
        return self.backbone.scratch_config is not None and all(name is None for name in trained)

    @property
    def transformer_source(self) -> str | None:
        """Folder or id of a network that is not the model's own: `transformer_id`, or that of `start_from`."""
        start = find_start(self.framebridge.start_from)
        alone, kind = self.model.transformer_id, (self.model.model_name, self.training.training_type)
        if alone is not None or start is None or start.is_lora or start.kind_problem(*kind):
            return alone
        return str(start.network)

    @property
    def goes_on_without_start(self) -> bool:
        """Whether a resumed run has all weights in its checkpoint, so that what it once began with may be gone."""
        is_resumed = goes_on(self.checkpoints.output_dir, self.checkpoints.resume_from_checkpoint)
        return is_resumed and self.training.training_type == "full-finetune" and self.backbone.scratch_config is None

    def dataset_config(self) -> dict[str, Any]:
        """The content of finetrainers' dataset JSON, with `framebridge.bad_files` in it.

        Returns:
            `{"datasets": [entry, ...], "bad_files": {...}}`, and "heldout" where there are such clips. For
            `framebridge.data` that is one entry with absolute paths, whose clip's shape is the only one of
            `video_resolution_buckets`, [num_frames, height, width]; else it is what the file
            `dataset.dataset_config` holds.

        Raises:
            ValueError: If the recipe names no data, or that file is no JSON object, or has a key twice.
        """
        bad_files = self.framebridge.bad_files.model_dump(exclude_none=True)
        if "quarantine_file" in bad_files:
            bad_files["quarantine_file"] = str(Path(bad_files["quarantine_file"]).absolute())
        data, heldout = self.framebridge.data, {}
        if self.validation.heldout is not None and self.heldout_source is not None:
            heldout["heldout"] = {"clips": self.validation.heldout.clips, **_source_entry(self.heldout_source)}
        if data is None:
            if self.dataset.dataset_config is None:
                raise ValueError("the recipe names no data: give framebridge.data, or dataset.dataset_config")
            content = read_json(Path(self.dataset.dataset_config))
            if not isinstance(content, dict):
                raise UsageError(f"{self.dataset.dataset_config} should hold a JSON object")
            return {"bad_files": bad_files} | content | heldout
        entry = {"dataset_type": "video", **_source_entry(data)}
        entry["video_resolution_buckets"] = [[data.num_frames, data.height, data.width]]
        clip = ClipSection.model_fields.keys() - {"num_frames", "height", "width"}
        entry |= data.model_dump(include=clip, exclude_none=True)
        return {"datasets": [entry], "bad_files": bad_files, **heldout}

    @property
    def heldout_source(self) -> SourceSection | None:
        """Where the held-out clips are: what `validation.heldout` names, else the other half of the data's fold."""
        heldout, data = self.validation.heldout, self.framebridge.data
        if heldout is None or heldout.source:
            return heldout
        if data is None or data.class_root is None or data.split == "all":
            return None
        return data.model_copy(update={"split": "test" if data.split == "train" else "train"})

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that `load_recipe` reads back."""
        from framebridge_plugin.recipe.yaml_text import dump_yaml

        return dump_yaml(self.by_section())

    def by_section(self) -> dict[str, Any]:
        """The whole recipe, defaults included."""
        return self.model_dump(exclude=None if self.training.training_type == "lora" else {"lora"})

    @property
    def result_folder(self) -> Path:
        """Where the trained model, or the LoRA, comes to lie."""
        return Path(self.checkpoints.output_dir, "lora" if self.training.training_type == "lora" else "model")

    @property
    def hub_repository(self) -> str:
        """Where the model is uploaded to; without an owner it is that of the login."""
        return self.hub.hub_model_id or Path(self.checkpoints.output_dir).name


def recipe_settings(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, type[Section], str]]:
    """Yields every setting of a recipe: its path, the section that has it, and its name there."""
    for name, field in section.model_fields.items():
        types = (field.annotation, *typing.get_args(field.annotation))
        inner = next((kind for kind in types if isinstance(kind, type) and issubclass(kind, Section)), None)
        if inner is None:
            yield prefix + name, section, name
        else:
            yield from recipe_settings(inner, f"{prefix}{name}.")


def _source_entry(source: SourceSection) -> dict[str, Any]:
    paths = {name: getattr(source, name) for name in ("data_root", "class_root", "splits_dir", "csv", "video_root")}
    entry: dict[str, Any] = {key: _absolute(path) for key, path in paths.items() if path is not None}
    if source.class_root is not None and source.split != "all":
        entry |= {"split": source.split, "fold": source.fold}
    if source.refresh_index:
        entry["refresh_index"] = True
    if source.id_token is not None:
        entry["id_token"] = source.id_token
    return entry


def _absolute(source: str) -> str:
    """A folder's whole path, since the file that names it lies elsewhere; a hub id as it is."""
    return source if local_path(source) is None else str(Path(source).absolute())
