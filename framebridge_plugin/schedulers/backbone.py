"""The diffusion process that a bridge is aligned to, from the config of the pretrained model's own scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from framebridge_plugin.bridge.alignment import (
    Alignment,
    FlowMatchingAlignment,
    NoAlignment,
    VariancePreservingAlignment,
)
from framebridge_plugin.bridge.schedule import BridgeSchedule
from framebridge_plugin.errors import FrameBridgeError


def build_backbone(config: Mapping[str, Any] | None) -> Any:
    """Build the backbone's own diffusers scheduler.

    Args:
        config: Its config with "_class_name"; None for a bridge without a backbone.

    Returns:
        The scheduler, or None.

    Raises:
        FrameBridgeError: The class is not a scheduler of diffusers, or does not take the config.
    """
    if config is None:
        return None
    name = config.get("_class_name")
    scheduler_class: Any = getattr(diffusers, str(name), None)
    if not hasattr(scheduler_class, "set_timesteps"):
        raise FrameBridgeError(
            f"backbone config: _class_name={name!r} is not a scheduler of diffusers {diffusers.__version__}; "
            "give the content of the model's scheduler/scheduler_config.json"
        )
    try:
        return scheduler_class.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise FrameBridgeError(f"backbone config: {error}; give the model's own scheduler_config.json") from error


def build_alignment(name: str, edge: str, schedule: BridgeSchedule, backbone_config: Any) -> Alignment:
    """Build the alignment of a bridge to a backbone, if the backbone is of that kind.

    Args:
        name: "none", "flow_matching" or "variance_preserving", which needs a backbone.
        edge: See `VariancePreservingAlignment`.
        schedule: The bridge.
        backbone_config: As for `build_backbone`.

    Returns:
        The alignment.

    Raises:
        FrameBridgeError: The backbone is missing, or of another kind.
    """
    if name == "none":
        return NoAlignment()
    backbone = build_backbone(backbone_config)
    found = None if backbone is None else _kind(backbone)
    if name == "flow_matching" and found in (None, name):
        return FlowMatchingAlignment(schedule)
    if name == "variance_preserving" and found == name:
        return VariancePreservingAlignment(schedule, backbone.alphas_cumprod, edge)
    what = "there is none" if backbone is None else f"not of a {type(backbone).__name__} for {found} processes"
    process = "diffusion" if name == "variance_preserving" else "flow-matching"
    raise FrameBridgeError(
        f"alignment={name!r} needs the config of the backbone's own {process} scheduler, {what}: "
        "use FrameBridgeScheduler.from_backbone, or alignment='none'"
    )


def _kind(backbone: Any) -> str:
    """The kind of process by the config, since several classes of diffusers have two of them."""
    config, name = backbone.config, type(backbone).__name__
    is_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if is_flow or name.startswith("FlowMatch"):
        return "flow_matching"
    in_steps = hasattr(backbone, "alphas_cumprod") and config.get("timestep_type", "discrete") == "discrete"
    return "variance_preserving" if in_steps else "other"
