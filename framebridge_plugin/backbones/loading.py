"""Where the components of a model come from, and loading them with one-line errors for whatever is wrong with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import FrozenDict
from safetensors import SafetensorError

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.files import (
    COMPONENT_FILES,
    entry_problem,
    folder_weights_problem,
    links_problem,
    read_json,
    tokenizer_problem,
)
from framebridge_plugin.backbones.folders import config_problem, find_saved_model, two_file_problem
from framebridge_plugin.backbones.hub import local_folder
from framebridge_plugin.errors import FrameBridgeError, first_line
from framebridge_plugin.files import local_path
from framebridge_plugin.models.whole_weights import whole_weights
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.schedulers.backbone import build_backbone

A_MODEL = "a run's folder, or a complete model in diffusers format"
LOADING_ERRORS = (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError)
"""What diffusers, transformers and safetensors raise for files that are missing, damaged or of another kind."""


@dataclass(frozen=True)
class ModelSource:
    """Where the components of a model come from.

    Attributes:
        name_or_path: Folder or hub id of the whole model; empty for one from scratch.
        replaced: Components that come from elsewhere: folder or hub id of each alone.
        hub: `revision` and `cache_dir`.
    """

    name_or_path: str
    replaced: Mapping[str, str] = field(default_factory=dict)
    hub: Mapping[str, Any] = field(default_factory=dict)
    _commits: dict[str, str] = field(default_factory=dict, compare=False)

    def place(self, part: str) -> tuple[str, str]:
        """Folder or id that a component comes from, and the subfolder in it ("" for a component alone)."""
        alone = self.replaced.get(part)
        return (self.name_or_path, part) if alone is None else (alone, "")

    def folder(self, part: str) -> Path:
        """The folder of a component on this machine."""
        return self.local(*self.place(part))

    def local(self, source: str, subfolder: str, *, settings_only: bool = False) -> Path:
        """A subfolder of a folder or id on this machine, refused if something in it leads elsewhere.

        An id is taken at the same commit each time.
        """
        names = ["*.json"] if settings_only else COMPONENT_FILES
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
        hub = {**self.hub, "ignore_patterns": None if subfolder else ["*/*"]}
        if source in self._commits:
            hub["revision"] = self._commits[source]
        root = local_folder(source, patterns=patterns, **hub)
        if local_path(source) is None:
            self._commits[source] = root.name
        folder = root / subfolder
        if problem := (subfolder and entry_problem(folder, root)) or links_problem(folder):
            raise FrameBridgeError(problem)
        return folder


def cannot_load(what: str, source: str, reason: BaseException | str, expected: str) -> FrameBridgeError:
    """The error, of one line, for a component that cannot be loaded; `expected` says what the folder should be."""
    if problem := two_file_problem(find_saved_model(Path(source)) or Path(source)):
        return FrameBridgeError(problem)
    line = reason if isinstance(reason, str) else first_line(reason)
    return FrameBridgeError(f"cannot load {what} from {source!r}: {line}; check that the folder is {expected}")


@contextlib.contextmanager
def loading(what: str, source: str, expected: str) -> Iterator[None]:
    """Turns what the libraries raise, or only warn of, while a component is loaded into one line."""
    try:
        with whole_weights():
            yield
    except FrameBridgeError:
        raise
    except LOADING_ERRORS as error:
        raise cannot_load(what, source, error, expected) from error


def load_config(component_class: Any, model: ModelSource, place: tuple[str, str], expected: str) -> FrozenDict:
    """The config of a component at a place (see `ModelSource`), refused if it is of another class."""
    name, source = component_class.__name__, place[0]
    with loading(name, source, expected):
        config = read_json(model.local(*place, settings_only=True) / "config.json")
    if config.get("_class_name") != name:
        raise cannot_load(name, source, f"it is of the class {config.get('_class_name')}", expected)
    return FrozenDict(**config)


def load_backbone_scheduler(model: ModelSource, facts: BackboneFacts, expected: str) -> Any:
    """The process that a model was pretrained on, by its own scheduler.

    Of a bridge, whose settings are left out, it is the one that it was fine-tuned from; None for one that has none.
    """
    source = model.name_or_path
    with loading("scheduler", source, expected):
        config = read_json(model.local(source, "scheduler", settings_only=True) / "scheduler_config.json")
    if problem := config_problem(config, "scheduler", facts):
        raise cannot_load("scheduler", source, f"it {problem}", expected)
    if config.get("_class_name") == FrameBridgeScheduler.__name__:
        config = FrameBridgeScheduler.from_config(config).config.backbone
    return build_backbone(config)


def load_tokenizer(tokenizer_class: Any, model: ModelSource, expected: str) -> Any:
    """A model's tokenizer, with its vocabulary."""
    source, _ = model.place("tokenizer")
    with loading("tokenizer", source, expected):
        folder = model.folder("tokenizer")
        if problem := tokenizer_problem(folder):
            raise FrameBridgeError(problem)
        tokenizer = tokenizer_class.from_pretrained(folder)
    # Without its file, transformers makes up a vocabulary of special tokens and one more.
    if len(tokenizer) - len(tokenizer.added_tokens_decoder) <= 1:
        raise cannot_load("tokenizer", source, "it has no vocabulary (spiece.model)", expected)
    return tokenizer


def load_weights(
    component_class: Any, what: str, model: ModelSource, place: tuple[str, str], expected: str, **settings: Any
) -> Any:
    """A model of diffusers or transformers at a place, by its `from_pretrained` with these settings."""
    source = place[0]
    with loading(what, source, expected):
        folder = model.local(*place)
        if problem := folder_weights_problem(folder, read_json(folder / "config.json")):
            raise cannot_load(what, source, problem, expected)
        return component_class.from_pretrained(folder, use_safetensors=True, **settings)
