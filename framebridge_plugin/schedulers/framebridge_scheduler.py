"""A diffusers scheduler over the bridge: the settings of a model, its training targets and its sampler.

The maths is in `framebridge_plugin.bridge`; this class chooses among it by name, saves the choice beside the model,
and keeps the little state that a sampling loop has. As in every diffusers scheduler the loop is

    scheduler.set_timesteps(50, device)
    latents = scheduler.initial_latent(prior, generator)
    for t in scheduler.timesteps:
        network_input, network_time = scheduler.align(latents, prior, t)
        output = ...
        latents = scheduler.step(output, t, latents, prior, generator).prev_sample

A loop that was written for another scheduler of diffusers needs three changes, since a bridge has an end point and
`timesteps` are its indices:

    scheduler.set_prior(prior)                                        # once; `step` then needs no prior
    latents = prior + scheduler.init_noise_sigma * noise              # not the noise alone
    ... = transformer(scheduler.scale_model_input(latents, t), scheduler.alignment.timestep(t).expand(batch), ...)

Every draw comes from the caller's generator; without one, a step that draws is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from framebridge_plugin.bridge.samplers import (
    booted_start,
    dbim_step,
    extrapolate_z_0,
    sde_step,
    timestep_grid,
)
from framebridge_plugin.bridge.schedule import BridgeCoefficients, BridgeSchedule, widen, widened
from framebridge_plugin.bridge.targets import predict_z_0
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers.backbone import as_json, build_alignment, build_backbone, default_alignment
from framebridge_plugin.schedulers.process import BridgeProcess
from framebridge_plugin.settings.checking import checked, unknown_name
from framebridge_plugin.settings.choices import (
    AlignmentEdge,
    AlignmentName,
    Count,
    Grid,
    Indices,
    NonNegative,
    Order,
    Sampler,
    Share,
    Start,
    Target,
    noise_share,
    sampler_conflicts,
)


@dataclass
class FrameBridgeSchedulerOutput(BaseOutput):
    """What one sampling step returns.

    Attributes:
        prev_sample: The latents at the next, earlier time of the grid, [B, ...]; after the last step the video's.
        pred_original_sample: The prediction of the video latents z_0 at this step, of the same shape.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class FrameBridgeScheduler(BridgeProcess, SchedulerMixin, ConfigMixin):  # the two differ on config_name
    """The bridge from a still image's latents to a video's (FrameBridge, arXiv 2410.15371), as a diffusers scheduler.

    Args:
        beta_min: g(0)^2 of the bridge, at least 0.
        beta_max: g(1)^2 of the bridge, at least 0.
        num_train_timesteps: Number of bridge indices of training, N.
        target: What the network returns: "v", "eps_psi", "noise", "data", or "flow", which a flow-matching backbone
            returns.
        alignment: What the network is shown: "variance_preserving" or "flow_matching" (SNR-aligned to a backbone of
            that kind) or "none" (z_t and its index). By default the kind of the `backbone`, "none" without one.
        alignment_edge: "exact", or "reference" for the authors' rule near the highest ratios of a variance-preserving
            backbone.
        backbone: Config of the pretrained backbone's own diffusers scheduler, its "_class_name" included. Needed for
            an alignment, whose time is in the backbone's unit: diffusion steps, or `num_train_timesteps` tau for flow
            matching.
        sampler: "sde" (the reference's) or "dbim".
        order: 1, or 2 for the multistep dbim sampler.
        eta: Share of fresh noise in a dbim step, from 0 to 1, by default 0. The sde is eta = 1.
        grid: "trailing", "linspace" or "lambda", see `timestep_grid`.
        start: "booted" (the prior with the noise of the first index) or "clean_prior" (the bare prior, as the
            reference).

    Attributes:
        order: Network calls per step, which diffusers' pipelines ask for: 1, whatever `config.order` is.

    Raises:
        FrameBridgeError: A value is unknown or out of range, or two of them exclude each other.
    """

    order = 1

    @checked
    @register_to_config
    def __init__(
        self,
        beta_min: NonNegative = 0.01,
        beta_max: NonNegative = 50.0,
        num_train_timesteps: Indices = 1000,
        target: Target = "v",
        alignment: AlignmentName | None = None,
        alignment_edge: AlignmentEdge = "exact",
        backbone: dict[str, Any] | None = None,
        sampler: Sampler = "sde",
        order: Order = 1,
        eta: Share | None = None,
        grid: Grid = "trailing",
        start: Start = "booted",
    ) -> None:
        backbone_scheduler = None if alignment == "none" else build_backbone(backbone)
        if alignment is None:
            alignment = default_alignment(backbone_scheduler)
        self.register_to_config(alignment=alignment, backbone=as_json(backbone))
        for name, message in sampler_conflicts(sampler, order, eta, start):
            raise FrameBridgeError(f"FrameBridgeScheduler: {name}: {message}")
        self.eta = noise_share(sampler, eta)
        self.schedule = BridgeSchedule(beta_min, beta_max, num_train_timesteps)
        self.alignment = build_alignment(alignment, alignment_edge, self.schedule, backbone_scheduler)
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.num_inference_steps: int | None = None
        self._grid: list[float] = []
        self._position = 0
        self._previous: tuple[torch.Tensor, BridgeCoefficients] | None = None

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps

    # Loading

    @classmethod
    def from_backbone(
        cls, scheduler_or_config: SchedulerMixin | Mapping[str, Any], **settings: Any
    ) -> FrameBridgeScheduler:
        """Build the bridge for a pretrained diffusion or flow-matching model.

        Args:
            scheduler_or_config: The model's own diffusers scheduler, or its config with "_class_name".
            **settings: Arguments of this class, all but `backbone`.

        Returns:
            The scheduler, aligned to the backbone unless the settings say otherwise. A flow-matching backbone's own
            output is target="flow".
        """
        config: Any = getattr(scheduler_or_config, "config", scheduler_or_config)
        if not isinstance(config, Mapping):
            raise FrameBridgeError(f"{cls.__name__}.from_backbone: give a scheduler or its config, not {config!r}")
        class_name = config.get("_class_name", type(scheduler_or_config).__name__)
        backbone = {key: value for key, value in config.items() if not key.startswith("_")}
        return cls(backbone={"_class_name": class_name, **backbone}, **settings)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build the scheduler from a config, refusing keys that it does not have (diffusers only warns).

        Args:
            config: A config of this class, as `.config` or `from_pretrained` gives it.
            return_unused_kwargs: Return the pair of the scheduler and a dictionary, as diffusers does.
            **kwargs: Arguments of this class that replace those of the config.

        Returns:
            The scheduler, or the pair.

        Raises:
            FrameBridgeError: A key is unknown, or the config belongs to another scheduler.
        """
        class_name = config.get("_class_name", cls.__name__) if isinstance(config, Mapping) else cls.__name__
        if class_name != cls.__name__:
            raise FrameBridgeError(
                f"this is the config of a {class_name}, not of a {cls.__name__}: use {cls.__name__}.from_backbone "
                "to build a bridge for that model"
            )
        known = cls._get_init_keys(cls) - {"self"}
        keys = (key for key in [*(config or {}), *kwargs] if not key.startswith("_"))
        if problem := unknown_name(keys, known, "key"):
            raise FrameBridgeError(f"{cls.__name__} config: {problem}")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # Sampling

    @checked
    def set_timesteps(
        self,
        num_inference_steps: Count | None = None,
        device: str | int | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | np.ndarray | None = None,
    ) -> None:
        """Choose the times of the network calls and forget the run before.

        Args:
            num_inference_steps: Number of network calls, at least 1; at most N for the integer grids.
            device: Where `timesteps` shall be. A step looks at its time: on the CPU that waits for nothing.
            timesteps: The times themselves, in place of their number: bridge indices in [0, N - 1], falling.

        Raises:
            FrameBridgeError: Neither or both are given, or the times do not fall or are no indices.
        """
        # float32 here and everywhere below, so that the network and the sampler mean the very same time.
        if num_inference_steps is not None and timesteps is None:
            grid = timestep_grid(self.config["grid"], num_inference_steps, self.schedule).to(torch.float32)
        elif num_inference_steps is not None or timesteps is None:
            raise FrameBridgeError("set_timesteps: give either num_inference_steps or timesteps")
        else:
            grid = torch.as_tensor(timesteps, dtype=torch.float32, device="cpu")
            if (
                grid.ndim != 1
                or not len(grid)
                or not (grid.diff() < 0).all()
                or not 0 <= grid[-1] <= grid[0] < len(self)
            ):
                raise FrameBridgeError(
                    f"timesteps: should be bridge indices that fall, from at most {len(self) - 1} to at least 0"
                )
        self.num_inference_steps = len(grid)
        self.timesteps = grid.to(device)
        self._grid = grid.tolist()
        self._position = 0
        self._previous = None

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise in the start, prior + init_noise_sigma noise: 0 for `clean_prior`."""
        if self.config["start"] == "clean_prior":
            return 0.0
        return float(self.schedule.coefficients(self._grid[0] if self._grid else len(self) - 1).c)

    def initial_latent(
        self, prior: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Make the latents at the first time of the grid.

        Args:
            prior: Prior latents z_T [B, ...].
            generator: Where the booted start's noise comes from, one or one per sample. Not needed for `clean_prior`.

        Returns:
            The latents to start from, of the shape and dtype of `prior`.

        Raises:
            FrameBridgeError: The start needs a generator and none is given, or `set_timesteps` was not called.
        """
        if not self._grid:
            raise FrameBridgeError("FrameBridgeScheduler: call set_timesteps before initial_latent")
        if self.config["start"] == "clean_prior":
            return prior
        return booted_start(prior, self._draw(prior, generator), self.schedule.coefficients(self._grid[0]))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        prior: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FrameBridgeSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Go from one time of the grid to the next; the last step returns the prediction of the video latents.

        Args:
            model_output: The network's output at `timestep`, [B, ...].
            timestep: One of `timesteps`.
            sample: The latents at `timestep`, of the same shape.
            prior: Prior latents z_T, of the same shape; None takes those of `set_prior`.
            generator: Where the step's noise comes from, one or one per sample. Not needed where none is drawn: in the
                last step, and with eta = 0.
            return_dict: Return an output object rather than a tuple.

        Returns:
            `prev_sample` and `pred_original_sample`, both of the shape and dtype of `sample`.
        """
        prior = self._prior_of(sample, prior)
        self._find_position(float(timestep))
        s = self.schedule.coefficients(self._grid[self._position])
        wide = widen(sample)
        z_0 = predict_z_0(self.config["target"], model_output, wide, prior, s)
        if self._position == len(self._grid) - 1:
            next_sample = z_0
        else:
            t = self.schedule.coefficients(self._grid[self._position + 1])
            next_sample = self._step_to(t, s, wide, z_0, prior, generator)
        self._position += 1
        self._previous = (z_0, s)
        result = (next_sample.to(sample.dtype), z_0.to(sample.dtype))
        return FrameBridgeSchedulerOutput(*result) if return_dict else result

    def _step_to(
        self,
        t: BridgeCoefficients,
        s: BridgeCoefficients,
        z_s: torch.Tensor,
        z_0: torch.Tensor,
        prior: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        if self.config["sampler"] == "sde":
            return sde_step(z_s, z_0, self._draw(z_s, generator), s, t)
        if self.config["order"] == 2 and self._previous is not None:
            z_0 = extrapolate_z_0(z_0, *self._previous, s, t)
        eps = self._draw(z_s, generator) if self.eta > 0 else None
        return dbim_step(z_s, z_0, prior, s, t, self.eta, eps)

    def _find_position(self, timestep: float) -> None:
        """Take the next place on the grid, or look the time up where a loop starts again or jumps."""
        if self._position < len(self._grid) and self._grid[self._position] == timestep:
            return
        if timestep not in self._grid:
            raise FrameBridgeError(
                f"FrameBridgeScheduler: time {timestep:g} is not on the grid of {len(self._grid)} steps; "
                "call set_timesteps and pass its timesteps one by one"
            )
        self._position = self._grid.index(timestep)
        # The prediction of another time than the one before is no base for an extrapolation.
        self._previous = None

    @staticmethod
    def _draw(like: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """Draw standard normal noise from the caller's generators, in at least float32."""
        if generator is None:
            raise FrameBridgeError(
                "FrameBridgeScheduler draws noise only from the caller's generator: pass generator=torch.Generator()"
                ".manual_seed(...), or one per sample"
            )
        if isinstance(generator, list) and len(generator) != len(like):
            raise FrameBridgeError(f"{len(generator)} generators for {len(like)} samples: pass one, or one per sample")
        source = generator[0].device if isinstance(generator, list) else generator.device
        noise = randn_tensor(tuple(like.shape), generator=generator, device=source, dtype=widened(like.dtype))
        if source.type != "cpu" or like.device.type == "cpu":
            return noise.to(like.device)
        # Else the copy would be waited for, and with it the network.
        return (noise.pin_memory() if like.is_cuda else noise).to(like.device, non_blocking=True)
