"""FrameBridge image-to-video training and sampling for finetrainers.

Importing this package imports neither torch nor finetrainers: its attributes load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from framebridge_plugin import imports, library_messages, torchvision_repair

if TYPE_CHECKING:
    from framebridge_plugin.backbones.cogvideox.pipeline import FrameBridgeCogVideoXPipeline
    from framebridge_plugin.backbones.latte.pipeline import FrameBridgeLattePipeline
    from framebridge_plugin.backbones.ltx.pipeline import FrameBridgeLTXPipeline
    from framebridge_plugin.backbones.wan.pipeline import FrameBridgeWanPipeline
    from framebridge_plugin.schedulers.framebridge_scheduler import FrameBridgeScheduler
    from framebridge_plugin.training.finetrainers.registration import register

__version__ = "0.1.0"

library_messages.hold_back()
torchvision_repair.repair_on_import()
imports.defer_imports()

_MODULE_OF_ATTRIBUTE = {
    "FrameBridgeCogVideoXPipeline": "framebridge_plugin.backbones.cogvideox.pipeline",
    "FrameBridgeLTXPipeline": "framebridge_plugin.backbones.ltx.pipeline",
    "FrameBridgeLattePipeline": "framebridge_plugin.backbones.latte.pipeline",
    "FrameBridgeScheduler": "framebridge_plugin.schedulers.framebridge_scheduler",
    "FrameBridgeWanPipeline": "framebridge_plugin.backbones.wan.pipeline",
    "register": "framebridge_plugin.training.finetrainers.registration",
}

__all__ = [
    "FrameBridgeCogVideoXPipeline",
    "FrameBridgeLTXPipeline",
    "FrameBridgeLattePipeline",
    "FrameBridgeScheduler",
    "FrameBridgeWanPipeline",
    "__version__",
    "register",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF_ATTRIBUTE:
        return getattr(importlib.import_module(_MODULE_OF_ATTRIBUTE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
