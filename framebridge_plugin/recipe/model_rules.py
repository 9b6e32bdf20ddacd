"""Rules for the model that a recipe names: it is there, is whole, and its parts fit each other, the data and the run.

What has an id on the Hugging Face Hub is not looked at here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from framebridge_plugin.backbones.examination import SavedModel, read_once
from framebridge_plugin.backbones.facts import ClipRule, ClipShape, Config, KnownClasses
from framebridge_plugin.backbones.folders import find_part
from framebridge_plugin.files import local_path
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.schema import Recipe
from framebridge_plugin.recipe.scratch_rules import data_class_names, data_clip_shape

_PRETRAINED = "model.pretrained_model_name_or_path"


class RecipeModel:
    """The model that a recipe trains, as far as it is to be seen."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.facts = recipe, recipe.backbone
        model, ours = recipe.model, recipe.framebridge
        where = "framebridge.start_from" if model.transformer_id is None else "model.transformer_id"
        sources = {self.facts.network: (where, recipe.transformer_source)}
        for part in ("vae", "text_encoder", "tokenizer"):
            sources[part] = f"model.{part}_id", getattr(model, f"{part}_id")
        sources |= {part: (f"framebridge.{part}", getattr(ours, part, None)) for part in self.facts.optional_parts}
        known = {*self.facts.parts, *self.facts.optional_parts}
        given = {part: (at, name) for part, (at, name) in sources.items() if name is not None and part in known}
        self.places = {part: at for part, (at, _) in given.items()}
        components = {part: local_path(name) for part, (_, name) in given.items()}
        for part in self.facts.optional_parts:  # of a run, or a model
            if (path := components.get(part)) is not None:
                components[part] = find_part(path, part)
        whole = model.pretrained_model_name_or_path
        base = None if whole is None else local_path(whole)
        on_hub = whole is not None and base is None
        self.saved = SavedModel(self.facts, base, components, on_hub=on_hub, read=read_once())

    @functools.cached_property
    def scratch_config(self) -> Config | None:
        """What is known of the config of a network from scratch; None for a trained one."""
        return self._scratch_config(of_data=True)

    @functools.cached_property
    def _data_classes(self) -> list[str] | None:
        return data_class_names(self.recipe)

    def _scratch_config(self, *, of_data: bool) -> Config | None:
        size, make = self.recipe.framebridge.latte_size, self.facts.scratch_config
        if not self.recipe.is_from_scratch or make is None or size is None:
            return None
        clip_shape, class_names = (data_clip_shape(self.recipe), self._data_classes) if of_data else (None, None)
        return make(size, self.saved.configs["vae"], clip_shape, class_names, frozenset(self.saved.parts))

    @property
    def folders(self) -> dict[str, Path | None]:
        """The folders of its components, by name; None for those on the hub, and for a network from scratch."""
        return {part: self.saved.folder(part) for part in self.saved.parts if part != "scheduler"}

    @property
    def clip_rule(self) -> ClipRule:
        """Which clips it can be trained on."""
        if (config := self._scratch_config(of_data=False)) is not None:
            return self.facts.clip_rule(self.saved.configs["vae"], config)
        return self.saved.clip_rule

    @property
    def sample_rule(self) -> ClipRule:
        """Which clips it can be validated with: a network from scratch is built for those of the data."""
        shape = data_clip_shape(self.recipe) if self.recipe.is_from_scratch else None
        return self.clip_rule if shape is None else ClipShape(*shape)

    @property
    def known_classes(self) -> KnownClasses | None:
        """The classes that it knows; None for a model of text, and one that is not to be seen."""
        if not self.recipe.is_from_scratch:
            return self.saved.known_classes
        names = self._data_classes
        return None if names is None else KnownClasses(len(names), tuple(names))

    @property
    def caption_problem(self) -> Callable[[str], str | None]:
        """What is wrong with a caption that a sample is to have, or None."""
        classes = self.known_classes
        return (lambda caption: None) if classes is None else classes.problem

    def problems(self) -> Iterator[Problem]:
        """Yields all that is wrong with the model, and between it and the data's classes."""
        model, can_start = self.recipe.model, self.facts.scratch_config is not None
        if model.pretrained_model_name_or_path is None and not can_start:
            yield Problem(_PRETRAINED, "is required")
            return
        for finding in self.saved.findings(self.scratch_config):
            where = self.places.get(finding.part, _PRETRAINED)
            yield Problem(where, finding.message, on_disk=not finding.is_other)
        if not self.recipe.is_from_scratch:
            yield from self._class_problems()

    def _class_problems(self) -> Iterator[Problem]:
        """That a trained network does not know a class of the data."""
        names, problem_of = self._data_classes if self.known_classes else None, self.caption_problem
        problems = [problem for name in names or () if (problem := problem_of(name))]
        if problems:
            where = "dataset.dataset_config" if self.recipe.framebridge.data is None else "framebridge.data.class_root"
            more = f" (and {len(problems) - 1} more of the data)" if len(problems) > 1 else ""
            yield Problem(where, f"{problems[0]}{more}")
