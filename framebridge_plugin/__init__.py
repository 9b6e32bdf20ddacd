"""FrameBridge image-to-video training and sampling for finetrainers.

Importing this package imports neither torch nor finetrainers: its attributes load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from framebridge_plugin import imports, library_messages, torchvision_repair

# ruff: noqa: F401 (for type checkers alone)
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

__getattr__, __dir__, _names = imports.lazy_attributes(
    __name__,
    {
        "backbones.cogvideox.pipeline": ("FrameBridgeCogVideoXPipeline",),
        "backbones.latte.pipeline": ("FrameBridgeLattePipeline",),
        "backbones.ltx.pipeline": ("FrameBridgeLTXPipeline",),
        "backbones.wan.pipeline": ("FrameBridgeWanPipeline",),
        "schedulers.framebridge_scheduler": ("FrameBridgeScheduler",),
        "training.finetrainers.registration": ("register",),
    },
)
__all__ = sorted(["__version__", *_names])
