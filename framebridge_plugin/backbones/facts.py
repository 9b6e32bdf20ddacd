"""What a recipe and a command must know of a backbone before anything is loaded; needs the standard library alone.

Another package brings a backbone by an entry point of the group `framebridge_plugin.backbones`: its name is the
`model_name` of recipes, its value the place of a `BackboneFacts`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from framebridge_plugin.errors import FrameBridgeError, UsageError, in_one_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "framebridge_plugin.backbones"

_OWN = {
    "cogvideox_bridge": "framebridge_plugin.backbones.cogvideox.facts:COGVIDEOX",
    "wan_bridge": "framebridge_plugin.backbones.wan.facts:WAN",
    "ltx_bridge": "framebridge_plugin.backbones.ltx.facts:LTX",
    "latte_bridge": "framebridge_plugin.backbones.latte.facts:LATTE_BRIDGE",
    "latte_neural_prior": "framebridge_plugin.backbones.latte.facts:LATTE_NEURAL_PRIOR",
}


Config = Mapping[str, Any]
"""The `config.json` of a component, as a mapping; an empty one is that of a component that is not to be seen."""


class ClipRule(Protocol):
    """Which clips a model takes and returns."""

    def problems(self, num_frames: int | None, height: int | None, width: int | None) -> Iterator[tuple[str, str]]:
        """Yields the names of the arguments that do not fit, with what is wrong; None is not checked."""
        ...

    def nearest(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The nearest shape that fits."""
        ...


@dataclass(frozen=True)
class ClipShapeRule:
    """Clips of many shapes.

    Attributes:
        frames_step: `num_frames` must be a multiple of this, plus 1.
        size_step: Height and width must be multiples of this many pixels.
    """

    frames_step: int
    size_step: int

    def problems(self, num_frames: int | None, height: int | None, width: int | None) -> Iterator[tuple[str, str]]:
        """Yields the names of the arguments that do not fit, with what is wrong; None is not checked."""
        frames, *sizes = self.nearest(num_frames or 1, height or self.size_step, width or self.size_step)
        if num_frames is not None and num_frames != frames:
            rule = f"{self.frames_step} k + 1 frames"
            yield "num_frames", f"the VAE returns only {rule}, not {num_frames}; the nearest is {frames}"
        for name, given, nearest in zip(("height", "width"), (height, width), sizes, strict=True):
            if given is not None and given != nearest:
                yield name, f"should be a multiple of {self.size_step} for this model, not {given}; try {nearest}"

    def nearest(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The nearest shape that fits."""
        frames = _nearest(num_frames - 1, self.frames_step, least=0) + 1
        step = self.size_step
        return frames, _nearest(height, step, least=step), _nearest(width, step, least=step)


def _nearest(value: int, step: int, least: int) -> int:
    return max(least, (value + step // 2) // step * step)


@dataclass(frozen=True)
class ClipShape:
    """The one shape of clips, in frames and pixels, that a model was trained on and takes."""

    num_frames: int
    height: int
    width: int

    def problems(self, num_frames: int | None, height: int | None, width: int | None) -> Iterator[tuple[str, str]]:
        """Yields the names of the arguments that do not fit, with what is wrong; None is not checked."""
        for name, given in {"num_frames": num_frames, "height": height, "width": width}.items():
            trained = getattr(self, name)
            if given is not None and given != trained:
                yield name, f"this model was trained on {trained} and takes no other, not {given}"

    def nearest(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The one that there is."""
        return self.num_frames, self.height, self.width


@dataclass(frozen=True)
class KnownClasses:
    """The classes that a model was trained on.

    Attributes:
        number: How many; their labels are 0 to `number` - 1.
        names: Their names in the order of their labels; empty where only the numbers are known.
    """

    number: int
    names: tuple[str, ...] = ()

    def problem(self, name: str) -> str | None:
        """What is wrong with a class's name, or its label in digits, with the nearest names; None if it is known."""
        if name in self.names or (name.isdecimal() and int(name) < self.number):
            return None
        if name.lstrip("-").isdecimal():
            return f"the model knows no class {name}: its labels run from 0 to {self.number - 1}"
        if not self.names:
            return f"the model knows its classes by number only, 0 to {self.number - 1}, not {name!r}"
        by_small_letters = {known.casefold(): known for known in self.names}
        near = difflib.get_close_matches(name.casefold(), by_small_letters, n=3)
        if near:
            nearest = ", ".join(by_small_letters[key] for key in near)
            return f"the model knows no class {name!r}; the nearest: {nearest}"
        return f"the model knows no class {name!r}; it knows {self.number}: {', '.join(self.names[:3])}, ..."


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """A pretrained model on which a bridge is built.

    Attributes:
        name: `model_name` of its recipes.
        title: What users call it; the names of its pipelines' classes contain it.
        adapter: Place of its `BackboneAdapter`, "package.module:Class".
        pipeline: Place of the pipeline that samples from it.
        parts: Components of a model's folder, each with the class that its config names, or None for any.
        optional_parts: Further components, which some models have.
        clip_rule: The rule for its clips, from the configs of autoencoder and network; a config may be empty.
        network: The folder of the trained network.
        condition: "text" (captions) or "class" (the caption is the name of a class).
        process: The kind of its own process: "variance_preserving" or "flow_matching".
        schedulers: Classes of its own scheduler; empty for any that is of its process.
        predictions: What its network may predict, as `prediction_type` of its scheduler says it.
        input_projection: The layer that is widened for the image, and that LoRA layers therefore have to include;
            None for a network that is made for it.
        defaults: Its values of the recipe's section `framebridge`, where they are not the general ones; those of other
            sections by their paths.
        sampling: Its `num_inference_steps`, `guidance_scale` and `grid` where nobody says another.
        plain: For a text-to-video model that was not trained as a bridge: settings of the `FrameBridgeScheduler`, and
            `num_frames`, `height`, `width` and `fps`.
        without_effect: Settings of a recipe that do nothing for it, by their paths, with the reason.
        config_problem: What is wrong with a component's config, or with model_index.json, to be read after its place;
            by default nothing.
        parts_problems: Where components do not fit each other, from their configs by name: the component, and what is
            wrong, to be read after its place. An empty config is not known; a name that is left out is not there.
            "NAME/vae" is the autoencoder that an optional component from elsewhere was trained with.
        known_classes: The classes that a network's config says it knows; None for a model that takes text.
        scratch_config: What is known of the config of a network from scratch: from its size as recipes name it, the
            autoencoder's config, frames, height and width of the clips and the names of the classes (None where they
            are not known), and the optional components that it is for. None where there is no training from scratch.
    """

    name: str
    title: str
    adapter: str
    pipeline: str
    parts: Mapping[str, str | None]
    clip_rule: Callable[[Config, Config], ClipRule]
    optional_parts: Mapping[str, str | None] = field(default_factory=dict)
    network: str = "transformer"
    condition: Literal["text", "class"] = "text"
    process: Literal["variance_preserving", "flow_matching"] = "variance_preserving"
    schedulers: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    input_projection: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)
    without_effect: Mapping[str, str] = field(default_factory=dict)
    config_problem: Callable[[str, Config], str | None] = lambda part, config: None
    parts_problems: Callable[[Mapping[str, Config]], Iterable[tuple[str, str]]] = lambda configs: ()
    known_classes: Callable[[Config], KnownClasses | None] = lambda network: None
    scratch_config: (
        Callable[[str, Config, tuple[int, int, int] | None, list[str] | None, frozenset[str]], Config] | None
    ) = None

    def problems(self, configs: Mapping[str, Config]) -> Iterator[tuple[str, str]]:
        """Where components are others than they should be, or do not fit each other; see `parts_problems`."""
        others = [
            (part, problem)
            for part, config in configs.items()
            if config and (problem := self.config_problem(part, config))
        ]
        yield from others or self.parts_problems(configs)

    @property
    def default_call(self) -> dict[str, Any]:
        """`num_inference_steps` and `guidance_scale` with which its models are sampled where nobody says others."""
        return {name: self.sampling[name] for name in ("num_inference_steps", "guidance_scale")}

    def load_adapter(self) -> Any:
        """The adapter's class; imports torch and diffusers."""
        return _load(self.adapter)

    def load_pipeline(self) -> Any:
        """The pipeline's class; imports torch and diffusers."""
        return _load(self.pipeline)


