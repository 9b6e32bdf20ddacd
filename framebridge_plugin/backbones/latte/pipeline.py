"""Image and class to video with Latte: as a bridge, on a neural prior or not, and as the matched diffusion baseline.

Layouts: B batch, F frames, C channels, H and W height and width of the pixels, h and w those of the latents.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image

from framebridge_plugin.backbones.bridge_pipeline import BridgePipeline
from framebridge_plugin.backbones.encoding import encode_frames
from framebridge_plugin.backbones.facts import KnownClasses
from framebridge_plugin.backbones.folders import LORA_FILE
from framebridge_plugin.backbones.latte.adapter import LatteAdapter
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE
from framebridge_plugin.backbones.latte.networks import call_latte
from framebridge_plugin.backbones.latte.rules import compression_of
from framebridge_plugin.backbones.sampling_loop import (
    ImageInput,
    InParts,
    Times,
    call_defaults,
    check_generator,
    common_batch_size,
    images_to_pixels,
    repeat_batch,
)
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.settings.checking import checked
from framebridge_plugin.settings.choices import Count, FrameRate, NonNegative, OutputType, Tiling

ClassInput = int | str | list[int | str]


@dataclass
class FrameBridgeLattePipelineOutput(BaseOutput):
    """What a call of `FrameBridgeLattePipeline` returns.

    Attributes:
        frames: The videos, as `output_type` says: lists of PIL images, an array [B, F, H, W, 3] in [0, 1], a tensor
            [B, F, 3, H, W] in [0, 1], or latents [B, F, C, h, w].
    """

    frames: torch.Tensor | np.ndarray | list[list[Image.Image]]


class FrameBridgeLattePipeline(BridgePipeline, DiffusionPipeline, LoraBaseMixin):
    """Image and class to video with a Latte network, frame by frame in the latents of an image autoencoder.

    With a `FrameBridgeScheduler` it runs the bridge backwards (FrameBridge, arXiv 2410.15371): from the image's
    latent, repeated over the frames, or, if the network takes one, from the video of the neural prior. With a
    CogVideoX scheduler it samples the diffusion baseline, which has the same network but starts from noise. Without a
    transformer the neural prior's own video is the result.

    Args:
        vae: Image autoencoder.
        transformer: The network of stage "bridge".
        scheduler: `FrameBridgeScheduler`, or for the diffusion baseline a DDIM or DPM scheduler, CogVideoX's or
            diffusers' own: `DDIMScheduler` clamps z_0 by `clip_sample`, `DPMSolverMultistepScheduler` has order 2.
        neural_prior: The network of stage "neural_prior"; for a transformer that takes its video, or alone.
        num_inference_steps: Steps with which it is sampled by default; None, here and below, takes Latte's.
        guidance_scale: Weight of the guidance with which it is sampled by default.
        fps: Frames per second at which its videos are to be shown: the rate of its training clips.

    Raises:
        FrameBridgeError: If a component is missing, or two do not fit each other.
    """

    adapter = LatteAdapter
    output_class = FrameBridgeLattePipelineOutput
    model_cpu_offload_seq = "neural_prior->transformer->vae"
    _optional_components = ["transformer", "scheduler", "neural_prior"]  # noqa: RUF012 (diffusers' way to say it)
    _callback_tensor_inputs = ["latents", "image_latents", "neural_prior"]  # noqa: RUF012
    _lora_loadable_modules = ["transformer", "neural_prior"]  # noqa: RUF012

    @checked
    def __init__(
        self,
        vae: Any,
        transformer: Any = None,
        scheduler: Any = None,
        neural_prior: Any = None,
        num_inference_steps: Count | None = None,
        guidance_scale: NonNegative | None = None,
        fps: FrameRate | None = None,
    ) -> None:
        super().__init__()
        components = {"vae": vae, "transformer": transformer, "scheduler": scheduler, "neural_prior": neural_prior}
        self._set_up(components, fps, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        _check_components(vae=vae, transformer=transformer, neural_prior=neural_prior)
        self.register_modules(**components)
        self.vae_scale_factor = compression_of(vae.config)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    @checked
    def __call__(
        self,
        image: ImageInput,
        class_label: ClassInput,
        num_inference_steps: Count | None = None,
        timesteps: Times | None = None,
        guidance_scale: NonNegative | None = None,
        num_videos_per_image: Count = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        batch_size: Count | None = None,
        tiling: Tiling = "auto",
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> Any:
        """Generates videos that start at the given images.

        Size and number of frames are those that the model was trained on.

        Args:
            image: One image for all classes or one for each: files, PIL images, arrays [H, W, 3] or [B, H, W, 3],
                tensors [3, H, W] or [B, 3, H, W]. Floats are in [0, 1] (those in [-1, 1] are refused), uint8 and
                uint16 have their own range, transparency is put on white. The shorter side is resized to fit, the
                centre is cropped, as in training.
            class_label: One class for all images or one for each: names that the model knows, or labels; "" is no
                class.
            num_inference_steps: Calls of the network (twice as many with guidance); by default what the model says,
                else 1000 as the reference. A neural prior alone is called once.
            timesteps: Their times, in place of their number: indices of the bridge, falling.
            guidance_scale: Weight w of uncond + w (cond - uncond) on the network's output, where uncond has the null
                label; 1 or less switches it off. By default what the model says, else 7. The neural prior is called
                without guidance.
            num_videos_per_image: Videos for each pair of image and class.
            generator: The source of every draw; a list gives one to each video. By default one with a fresh seed.
            latents: Where the sampler starts, [B, F, C, h, w], in place of the scheduler's own start.
            batch_size: Inputs of one call of the network, of which a video with guidance has two; with 1 each has a
                call of its own. By default all, and fewer once an accelerator's memory ends.
            tiling: Whether frames are decoded by overlapping tiles, for less memory and slightly other pixels: "on",
                "off", or "auto" (if `vae.enable_tiling()` was called).
            output_type: "pil", "np", "pt" (in [0, 1], [B, F, 3, H, W]) or "latent" (float32 [B, F, C, h, w]).
            return_dict: Whether to return a `FrameBridgeLattePipelineOutput` or a plain tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; what it
                returns under "latents" replaces them.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, of "latents",
                "image_latents" and "neural_prior"; by default ["latents"].

        Returns:
            A `FrameBridgeLattePipelineOutput` with the videos as `.frames`, or a tuple whose only element they are.

        Raises:
            FrameBridgeError: If the model does not know a class, or a number or a size does not fit.
        """
        num_inference_steps, guidance_scale = call_defaults(self, num_inference_steps, timesteps, guidance_scale)
        for name in callback_on_step_end_tensor_inputs or []:
            if name not in self._callback_tensor_inputs:
                raise FrameBridgeError(f"the callback can have {', '.join(self._callback_tensor_inputs)}, not {name}")
        config = self._network.config
        _, height, width = self._default_clip()
        image_BCHW = images_to_pixels(image, height, width)
        classes = class_label if isinstance(class_label, list) else [class_label]
        labels = [_label_of(given, self._network) for given in classes]
        num_videos = common_batch_size(len(image_BCHW), len(labels), "classes") * num_videos_per_image
        generator = check_generator(generator, num_videos)
        device = self._execution_device

        # One draw of the posterior for each video, and the only one: prior, condition and neural prior share it.
        image_latents = encode_frames(self.vae, repeat_batch(image_BCHW, num_videos).unsqueeze(1), generator, device)
        class_labels = repeat_batch(torch.tensor(labels, device=device), num_videos)
        neural_prior = None
        if self.neural_prior is not None:
            still = image_latents.expand(-1, config.num_frames, -1, -1, -1)
            neural_prior = self._call_neural_prior(still, class_labels, batch_size)

        if self.transformer is None:
            video_latents: Any = neural_prior
        else:
            video_latents = self.denoise(
                image_latents=image_latents,
                class_labels=class_labels,
                neural_prior=neural_prior,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                guidance_scale=guidance_scale,
                generator=generator,
                latents=latents,
                batch_size=batch_size,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )
        return self._result(video_latents, output_type, return_dict, tiling)

    def _call_neural_prior(self, still: torch.Tensor, labels: torch.Tensor, batch_size: int | None) -> torch.Tensor:
        parts = InParts(
            lambda part: lambda latents: call_latte(self.neural_prior, latents, None, labels[part]),
            len(still),
            batch_size,
        )
        found = parts(still)
        self.last_batch_size = parts.at_once
        return found

    @torch.no_grad()
    def denoise(
        self,
        image_latents: torch.Tensor,
        class_labels: torch.Tensor,
        neural_prior: torch.Tensor | None = None,
        num_inference_steps: int = 1000,
        guidance_scale: float = 7.0,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        **loop: Any,
    ) -> torch.Tensor:
        """The sampling loop on latents: what `__call__` runs between encoding and decoding.

        Args:
            image_latents: Latents of the images, one for each video, [B, 1, C, h, w].
            class_labels: Labels [B], int64.
            neural_prior: Videos of the neural prior [B, F, C, h, w], for a network that takes them; then they are the
                end point z_T of the bridge, in place of the repeated image.
            num_inference_steps: Calls of the network.
            guidance_scale: Weight of classifier-free guidance on the class; 1 or less switches it off.
            callback_on_step_end_tensor_inputs: As in `__call__`.
            **loop: `timesteps`, `generator`, `latents`, `batch_size` and `callback_on_step_end`, as in `__call__`.

        Returns:
            Float32 latents of the videos, [B, F, C, h, w].
        """
        prior = neural_prior
        if prior is None:
            prior = image_latents.expand(-1, self.transformer.config.num_frames, -1, -1, -1)
        null_labels = torch.full_like(class_labels, self.transformer.null_label)
        return self._denoise(
            self.transformer,
            image_latents,
            prior,
            {"class_labels": class_labels},
            {"class_labels": null_labels},
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            callback_tensors={"image_latents": image_latents, "neural_prior": neural_prior},
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
            **loop,
        )

    @property
    def guidance_scale(self) -> float:
        """Weight of the guidance in the call that is running."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call that is running."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The time of the step that is running."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are left out; a callback may set `_interrupt`."""
        return self._interrupt

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads LoRA layers as diffusers does, for the network that they were trained on; refuses those of another
        model.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, str | os.PathLike) and (Path(source) / LORA_FILE).is_file():
            kwargs.setdefault("weight_name", LORA_FILE)
        state_dict, metadata = CogVideoXLoraLoaderMixin.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        name = next(
            (name for name in self._lora_loadable_modules if any(key.startswith(f"{name}.") for key in state_dict)),
            None,
        )
        network = getattr(self, name or "", None)
        if network is None:
            raise FrameBridgeError(
                f"these LoRA layers are for {name or 'another model'}, which this pipeline does not have; open the "
                "base model that they were trained on"
            )
        network.load_lora_adapter(
            state_dict, prefix=name, adapter_name=adapter_name, metadata=metadata, hotswap=hotswap, _pipeline=self
        )

    def _default_clip(self) -> tuple[int, int, int]:
        """Frames, height and width of the videos."""
        config, scale = self._network.config, self.vae_scale_factor
        return config.num_frames, config.sample_height * scale, config.sample_width * scale

    @property
    def _network(self) -> LatteTransformer:
        """The network whose output is the video."""
        return self.transformer if self.transformer is not None else self.neural_prior


def _check_components(**networks: Any) -> None:
    """Refuses components that do not belong together."""
    configs = {name: network.config for name, network in networks.items() if network is not None}
    if "vae" not in configs or configs.keys() == {"vae"}:
        raise FrameBridgeError("a Latte pipeline needs a vae, and a transformer or a neural_prior")
    for part, problem in LATTE_BRIDGE.problems(configs):
        raise FrameBridgeError(f"{part} {problem}")


def _label_of(given: int | str, network: LatteTransformer) -> int:
    """The label of a class that is given by its name or its label; the null label of the empty text."""
    if given == "":
        return network.null_label
    config = network.config
    # A number is a label even where a class has such a name.
    names = () if isinstance(given, int) else tuple(config.class_names or ())
    problem = KnownClasses(config.num_classes, names).problem(str(given))
    if problem:
        raise FrameBridgeError(f"class_label: {problem}")
    label = network.label_of(given) if isinstance(given, str) else given
    assert label is not None
    return label
