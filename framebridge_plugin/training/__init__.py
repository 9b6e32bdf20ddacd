"""What makes finetrainers work today, our specifications and our trainer; only `testing` imports finetrainers too.

The attributes load on first use, after `registration.register()` has made finetrainers importable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from framebridge_plugin.imports import lazy_attributes

# ruff: noqa: F401 (for type checkers alone)
if TYPE_CHECKING:
    from framebridge_plugin.training.specifications import (
        CogVideoXBridgeSpecification,
        LatteBridgeSpecification,
        LTXBridgeSpecification,
        NeuralPriorSpecification,
        WanBridgeSpecification,
    )
    from framebridge_plugin.training.trainer import FrameBridgeTrainer


def _register(module: str) -> None:
    from framebridge_plugin.training.finetrainers.registration import register

    register()


__getattr__, __dir__, __all__ = lazy_attributes(
    __name__,
    {
        "specifications": (
            "CogVideoXBridgeSpecification",
            "LTXBridgeSpecification",
            "LatteBridgeSpecification",
            "NeuralPriorSpecification",
            "WanBridgeSpecification",
        ),
        "trainer": ("FrameBridgeTrainer",),
    },
    _register,
)