def backbone_names() -> list[str]:
    """The names of all backbones, this package's first; none of the others is imported."""
    return list(dict.fromkeys([*_OWN, *(point.name for point in _entry_points())]))


def find_backbone(name: str) -> BackboneFacts:
    """The facts of a backbone.

    Args:
        name: `model_name` of a recipe.

    Returns:
        Its facts.

    Raises:
        UsageError: If there is none of that name, or more than one.
        FrameBridgeError: If the package that brings it cannot be imported, or brings something else.
    """
    places = [(_OWN[name], "framebridge-plugin")] if name in _OWN else []
    points = [point for point in _entry_points() if point.name == name]
    places += [(point.value, point.dist.name if point.dist else "unknown") for point in points]
    if not places:
        names = backbone_names()
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        hint = f"did you mean {nearest[0]}?" if nearest else "install the one that does"
        raise UsageError(f"no installed package brings a backbone {name!r}, there are {', '.join(names)}; {hint}")
    if len(places) > 1:
        listed = ", ".join(f"{place} of {package}" for place, package in places)
        raise UsageError(f"{len(places)} backbones are named {name!r}: {listed}; uninstall all but one")
    [(place, package)] = places
    where = f"{name!r} ({place} of {package})"
    try:
        facts = _load(place)
    except Exception as error:
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise FrameBridgeError(f"backbone {where} cannot be imported: {reason}; mend that") from error
    if not isinstance(facts, BackboneFacts) or facts.name != name:
        raise FrameBridgeError(f"backbone {where} is no BackboneFacts of that name; mend its package")
    return facts


def working_backbones() -> Iterator[BackboneFacts]:
    """The facts of all backbones but those of `broken_backbones`, this package's first."""
    return (found for found in _backbones() if isinstance(found, BackboneFacts))


def broken_backbones() -> list[str]:
    """What is wrong with each backbone that cannot be imported, or shares its name with another, and what to do."""
    return [str(found) for found in _backbones() if isinstance(found, FrameBridgeError)]


def _backbones() -> Iterator[BackboneFacts | FrameBridgeError]:
    for name in backbone_names():
        try:
            yield find_backbone(name)
        except FrameBridgeError as error:
            yield error


@functools.cache
def _entry_points() -> tuple[EntryPoint, ...]:
    from importlib.metadata import entry_points  # slow, and a shipped backbone asks nobody

    return tuple(entry_points(group=GROUP))


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
