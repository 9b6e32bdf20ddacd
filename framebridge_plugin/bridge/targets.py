"""What the network predicts, and the way back from its output to z_0 (FrameBridge, arXiv 2410.15371).

    name      target                                  z_0 from the output
    v         (a eps - c z_0) / n                     (a / n) (z_t - b z_T) / n - (c / n) output
    eps_psi   (z_t - z_0) / sigma                     z_t - sigma output
    noise     eps                                     (z_t - b z_T - c output) / a
    data      z_0                                     output
    flow      eps - z_0                               (z_t - b z_T) / (a + c) - tau output

with n = sqrt(a^2 + c^2) and tau = c / (a + c). "flow" is the velocity of flow-matching backbones. All five carry the
same information and convert into each other exactly; `noise` loses digits near the prior, where a is small. All
tensors are [B, ...]; coefficients are scalars or [B]. Arithmetic is done in at least float32, results come back in the
dtype of the inputs.
"""

from __future__ import annotations

from typing import get_args

import torch

from framebridge_plugin.bridge.schedule import BridgeCoefficients, broadcast, subtract_prior, widen
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.settings.choices import Target

TARGETS = get_args(Target)


def sample_bridge(
    z_0: torch.Tensor, z_T: torch.Tensor, eps: torch.Tensor, coefficients: BridgeCoefficients
) -> torch.Tensor:
    """Draw from q(z_t | z_0, z_T): z_t = a z_0 + b z_T + c eps, with standard normal noise eps."""
    k = coefficients
    z_t = broadcast(k.a, z_0) * widen(z_0) + broadcast(k.b, z_0) * widen(z_T) + broadcast(k.c, z_0) * widen(eps)
    return z_t.to(z_0.dtype)


def compute_target(
    target: str,
    z_0: torch.Tensor,
    z_t: torch.Tensor,
    z_T: torch.Tensor,
    eps: torch.Tensor,
    coefficients: BridgeCoefficients,
) -> torch.Tensor:
    """Compute what the network is trained to return, with z_t = a z_0 + b z_T + c eps; refuses an unknown name."""
    k = coefficients
    if target == "v":
        out = broadcast(k.a / k.norm, z_0) * widen(eps) - broadcast(k.c / k.norm, z_0) * widen(z_0)
    elif target == "eps_psi":
        out = (widen(z_t) - widen(z_0)) / broadcast(k.sigma, z_0)
    elif target == "noise":
        out = eps
    elif target == "data":
        out = z_0
    elif target == "flow":
        out = widen(eps) - widen(z_0)
    else:
        raise FrameBridgeError(_unknown(target))
    return out.to(z_0.dtype)


def predict_z_0(
    target: str,
    output: torch.Tensor,
    z_t: torch.Tensor,
    z_T: torch.Tensor,
    coefficients: BridgeCoefficients,
) -> torch.Tensor:
    """Turn the network's output at z_t into its prediction of z_0: the inverse of `compute_target`."""
    k = coefficients
    if target == "v":
        y = subtract_prior(z_t, z_T, k)
        z_0 = broadcast(k.a / k.norm**2, z_t) * y - broadcast(k.c / k.norm, z_t) * widen(output)
    elif target == "eps_psi":
        z_0 = widen(z_t) - broadcast(k.sigma, z_t) * widen(output)
    elif target == "noise":
        z_0 = (subtract_prior(z_t, z_T, k) - broadcast(k.c, z_t) * widen(output)) / broadcast(k.a, z_t)
    elif target == "data":
        z_0 = output
    elif target == "flow":
        z_0 = subtract_prior(z_t, z_T, k) / broadcast(k.a + k.c, z_t) - broadcast(k.tau, z_t) * widen(output)
    else:
        raise FrameBridgeError(_unknown(target))
    return z_0.to(z_t.dtype)


def weight_from_v_to_eps_psi(coefficients: BridgeCoefficients) -> torch.Tensor:
    """Compute the factor, float64, that turns a squared error on v into the squared error on eps_psi: c^2 / (sigma^2
    (a^2 + c^2)), and because c^2 = sigma^2 a also a / (a^2 + c^2), which loses no digits near either end.
    """
    return coefficients.a / coefficients.norm**2


def _unknown(target: str) -> str:
    return f"unknown target {target!r}: choose one of {', '.join(TARGETS)}"
