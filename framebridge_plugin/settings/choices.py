"""The types of settings and what a resume does with them, and the sampler's rules: what networks, schedulers and
pipelines ask too; no pydantic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be: in `Annotated`, it is read by pydantic and by `settings.checking`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        limits = {"ge": self.least, "le": self.most, "gt": self.above, "lt": self.below}
        return {**handler(source), **{name: limit for name, limit in limits.items() if limit is not None}}


Count = Annotated[int, Range(1)]
NonNegative = Annotated[float, Range(0)]
BelowOne = Annotated[float, Range(0, below=1)]
Share = Annotated[float, Range(0, 1)]
Indices = Annotated[int, Range(2)]
FrameRate = Annotated[float, Range(above=0, most=1000)]
Target = Literal["v", "eps_psi", "noise", "data", "flow"]
BASELINE_TARGETS = {"noise": "epsilon", "v": "v_prediction"}
"""What a diffusion baseline from scratch may predict, and what diffusers' schedulers call it."""
AlignmentName = Literal["variance_preserving", "flow_matching", "none"]
AlignmentEdge = Literal["exact", "reference"]
Sampler = Literal["sde", "dbim"]
Order = Literal[1, 2]
Grid = Literal["trailing", "linspace", "lambda"]
Start = Literal["booted", "clean_prior"]
OutputType = Literal["pil", "np", "pt", "latent"]
Tiling = Literal["auto", "on", "off"]
Offload = Literal["none", "model", "sequential", "group"]

ANEW, REFUSED = "anew", "refused"
ALLOWABLE = {
    "base": "the pretrained model: what training leaves as it is, with LoRA the network too; by its files, not places",
    "data": "clips, captions and their order, how they are cut and encoded; by content, not places",
    "batch": "clips of an update: batch size x accumulation x processes, whatever the factors",
    "seed": "the seed",
    "precision": "number formats",
    "objective": "bridge, alignment, noise and dropout",
}
"""What `--allow` takes: names of groups of settings in which a resumed run differs from its checkpoint on demand."""


def is_flow_matching(scheduler: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler's config is for flow matching; several classes are for both kinds of processes."""
    says_so = scheduler.get("use_flow_sigmas") or scheduler.get("prediction_type") == "flow_prediction"
    return bool(says_so) or str(scheduler.get("_class_name")).startswith("FlowMatch")


def noise_share(sampler: str, eta: float | None) -> float:
    """Share of fresh noise in a step: 0 is deterministic, 1 the SDE."""
    return {"sde": 1.0, "dbim": 0.0}[sampler] if eta is None else eta


def sampler_conflicts(sampler: str, order: int, eta: float | None, start: str) -> Iterator[tuple[str, str]]:
    """Yields each setting of the sampler that does not go with the others, and what is wrong with it."""
    share = noise_share(sampler, eta)
    if sampler == "sde" and share != 1:
        yield "eta", f"the sampler sde has eta 1, not {share:g}; for less noise take the sampler dbim"
    if sampler == "sde" and order != 1:
        yield "order", f"the sampler sde has order 1, not {order}; take the sampler dbim"
    if start == "clean_prior" and share < 1:
        what = "from one noise-free point the videos would be (nearly) all the same"
        yield "start", f"clean_prior needs eta 1, not {share:g}: {what}; take booted"
