"""diffusers schedulers over the bridge."""

from framebridge_plugin.schedulers.framebridge_scheduler import FrameBridgeScheduler, FrameBridgeSchedulerOutput

__all__ = ["FrameBridgeScheduler", "FrameBridgeSchedulerOutput"]
