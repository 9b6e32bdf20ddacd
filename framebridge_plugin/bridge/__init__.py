"""The maths of the bridge, on torch alone: schedule, targets, alignment and one-step samplers.

Everything here is a pure function or a small frozen dataclass. Functions take one real-valued index or a [B] tensor of
them; coefficients are float64; arithmetic on latents is done in at least float32.
"""

from framebridge_plugin.bridge.alignment import (
    EDGES,
    Alignment,
    FlowMatchingAlignment,
    NoAlignment,
    VariancePreservingAlignment,
)
from framebridge_plugin.bridge.samplers import (
    GRIDS,
    booted_start,
    dbim_step,
    extrapolate_z_0,
    sde_step,
    timestep_grid,
)
from framebridge_plugin.bridge.schedule import BridgeCoefficients, BridgeSchedule, Index
from framebridge_plugin.bridge.targets import (
    TARGETS,
    compute_target,
    predict_z_0,
    sample_bridge,
    weight_from_v_to_eps_psi,
)

__all__ = [
    "EDGES",
    "GRIDS",
    "TARGETS",
    "Alignment",
    "BridgeCoefficients",
    "BridgeSchedule",
    "FlowMatchingAlignment",
    "Index",
    "NoAlignment",
    "VariancePreservingAlignment",
    "booted_start",
    "compute_target",
    "dbim_step",
    "extrapolate_z_0",
    "predict_z_0",
    "sample_bridge",
    "sde_step",
    "timestep_grid",
    "weight_from_v_to_eps_psi",
]
