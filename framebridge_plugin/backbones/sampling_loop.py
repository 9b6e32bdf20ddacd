"""What the image-to-video pipelines share: their arguments as they come in, and the sampling loop on latents.

Layouts: B batch, T latent frames, C channels, H and W height and width (of latents or pixels).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.folders import config_problem
from framebridge_plugin.errors import FrameBridgeError, say
from framebridge_plugin.media import pictures_levels
from framebridge_plugin.processes import is_first
from framebridge_plugin.progress import Progress
from framebridge_plugin.resizing import resize_and_crop
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.schedulers.process import times_of_batch

Picture = str | Path | Image.Image | np.ndarray | torch.Tensor
ImageInput = Annotated[Picture | Sequence[Picture], "checked where it is read"]
Times = Sequence[float] | torch.Tensor | np.ndarray
Generators = torch.Generator | list[torch.Generator]


_WHOLE_STEPS = (CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler)
"""Schedulers that step by num_train_timesteps // num_inference_steps, wherever the next time is."""
_HOST = torch.device("cpu")
"""Where times are: schedulers look at each, and an accelerator's values have to be waited for."""


def check_scheduler(scheduler: Any, facts: BackboneFacts, was_bridge: bool = False) -> None:
    """Refuses a scheduler by which the networks of a backbone cannot be sampled; `was_bridge`: the pipeline was built
    with a bridge, so that its network is no diffusion model.
    """
    if isinstance(scheduler, FrameBridgeScheduler):
        if scheduler.config.alignment not in ("none", facts.process):
            raise FrameBridgeError(
                f"the scheduler is aligned to a {scheduler.config.alignment} process, that of a {facts.title} is "
                f"{facts.process}; build it by FrameBridgeScheduler.from_backbone of the model's own scheduler"
            )
        return
    if scheduler is None:
        raise FrameBridgeError("a transformer needs the scheduler that it was trained with")
    name, bridge = type(scheduler).__name__, FrameBridgeScheduler.__name__
    if was_bridge:
        raise FrameBridgeError(
            f"a {name} is no bridge, which the model was built with; change its sampler by {bridge}.from_config("
            "pipeline.scheduler.config, sampler=..., grid=...)"
        )
    problem = config_problem({"_class_name": name, **getattr(scheduler, "config", {})}, "scheduler", facts)
    if problem:
        raise FrameBridgeError(
            f"a {name} is no bridge; give a {bridge}, or for a diffusion baseline the scheduler that it was saved with"
        )


def images_to_pixels(image: ImageInput, height: int, width: int) -> torch.Tensor:
    """Pixels in [-1, 1], [B, 3, height, width], of one image or several, resized and cropped as clips are."""
    pixels = [torch.from_numpy(levels_HWC).permute(2, 0, 1) for levels_HWC in pictures_levels(image)]
    if not pixels:
        raise FrameBridgeError("no image given; pass at least one")
    return torch.cat([resize_and_crop(item.unsqueeze(0), height, width) for item in pixels]) * 2.0 - 1.0


def common_batch_size(num_images: int, num_conditions: int, name: str) -> int:
    """How many pairs of image and text or class there are, where one of either may serve for all."""
    batch_size = max(num_images, num_conditions)
    if {num_images, num_conditions} - {1, batch_size}:
        raise FrameBridgeError(f"{num_images} images but {num_conditions} {name}; give one for all, or one for each")
    return batch_size


def call_defaults(
    pipeline: Any, num_inference_steps: int | None, timesteps: Any, guidance_scale: float | None
) -> tuple[int, float]:
    """Steps and guidance of a call: what it was asked for, else what the model says, else the backbone's own."""
    if num_inference_steps is not None and timesteps is not None:
        raise FrameBridgeError("give either num_inference_steps or timesteps")
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    steps, scale = (
        next(value for value in (given[name], pipeline.config[name], default) if value is not None)
        for name, default in pipeline.adapter.facts.default_call.items()
    )
    return int(steps), float(scale)


