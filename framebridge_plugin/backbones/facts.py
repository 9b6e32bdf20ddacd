"""What a recipe and a command must know of a backbone before anything is loaded; needs the standard library alone.

Another package brings a backbone by an entry point of the group `framebridge_plugin.backbones`: its name is the
`model_name` of recipes, its value the place of a `BackboneFacts`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from framebridge_plugin.errors import FrameBridgeError, UsageError

GROUP = "framebridge_plugin.backbones"

_OWN = {
    "cogvideox_bridge": "framebridge_plugin.backbones.cogvideox.facts:COGVIDEOX",
    "wan_bridge": "framebridge_plugin.backbones.wan.facts:WAN",
    "latte_bridge": "framebridge_plugin.backbones.latte.facts:LATTE_BRIDGE",
    "latte_neural_prior": "framebridge_plugin.backbones.latte.facts:LATTE_NEURAL_PRIOR",
}


@dataclass(frozen=True)
class ClipShapeRule:
    """Which clips a model can take and return.

    Attributes:
        frames_step: `num_frames` must be a multiple of this, plus 1.
        size_step: Height and width must be multiples of this many pixels.
    """

    frames_step: int
    size_step: int

    def problems(self, num_frames: int | None, height: int | None, width: int | None) -> Iterator[tuple[str, str]]:
        """Yields the names of the arguments that do not fit, with what is wrong; None is not checked."""
        if num_frames is not None and (num_frames - 1) % self.frames_step:
            nearest = _nearest(num_frames - 1, self.frames_step, least=0) + 1
            rule = f"{self.frames_step} k + 1 frames"
            yield "num_frames", f"the VAE returns only {rule}, not {num_frames}; the nearest is {nearest}"
        for name, size in (("height", height), ("width", width)):
            if size is not None and size % self.size_step:
                nearest = _nearest(size, self.size_step, least=self.size_step)
                yield name, f"should be a multiple of {self.size_step} for this model, not {size}; try {nearest}"


def _nearest(value: int, step: int, least: int) -> int:
    return max(least, (value + step // 2) // step * step)


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """A pretrained model on which a bridge is built.

    Attributes:
        name: `model_name` of its recipes.
        title: What users call it; the names of its pipelines' classes contain it.
        adapter: Place of its `BackboneAdapter`, "package.module:Class".
        pipeline: Place of the pipeline that samples from it.
        parts: Components of a model's folder, each with the class that its config names, or None for any.
        clip_rule: The rule for its clips, from the configs of autoencoder and network; a config may be empty.
        network: The folder of the trained network.
        condition: "text" (captions) or "class" (the caption is the name of a class).
        process: The kind of its own process: "variance_preserving" or "flow_matching".
        schedulers: Classes of its own scheduler; empty for any that is of its process.
        predictions: What its network may predict, as `prediction_type` of its scheduler says it.
        input_projection: The layer that is widened for the image, and that LoRA layers therefore have to include;
            None for a network that is made for it.
        defaults: Its values of the recipe's section `framebridge`, where they are not the general ones.
        sampling: Its `num_inference_steps`, `guidance_scale` and `grid` where nobody says another.
        plain: For a text-to-video model that was not trained as a bridge: settings of the `FrameBridgeScheduler`, and
            `num_frames`, `height` and `width`.
        without_effect: Settings of a recipe that do nothing for it, by their paths, with the reason.
        config_problem: What is wrong with a component's config, to be read after its place; by default nothing.
    """

    name: str
    title: str
    adapter: str
    pipeline: str
    parts: Mapping[str, str | None]
    clip_rule: Callable[[Mapping[str, Any], Mapping[str, Any]], ClipShapeRule]
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
    config_problem: Callable[[str, Mapping[str, Any]], str | None] = lambda part, config: None

    def load_adapter(self) -> Any:
        """The adapter's class; imports torch and diffusers."""
        return _load(self.adapter)

    def load_pipeline(self) -> Any:
        """The pipeline's class; imports torch and diffusers."""
        return _load(self.pipeline)


def call_settings(facts: BackboneFacts) -> dict[str, Any]:
    """`num_inference_steps` and `guidance_scale` with which its models are sampled where nobody says others."""
    return {name: facts.sampling[name] for name in ("num_inference_steps", "guidance_scale")}


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
    places = [_OWN[name]] if name in _OWN else []
    places += [point.value for point in _entry_points() if point.name == name]
    if not places:
        names = backbone_names()
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"no backbone {name!r}; use one of {', '.join(names)}{hint}")
    if len(places) > 1:
        raise UsageError(f"{len(places)} backbones are named {name!r}: {', '.join(places)}; uninstall all but one")
    try:
        facts = _load(places[0])
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise FrameBridgeError(f"backbone {name!r} ({places[0]}) cannot be imported: {reason}; mend that") from error
    if not isinstance(facts, BackboneFacts) or facts.name != name:
        raise FrameBridgeError(f"backbone {name!r} ({places[0]}) is no BackboneFacts of that name; mend its package")
    return facts


def working_backbones() -> Iterator[BackboneFacts]:
    """The facts of all backbones but those that cannot be imported, this package's first."""
    for name in backbone_names():
        try:
            yield find_backbone(name)
        except FrameBridgeError:
            continue  # said to whoever asks for it by name


@functools.cache
def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
