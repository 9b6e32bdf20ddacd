"""The names that settings choose among, and the sampler's rules: what a scheduler asks too; no pydantic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Target = Literal["v", "eps_psi", "noise", "data", "flow"]
AlignmentName = Literal["variance_preserving", "flow_matching", "none"]
AlignmentEdge = Literal["exact", "reference"]
Sampler = Literal["sde", "dbim"]
Order = Literal[1, 2]
Grid = Literal["trailing", "linspace", "lambda"]
Start = Literal["booted", "clean_prior"]


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
