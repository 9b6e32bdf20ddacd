"""The bridge process between the video latent z_0 and the prior latent z_T, in closed form.

Zero drift and g(t)^2 = beta_min + (beta_max - beta_min) t on t in [0, 1] (the "gmax" schedule of Bridge-TTS,
arXiv 2312.03491; FrameBridge, arXiv 2410.15371):

    sigma_t^2 = beta_min t + (beta_max - beta_min) t^2 / 2          sbar_t^2 = sigma_1^2 - sigma_t^2
    q(z_t | z_0, z_T) = N(a z_0 + b z_T, c^2 I)
    a = sbar_t^2 / sigma_1^2      b = sigma_t^2 / sigma_1^2      c = sigma_t sbar_t / sigma_1

The training grid has N indices, t_i = (i + 1) / (N + 1), so that neither end of the process is on it. A continuous
time is a real-valued index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import get_type_hints

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.settings.checking import check_values
from framebridge_plugin.settings.choices import Indices, NonNegative

Index = int | float | torch.Tensor
"""A time: one real-valued index, or one per sample as a [B] tensor."""


@dataclass(frozen=True, eq=False)
class BridgeCoefficients:
    """The process at one time, or at one time per sample: float64 tensors, all of shape [] or all of shape [B].

    Attributes:
        a: Weight of z_0 in the mean, in [0, 1].
        b: Weight of the prior z_T in the mean, 1 - a.
        c: Standard deviation of z_t given both ends.
        sigma: Standard deviation of the un-pinned process, sigma_t.
    """

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    sigma: torch.Tensor

    @property
    def norm(self) -> torch.Tensor:
        """sqrt(a^2 + c^2): what makes z_t - b z_T a variance-preserving sample."""
        return torch.hypot(self.a, self.c)

    @property
    def ratio(self) -> torch.Tensor:
        """Signal-to-noise ratio a / c of z_t - b z_T, decreasing in time."""
        return self.a / self.c

    @property
    def tau(self) -> torch.Tensor:
        """Noise level c / (a + c) of (z_t - b z_T) / (a + c), a sample of a flow-matching path."""
        return self.c / (self.a + self.c)

    @property
    def log_ratio(self) -> torch.Tensor:
        """log(a / c), the variable in which the multistep sampler takes its steps."""
        return self.ratio.log()


@dataclass(frozen=True)
class BridgeSchedule:
    """The noise schedule of the bridge: float64 tables on the CPU and the formulas at any real-valued index.

    Attributes:
        beta_min: g(0)^2, at least 0.
        beta_max: g(1)^2, at least 0 and not 0 together with `beta_min`.
        num_train_timesteps: Number of indices N of the training grid, at least 2.
    """

    beta_min: NonNegative = 0.01
    beta_max: NonNegative = 50.0
    num_train_timesteps: Indices = 1000

    def __post_init__(self) -> None:
        kinds = get_type_hints(BridgeSchedule, include_extras=True)
        for name, value in check_values("bridge schedule", kinds, vars(self)).items():
            object.__setattr__(self, name, value)
        if self.beta_min == self.beta_max == 0:
            raise FrameBridgeError("bridge schedule: beta_max: should be above 0 when beta_min is 0")

    @property
    def last_index(self) -> int:
        """The index nearest to the prior, N - 1."""
        return self.num_train_timesteps - 1

    @property
    def sigma_1_squared(self) -> float:
        """Variance sigma_1^2 of the un-pinned process at its end, (beta_min + beta_max) / 2."""
        return (self.beta_min + self.beta_max) / 2

    @cached_property
    def _table(self) -> BridgeCoefficients:
        return self.coefficients(torch.arange(self.num_train_timesteps, device="cpu"))

    @property
    def a(self) -> torch.Tensor:
        """Weight of z_0 at every index of the grid, float64 [N]."""
        return self._table.a

    @property
    def b(self) -> torch.Tensor:
        """Weight of z_T at every index of the grid, float64 [N]."""
        return self._table.b

    @property
    def c(self) -> torch.Tensor:
        """Standard deviation of z_t at every index of the grid, float64 [N]."""
        return self._table.c

    @property
    def sigma(self) -> torch.Tensor:
        """sigma_t at every index of the grid, float64 [N]."""
        return self._table.sigma

    def coefficients(self, index: Index) -> BridgeCoefficients:
        """Evaluate the closed form, float64, at real-valued indices, a number or a tensor [] or [B], in [0, N - 1];
        values down to -1 (the data, t = 0) and up to N (the prior, t = 1) are defined too, others are refused.
        """
        index = as_float64(index)
        # Not checked on an accelerator, where the answer would have to be waited for: the result there is NaN.
        if index.device.type == "cpu" and not ((index >= -1) & (index <= self.num_train_timesteps)).all():
            raise FrameBridgeError(
                f"bridge index {index.tolist()} is outside the process: indices run from 0 to {self.last_index}"
            )
        t = (index + 1) / (self.num_train_timesteps + 1)
        rest = (self.num_train_timesteps - index) / (self.num_train_timesteps + 1)
        half_slope = (self.beta_max - self.beta_min) / 2
        sigma_squared = t * (self.beta_min + half_slope * t)
        # sigma_1^2 - sigma_t^2 with its factor 1 - t taken out: the difference itself would cancel near t = 1.
        sbar_squared = rest * (self.beta_min + half_slope * (1 + t))
        a = sbar_squared / self.sigma_1_squared
        return BridgeCoefficients(
            a=a,
            b=sigma_squared / self.sigma_1_squared,
            c=torch.sqrt(sigma_squared * a),
            sigma=torch.sqrt(sigma_squared),
        )

    def index_of_ratio(self, ratio: float | torch.Tensor) -> torch.Tensor:
        """Find the real-valued indices, float64 between -1 (infinite ratio) and N (ratio 0), at which a / c has given
        values of at least 0, a number or a tensor [] or [B]: the inverse of `coefficients(index).ratio`.
        """
        ratio = as_float64(ratio)
        # From (a / c)^2 = sbar_t^2 / (sigma_1^2 sigma_t^2) follows sigma_t^2, and t as the root of a quadratic.
        sigma_squared = self.sigma_1_squared / (1 + self.sigma_1_squared * ratio**2)
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * sigma_squared)
        # The form of the quadratic formula without a difference of nearly equal numbers.
        t = (2 * sigma_squared / (self.beta_min + root)).clamp(max=1)
        return t * (self.num_train_timesteps + 1) - 1


def as_float64(value: int | float | torch.Tensor) -> torch.Tensor:
    """Return a number as a tensor on the CPU, whatever the default device is, and a tensor where it is, in float64."""
    if isinstance(value, torch.Tensor):
        return value.to(torch.float64)
    return torch.tensor(value, dtype=torch.float64, device="cpu")


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a table that never changes on a device, copied there once: each copy waits until the device is idle."""
    if table.device == device:
        return table
    copies = _copies.setdefault(table, {})
    if device not in copies:
        copies[device] = table.to(device)
    return copies[device]


def broadcast(coefficient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Shape a coefficient, [] or [B], so that it multiplies a batch [B, ...]: in its dtype or, for half precision, in
    float32, and on its device. One on the CPU, [], goes with every device: copying it would be waited for.
    """
    dtype = widened(tensor.dtype)
    if coefficient.ndim == 0 and coefficient.device.type == "cpu":
        return coefficient.to(dtype)
    return coefficient.to(tensor.device, dtype).reshape(-1, *[1] * (tensor.ndim - 1))


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or float32 for half precision, which is for networks, not for this arithmetic."""
    return torch.promote_types(dtype, torch.float32)


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in at least float32."""
    return tensor.to(widened(tensor.dtype))


def subtract_prior(z_t: torch.Tensor, z_T: torch.Tensor, coefficients: BridgeCoefficients) -> torch.Tensor:
    """Return z_t - b z_T = a z_0 + c eps in at least float32."""
    return widen(z_t) - broadcast(coefficients.b, z_t) * widen(z_T)
