"""What makes finetrainers work today, our specifications and our trainer; only `testing` imports finetrainers too.

The attributes load on first use, after `registration.register()` has made finetrainers importable.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framebridge_plugin.training.specifications import (
        CogVideoXBridgeSpecification,
        LatteBridgeSpecification,
        LTXBridgeSpecification,
        NeuralPriorSpecification,
        WanBridgeSpecification,
    )
    from framebridge_plugin.training.trainer import FrameBridgeTrainer

_MODULE_OF_ATTRIBUTE = {
    "CogVideoXBridgeSpecification": "framebridge_plugin.training.specifications",
    "FrameBridgeTrainer": "framebridge_plugin.training.trainer",
    "LTXBridgeSpecification": "framebridge_plugin.training.specifications",
    "LatteBridgeSpecification": "framebridge_plugin.training.specifications",
    "NeuralPriorSpecification": "framebridge_plugin.training.specifications",
    "WanBridgeSpecification": "framebridge_plugin.training.specifications",
}

__all__ = [
    "CogVideoXBridgeSpecification",
    "FrameBridgeTrainer",
    "LTXBridgeSpecification",
    "LatteBridgeSpecification",
    "NeuralPriorSpecification",
    "WanBridgeSpecification",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF_ATTRIBUTE:
        from framebridge_plugin.training.finetrainers.registration import register

        register()
        return getattr(importlib.import_module(_MODULE_OF_ATTRIBUTE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
