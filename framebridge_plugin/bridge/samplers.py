"""One-step samplers from z_T back to z_0, their time grids and their start, as pure functions.

Notation: a step goes from time s to an earlier time t < s; z_0 is the network's prediction at s, eps standard normal
noise; coefficients carry the letter of their time. Latents are [B, ...], and what comes back has the shape and dtype
of the first. The last step of every sampler has no t: it returns the prediction itself. With
q = sigma_t^2 / sigma_s^2 and lambda = log(a / c),

    sde_step           z_t = q z_s + (1 - q) z_0 + sigma_t sqrt(1 - q) eps
    dbim_step          z_t = a_t z_0 + b_t z_T + sqrt(c_t^2 - rho^2) eps_hat + rho eps
                       eps_hat = (z_s - a_s z_0 - b_s z_T) / c_s,  rho = eta sigma_t sqrt(1 - q)
    extrapolate_z_0    z_0 + (lambda_t - lambda_s) / (2 (lambda_s - lambda_before)) (z_0 - z_0_before)

Every eta has the same marginals: eta = 1 is `sde_step`, eta = 0 the order-1 exponential integrator of the
probability-flow ODE (DDIM in y = z - b z_T).
"""

from __future__ import annotations

from typing import get_args

import torch

from framebridge_plugin.bridge.schedule import BridgeCoefficients, BridgeSchedule, broadcast, widen
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.settings.checking import check_values
from framebridge_plugin.settings.choices import Count, Grid

GRIDS = get_args(Grid)


def timestep_grid(name: str, steps: int, schedule: BridgeSchedule) -> torch.Tensor:
    """Choose the indices at which the network is called.

    Args:
        name: "trailing": every N/steps-th integer index, counted down from N - 1 (999, 979, ..., 19 for 50 of 1000;
            the reference's CogVideoX grid). "linspace": integer indices evenly from N - 1 down to 0 (the reference's
            Latte grid). "lambda": real-valued indices from N - 1 down to 0, uniform in log(a / c).
        steps: Number of network calls, at least 1; at most N for the integer grids.
        schedule: The bridge.

    Returns:
        Strictly decreasing indices, float64 [steps], on the CPU.

    Raises:
        FrameBridgeError: The grid's name is unknown, or it cannot have that many steps.
    """
    steps = check_values("timestep_grid", {"name": Grid, "steps": Count}, {"name": name, "steps": steps})["steps"]
    if name != "lambda" and steps > schedule.num_train_timesteps:
        raise FrameBridgeError(
            f"number of sampling steps is {steps}: the {name} grid has at most {schedule.num_train_timesteps}, "
            "the lambda grid has no limit"
        )
    count = torch.arange(steps, dtype=torch.float64, device="cpu")
    if name == "trailing":
        # The stride as numpy's arange has it, so that ties (48 steps) round as in diffusers' grid of the same name.
        stride = schedule.num_train_timesteps - (schedule.num_train_timesteps - schedule.num_train_timesteps / steps)
        return torch.round(schedule.num_train_timesteps - count * stride) - 1
    fraction = count / max(steps - 1, 1)
    if name == "linspace":
        return torch.round(schedule.last_index * (1 - fraction))
    first = schedule.coefficients(schedule.last_index).log_ratio
    last = schedule.coefficients(0).log_ratio
    grid = schedule.index_of_ratio(torch.exp(first + (last - first) * fraction))
    # The ends are the training grid's own, whatever rounding made of them; a single step is the first.
    grid[-1] = 0
    grid[0] = schedule.last_index
    return grid


def booted_start(z_T: torch.Tensor, eps: torch.Tensor, first: BridgeCoefficients) -> torch.Tensor:
    """Start with the noise that the first index had in training: z_T + c eps (booting, DBIM, arXiv 2405.15885), a draw
    from q(z_t | z_0 = z_T, z_T), off by a (z_0 - z_T) from the truth: next to nothing near the prior.
    """
    return (widen(z_T) + broadcast(first.c, z_T) * widen(eps)).to(z_T.dtype)


def sde_step(
    z_s: torch.Tensor, z_0: torch.Tensor, eps: torch.Tensor, s: BridgeCoefficients, t: BridgeCoefficients
) -> torch.Tensor:
    """Draw from the exact posterior q(z_t | z_s, z_0), as the reference does (FrameBridge, arXiv 2410.15371); the
    prior does not appear, for z_s already says all that it could.
    """
    q = (t.sigma / s.sigma) ** 2
    z_t = broadcast(q, z_s) * widen(z_s) + broadcast(1 - q, z_s) * widen(z_0)
    return (z_t + broadcast(t.sigma * torch.sqrt(1 - q), z_s) * widen(eps)).to(z_s.dtype)


def dbim_step(
    z_s: torch.Tensor,
    z_0: torch.Tensor,
    z_T: torch.Tensor,
    s: BridgeCoefficients,
    t: BridgeCoefficients,
    eta: float = 0.0,
    eps: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take one step of a diffusion bridge implicit model (arXiv 2405.15885, section 4), with a share `eta` of fresh
    noise from 0 to 1, which needs `eps` unless it is 0; for order 2 pass the result of `extrapolate_z_0` as `z_0`.
    """
    q = (t.sigma / s.sigma) ** 2
    # c_t^2 - rho^2 over c_s^2, written as a sum of positive terms: the difference would cancel at eta = 1.
    keep = t.sigma / s.sigma * torch.sqrt((1 - eta**2) * (1 - q) / s.a + q)
    z_t = broadcast(keep, z_s) * widen(z_s) + broadcast(t.a - keep * s.a, z_s) * widen(z_0)
    z_t = z_t + broadcast(t.b - keep * s.b, z_s) * widen(z_T)
    if eta > 0:
        if eps is None:
            raise FrameBridgeError(f"a DBIM step with eta={eta} draws noise: pass eps, or eta=0")
        z_t = z_t + broadcast(eta * t.sigma * torch.sqrt(1 - q), z_s) * widen(eps)
    return z_t.to(z_s.dtype)


def extrapolate_z_0(
    z_0: torch.Tensor,
    z_0_before: torch.Tensor,
    before: BridgeCoefficients,
    s: BridgeCoefficients,
    t: BridgeCoefficients,
) -> torch.Tensor:
    """Extrapolate the prediction to the middle of the coming step, from the last two: order 2 at no network call
    (DPM-Solver++(2M), arXiv 2211.01095, on y = z - b z_T); it takes the place of `z_0` in `dbim_step`.
    """
    weight = (t.log_ratio - s.log_ratio) / (2 * (s.log_ratio - before.log_ratio))
    return (widen(z_0) + broadcast(weight, z_0) * (widen(z_0) - widen(z_0_before))).to(z_0.dtype)