def repeat_batch(tensor: Any, batch_size: int) -> Any:
    """Repeats every sample in its place, up to `batch_size`; None stays None."""
    return None if tensor is None else tensor.repeat_interleave(batch_size // tensor.shape[0], dim=0)


class InParts:
    """A function of batches, called with a part of their rows at a time.

    Where an accelerator's memory ends the parts are halved, down to one row, and the call is made again.

    Args:
        bind: The function for some of the rows, of their tensors.
        rows: How many there are.
        at_once: The most rows of a part; by default all.
        may_halve: Whether it may be called more often than that, which a network on several devices may not.
    """

    def __init__(
        self,
        bind: Callable[[slice], Callable[..., torch.Tensor]],
        rows: int,
        at_once: int | None = None,
        may_halve: bool = True,
    ) -> None:
        self.bind, self.rows, self.may_halve = bind, rows, may_halve
        self.at_once = min(rows, at_once or rows)
        self._bound: dict[int, Callable[..., torch.Tensor]] = {}

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Calls the function on all rows."""
        while True:
            try:
                return torch.cat([self._call(first, tensors) for first in range(0, self.rows, self.at_once)])
            except torch.OutOfMemoryError:
                if self.at_once == 1 or not self.may_halve:
                    raise
            self.at_once, self._bound = (self.at_once + 1) // 2, {}
            say(f"out of memory: {self.at_once} at once in a call of the network from here on")

    def _call(self, first: int, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        part = slice(first, first + self.at_once)
        if first not in self._bound:
            self._bound[first] = self.bind(part)
        return self._bound[first](*(tensor[part] for tensor in tensors))


def check_generator(generator: Generators | None, num_videos: int) -> Generators:
    """The source of a call's draws, one with a fresh seed if the caller gave none."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, list) and len(generator) != num_videos:
        raise FrameBridgeError(f"{len(generator)} generators for {num_videos} samples: pass one, or one per sample")
    return generator


def guide(output: torch.Tensor, scale: float) -> torch.Tensor:
    """uncond + scale (cond - uncond), of an output [2 B, ...] whose unconditional half comes first."""
    unconditional, conditional = output.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def dynamic_scale(scale: float, time: float, num_inference_steps: int) -> float:
    """The weight of one step under `use_dynamic_cfg`, by the formula of diffusers' CogVideoX pipelines."""
    progress = (num_inference_steps - time) / num_inference_steps
    return 1 + scale * (1 - math.cos(math.pi * progress**5.0)) / 2


def sample_latents(
    pipeline: Any,
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prior: torch.Tensor,
    *,
    num_inference_steps: int,
    timesteps: Times | None = None,
    guidance_scale: float,
    use_dynamic_cfg: bool = False,
    generator: Generators | None = None,
    latents: torch.Tensor | None = None,
    callback_on_step_end: Callable[..., dict] | None = None,
    callback_tensors: Mapping[str, torch.Tensor | None] | None = None,
    callback_tensor_inputs: list[str] | None = None,
) -> torch.Tensor:
    """The sampling loop: from the prior back along the bridge, or from noise for the diffusion baseline.

    `network` gives the output [B, T, C, H, W] for (latents, time [B]), all else being bound; with guidance its batch
    is twice as large, the unconditional half first. The result is float32 latents of the shape of `prior`. A callback
    is called as `callback(pipeline, step, timestep, tensors)`; what it returns under "latents" replaces them.
    """
    pipeline._interrupt = False
    scheduler, device = pipeline.scheduler, prior.device
    check_scheduler(scheduler, pipeline.adapter.facts, getattr(pipeline, "_was_bridge", False))
    is_bridge = isinstance(scheduler, FrameBridgeScheduler)
    guided = guidance_scale > 1.0
    pipeline._guidance_scale = guidance_scale
    if timesteps is None:
        grid = {"num_inference_steps": num_inference_steps}
        if not is_bridge:
            grid = pipeline.adapter.baseline_times(scheduler, num_inference_steps, prior.shape)
        scheduler.set_timesteps(**grid, device=_HOST)
        if isinstance(scheduler, _WHOLE_STEPS) and scheduler.config.timestep_spacing == "trailing":
            count = scheduler.config.num_train_timesteps
            _warn_of_uneven_steps(type(scheduler).__name__, count, num_inference_steps)
    elif is_bridge:
        scheduler.set_timesteps(timesteps=timesteps, device=_HOST)
    else:
        raise FrameBridgeError(f"timesteps: a {type(scheduler).__name__} takes none; give num_inference_steps")
    if latents is not None:
        latents = _check_latents(latents, prior)
    elif is_bridge:
        latents = scheduler.initial_latent(prior, generator=generator)
    else:
        latents = randn_tensor(prior.shape, generator=generator, device=device)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)

    times, step_arguments = scheduler.timesteps, inspect.signature(scheduler.step).parameters
    pipeline._num_timesteps = len(times)
    old_pred_original_sample = None
    with sampling_progress(pipeline, len(times)) as progress_bar:
        for i, t in enumerate(times):
            if pipeline.interrupt:
                continue
            pipeline._current_timestep = t
            if is_bridge:
                network_latents, network_time = scheduler.align(latents, prior, t)
            else:
                network_latents, network_time = latents, times_of_batch(t, latents)
            if use_dynamic_cfg:
                time = scheduler.alignment.timestep(t) if is_bridge else t
                pipeline._guidance_scale = dynamic_scale(guidance_scale, time.item(), len(times))
            if guided:
                network_latents, network_time = torch.cat([network_latents] * 2), torch.cat([network_time] * 2)
            output = network(network_latents, network_time)
            if guided:
                output = guide(output, pipeline._guidance_scale)

            if is_bridge:
                latents = scheduler.step(output, t, latents, prior, generator=generator).prev_sample
            elif isinstance(scheduler, CogVideoXDPMScheduler):
                latents, old_pred_original_sample = scheduler.step(
                    output,
                    old_pred_original_sample,
                    t,
                    times[i - 1] if i > 0 else None,
                    latents,
                    generator=generator,
                    return_dict=False,
                )
            else:
                draws = {"generator": generator} if "generator" in step_arguments else {}
                latents = scheduler.step(output, t, latents, **draws).prev_sample
            latents = latents.float()

            if callback_on_step_end is not None:
                available = {"latents": latents, **(callback_tensors or {})}
                tensors = {name: available[name] for name in callback_tensor_inputs or ["latents"]}
                latents = _check_latents(callback_on_step_end(pipeline, i, t, tensors).get("latents", latents), prior)
            progress_bar.update()
    pipeline._current_timestep = None
    return latents


@functools.cache
def _warn_of_uneven_steps(name: str, count: int, steps: int) -> None:
    """Says once that diffusers' own steps miss the times that it calls the network at by a hundredth or more."""
    stride = count // steps
    if is_first() and stride and count / steps >= 1.01 * stride:
        near = min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - steps))
        short = f"diffusers' {name} takes each {1 - stride * steps / count:.0%} too short"
        say(f"warning: {steps} steps do not divide {count}: {short}, and the videos keep noise; take {near} steps")


def _check_latents(latents: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    if latents.shape != prior.shape:
        raise FrameBridgeError(f"latents: have the shape {list(latents.shape)}; they should have {list(prior.shape)}")
    return latents.to(device=prior.device, dtype=torch.float32)


def sampling_progress(pipeline: Any, steps: int) -> Progress:
    """The progress of a call, as `pipeline.set_progress_bar_config` says."""
    config = dict(getattr(pipeline, "_progress_bar_config", {}))
    return Progress(steps, config.pop("desc", None) or "Sampling", **{"unit": "step", **config})
