"""A conformance suite for finetrainers model specifications, anybody's: in pytest, or as `finetrainers conformance`.

    from framebridge_plugin.testing import SpecificationConformance

    class TestMySpecification(SpecificationConformance):
        specification_class = MySpecification
        model_folder = "path/to/a/tiny/model"

The attributes load on first use, after `framebridge_plugin.register()` has made finetrainers importable.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framebridge_plugin.testing.command import run_conformance
    from framebridge_plugin.testing.for_pytest import SpecificationConformance
    from framebridge_plugin.testing.known_faults import KNOWN_FAULTS
    from framebridge_plugin.testing.outcome import Check, ConformanceFailure, KnownFault, Result, run_check
    from framebridge_plugin.testing.subject import Subject
    from framebridge_plugin.testing.suite import CHECKS

_MODULE_OF_ATTRIBUTE = {
    "CHECKS": "suite",
    "Check": "outcome",
    "ConformanceFailure": "outcome",
    "KNOWN_FAULTS": "known_faults",
    "KnownFault": "outcome",
    "Result": "outcome",
    "SpecificationConformance": "for_pytest",
    "Subject": "subject",
    "run_check": "outcome",
    "run_conformance": "command",
}

__all__ = [
    "CHECKS",
    "KNOWN_FAULTS",
    "Check",
    "ConformanceFailure",
    "KnownFault",
    "Result",
    "SpecificationConformance",
    "Subject",
    "run_check",
    "run_conformance",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_ATTRIBUTE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULE_OF_ATTRIBUTE[name]
    if module != "command":
        # The command checks its arguments before anything heavy is imported.
        from framebridge_plugin.training.finetrainers.registration import register

        register()
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
