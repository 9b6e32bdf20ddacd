"""A conformance suite for finetrainers model specifications, anybody's: in pytest, or as `finetrainers conformance`.

    from framebridge_plugin.testing import SpecificationConformance

    class TestMySpecification(SpecificationConformance):
        specification_class = MySpecification
        model_folder = "path/to/a/tiny/model"

The attributes load on first use, after `framebridge_plugin.register()` has made finetrainers importable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from framebridge_plugin.imports import lazy_attributes

# ruff: noqa: F401 (for type checkers alone)
if TYPE_CHECKING:
    from framebridge_plugin.testing.command import run_conformance
    from framebridge_plugin.testing.for_pytest import SpecificationConformance
    from framebridge_plugin.testing.known_faults import KNOWN_FAULTS
    from framebridge_plugin.testing.outcome import Check, ConformanceFailure, KnownFault, Result, run_check
    from framebridge_plugin.testing.subject import Subject
    from framebridge_plugin.testing.suite import CHECKS


def _register(module: str) -> None:
    if module != "command":  # which checks its arguments before anything heavy is imported
        from framebridge_plugin.training.finetrainers.registration import register

        register()


__getattr__, __dir__, __all__ = lazy_attributes(
    __name__,
    {
        "suite": ("CHECKS",),
        "outcome": ("Check", "ConformanceFailure", "KnownFault", "Result", "run_check"),
        "known_faults": ("KNOWN_FAULTS",),
        "for_pytest": ("SpecificationConformance",),
        "subject": ("Subject",),
        "command": ("run_conformance",),
    },
    _register,
)
