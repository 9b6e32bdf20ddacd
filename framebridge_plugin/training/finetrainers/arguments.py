"""finetrainers' arguments: what this package adds to their parser, and a recipe's values in them."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from framebridge_plugin.backbones.facts import backbone_names, find_backbone
from framebridge_plugin.backbones.starting import find_start, goes_on
from framebridge_plugin.errors import UsageError
from framebridge_plugin.settings.base import CheckedSettings
from framebridge_plugin.settings.bridge import DEFAULT_LATTE_SIZE, BeginningSection, ObjectiveSettings, TrainerSettings
from framebridge_plugin.settings.options import add_options

if TYPE_CHECKING:
    from finetrainers import BaseArgs

    from framebridge_plugin.recipe import Recipe

Settings = TypeVar("Settings", bound=CheckedSettings)

_OPTIONS = {"snr_aligned": "snr_alignment"}
"""Settings whose option has another name; a switch has a form with `no_` in front, too."""


class FrameBridgeArgs:
    """Our arguments, in the form of finetrainers' `ArgsConfigMixin`.

    They arrive as `args.framebridge_objective` (an `ObjectiveSettings`), `args.framebridge_trainer` (a
    `TrainerSettings`), `args.latte_size`, `args.neural_prior`, `args.start_from` and `args.precomputed`. What is not
    given takes the default of the backbone that `--model_name` names.
    """

    framebridge_objective: ObjectiveSettings
    framebridge_trainer: TrainerSettings
    latte_size: str
    neural_prior: str | None
    start_from: str | None
    precomputed: str | None

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        """The settings that the last command line or recipe does name."""
        self.hand_over(self, {})

    def add_args(self, parser: argparse.ArgumentParser) -> None:
        """Adds an option for each of our settings to finetrainers' parser."""
        group = parser.add_argument_group("framebridge", "models *_bridge and *_neural_prior")
        for settings in (ObjectiveSettings, TrainerSettings, BeginningSection):
            add_options(group, settings, _OPTIONS)

    def map_args(self, argparse_args: argparse.Namespace, mapped_args: BaseArgs) -> None:
        """Hands the parsed values over."""
        given = {name: value for name, value in vars(argparse_args).items() if value is not None}
        self.take(given, mapped_args)

    def take(self, given: Mapping[str, Any], args: BaseArgs) -> None:
        """Takes the settings that are given, and hands them to finetrainers' arguments."""
        self.given = dict(given)
        defaults = backbone_defaults(args.model_name)
        self.hand_over(self, defaults)
        self.hand_over(args, defaults)
        resolve_start(args)

    def hand_over(self, to: Any, defaults: Mapping[str, Any]) -> None:
        """Sets what is given, and the defaults of the rest, as attributes of `to`."""
        to.framebridge_objective = self.over(ObjectiveSettings, defaults)
        to.framebridge_trainer = self.over(TrainerSettings, defaults)
        for name in BeginningSection.model_fields:
            setattr(to, name, self.given.get(name))
        to.latte_size = to.latte_size or DEFAULT_LATTE_SIZE

    def over(self, settings: type[Settings], defaults: Mapping[str, Any]) -> Settings:
        """Settings of a kind: what is given, else the defaults, else their own."""
        values = {**defaults, **self.given}
        return settings(**{name: values[name] for name in settings.model_fields if name in values})

    def validate_args(self, args: BaseArgs) -> None:
        """Does nothing: the settings check their values themselves."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the values that were taken last, for finetrainers' trackers."""
        others = {name: getattr(self, name) for name in BeginningSection.model_fields}
        return {**self.framebridge_objective.model_dump(), **self.framebridge_trainer.model_dump(), **others}


def backbone_defaults(model_name: str) -> Mapping[str, Any]:
    """The defaults of a backbone; none for finetrainers' own models."""
    return find_backbone(model_name).defaults if model_name in backbone_names() else {}


def resolve_start(args: Any) -> None:
    """Puts a whole model of `start_from` in the place of `transformer_id`, and a LoRA's folder in that of its run."""
    name = args.start_from
    if name is None:
        return
    from framebridge_plugin.backbones.hub import local_folder

    if (
        goes_on(args.output_dir, args.resume_from_checkpoint)
        and args.training_type != "lora"
        and not os.path.isdir(name)
    ):
        return  # gone, and the checkpoint has all weights
    start = find_start(str(local_folder(name)))
    if start is None:
        raise UsageError(f"start_from: {name} holds no saved model or LoRA; give a run that has saved one")
    problem = start.kind_problem(args.model_name, args.training_type)
    if problem is None and not start.is_lora and args.transformer_id is not None:
        problem = "excludes transformer_id, which replaces the same weights; leave one of them out"
    if problem is not None:
        raise UsageError(f"start_from: {problem}")
    if start.is_lora:
        args.start_from = str(start.folder)
    else:
        args.transformer_id = str(start.network)


def fill_arguments(args: Any, recipe: Recipe, dataset_config: str, processes: int) -> None:
    """Gives finetrainers' arguments every value of a recipe that it has a name for, its own defaults included."""
    from finetrainers.args import _DTYPE_MAP

    is_lora = recipe.training.training_type == "lora"
    left_out: Any = {"framebridge": True, "validation": {"heldout"}, **({} if is_lora else {"lora": True})}
    sections = recipe.model_dump(exclude=left_out)
    values = {name: value for section in sections.values() for name, value in section.items()}
    values |= {name: _DTYPE_MAP[value] for name, value in values.items() if name.endswith("_dtype")}
    values["compile_scopes"] = values["compile_scopes"] or ["regional"] * len(values["compile_modules"])
    values["dataset_config"] = dataset_config
    values["pretrained_model_name_or_path"] = values["pretrained_model_name_or_path"] or ""
    values["precomputation_dir"] = values["precomputation_dir"] or os.path.join(values["output_dir"], "precomputed")
    values["resume_from_checkpoint"] = str(values["resume_from_checkpoint"])
    values["dp_degree"] = values["dp_degree"] or max(1, processes // values["dp_shards"])
    for name in ("attn_provider_training", "attn_provider_inference"):
        values[name] = values[name] or []
    if is_lora:
        values["target_modules"] = lora_targets(recipe.lora.target_modules)
    for name, value in values.items():
        setattr(args, name, value)


def lora_targets(names: Sequence[str]) -> list[str] | str:
    """Layers as peft takes them: a text for a regular expression, a list for names and their ends."""
    is_pattern = len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0])
    return names[0] if is_pattern else list(names)
