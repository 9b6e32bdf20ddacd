"""The repairs of finetrainers, one module for each part of it that they concern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Repair:
    """One repair of finetrainers or of what it stands on."""

    name: str
    """Short name, as `finetrainers doctor` prints it."""

    reason: str
    """What it does and why, in one line."""

    needed: Callable[[], bool]
    """Whether the fault is there; nothing is touched if it is not."""

    apply: Callable[[], object]
    """Repairs it."""
