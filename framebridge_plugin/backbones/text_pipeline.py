"""The pipelines of text-to-video backbones: one call for all of them, over diffusers' own pipeline of each.

Layouts: B batch, F video frames, T latent frames, C channels, H and W height and width (of latents or pixels).
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.backbones.bridge_pipeline import BridgePipeline
from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.folders import two_file_problem
from framebridge_plugin.backbones.opening import load_components
from framebridge_plugin.backbones.sampling_loop import (
    ImageInput,
    Times,
    call_defaults,
    check_generator,
    common_batch_size,
    images_to_pixels,
    repeat_batch,
)
from framebridge_plugin.errors import FrameBridgeError, say
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.settings.checking import checked, unknown_name
from framebridge_plugin.settings.choices import Count, FrameRate, NonNegative, OutputType, Tiling

_CLIP = ("num_frames", "height", "width")


class TextBridgePipeline(BridgePipeline):
    """Image-to-video with a widened text-to-video network, over diffusers' own pipeline of its backbone.

    With a `FrameBridgeScheduler` it runs the bridge backwards, from the latent of the still image to the video
    (FrameBridge, arXiv 2410.15371). With a scheduler of the backbone's own kind it samples the diffusion baseline,
    which has the same network and the same image condition but starts from noise.

    Text encoding, LoRA loading, slicing, tiling and offloading are diffusers' own.

    Args:
        tokenizer: The backbone's tokenizer.
        text_encoder: Its text encoder.
        vae: Its video autoencoder.
        transformer: The widened network: input channels [aligned latent, image latent].
        scheduler: `FrameBridgeScheduler`, or a scheduler of the backbone's kind for the diffusion baseline.
        num_frames: Frames that the model was trained on, the default of a call.
        height: Height in pixels that it was trained on, the default of a call.
        width: Width in pixels that it was trained on, the default of a call.
        num_inference_steps: Steps with which it is sampled by default; None, here and below, takes the backbone's.
        guidance_scale: Weight of the guidance with which it is sampled by default.
        fps: Frames per second at which its videos are to be shown: the rate of its training clips.

    Raises:
        FrameBridgeError: If a component is of another kind, the network is not widened, or a setting is out of range.
    """

    encode_prompt: Any
    check_inputs: Any
    vae_scale_factor_temporal: int

    @checked
    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        num_frames: Count | None = None,
        height: Count | None = None,
        width: Count | None = None,
        num_inference_steps: Count | None = None,
        guidance_scale: NonNegative | None = None,
        fps: FrameRate | None = None,
    ) -> None:
        components = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "transformer": transformer}
        components["scheduler"] = scheduler
        clip = {"num_frames": num_frames, "height": height, "width": width}
        calls = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self._set_up(components, fps, **clip, **calls)
        parent: Any = super()
        parent.__init__(**components)
        if transformer is None:
            return
        if problem := self.adapter.facts.config_problem("transformer", transformer.config):
            raise FrameBridgeError(f"the transformer {problem}")
        if transformer.config.in_channels != 2 * transformer.config.out_channels:
            raise FrameBridgeError(
                f"the transformer has {transformer.config.in_channels} input channels, a FrameBridge model has "
                f"{2 * transformer.config.out_channels}; train one with `finetrainers train`, or give a fine-tuned "
                "transformer folder"
            )

    @classmethod
    def _open(cls, saved: SavedModel, settings: dict[str, Any]) -> Any:
        base, plain = saved.base, cls.adapter.facts.plain
        assert base is not None
        if saved.takes_no_image:
            network = cls.adapter.facts.network
            saved = dataclasses.replace(saved, components={**saved.components, network: saved.folder(network)})
        components = settings | load_components(saved, cls._loaders(), settings)
        index = saved.read(base / "model_index.json")
        if "scheduler" not in components and index.get("_class_name") != cls.__name__:
            bridge = {name: value for name, value in plain.items() if name not in (*_CLIP, "fps")}
            components["scheduler"] = FrameBridgeScheduler.from_backbone(
                saved.read(base / "scheduler" / "scheduler_config.json"), **bridge
            )
            say(
                f"the model has no bridge settings: the reference's are used (target {plain['target']}, SNR-aligned, "
                f"beta .01 to 50; clips of {plain['num_frames']} frames of {plain['height']} x {plain['width']})"
            )
        for name in _CLIP:
            of_lora = None if saved.info is None else getattr(saved.info, name)
            components.setdefault(name, of_lora or index.get(name) or plain[name])
        return super()._open(dataclasses.replace(saved, components={}, lora=None), components)

    @torch.no_grad()
    @checked
    def __call__(
        self,
        image: ImageInput,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: Count | None = None,
        width: Count | None = None,
        num_frames: Count | None = None,
        num_inference_steps: Count | None = None,
        timesteps: Times | None = None,
        guidance_scale: NonNegative | None = None,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: Count = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        batch_size: Count | None = None,
        tiling: Tiling = "auto",
        output_type: OutputType = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: Count | None = None,
        **embeds: Any,
    ) -> Any:
        """Generates videos that start at the given images.

        Args:
            image: One image for all prompts or one for each: files, PIL images, arrays [H, W, 3] or [B, H, W, 3],
                tensors [3, H, W] or [B, 3, H, W]. Floats are in [0, 1] (those in [-1, 1] are refused), uint8 and
                uint16 have their own range, transparency is put on white. The shorter side is resized to fit, the
                centre is cropped, as in training.
            prompt: One text for all images or one for each; exclusive with `prompt_embeds`.
            negative_prompt: What to steer away from; by default the empty text.
            height: Height in pixels; by default what the model was trained on.
            width: Width in pixels; by default what the model was trained on.
            num_frames: Number of frames, as the backbone's autoencoder takes them (8 k + 1 for CogVideoX, 4 k + 1 for
                Wan); by default what the model was trained on.
            num_inference_steps: Calls of the network (twice as many with guidance); by default what the model says,
                else the backbone's.
            timesteps: Their times, in place of their number: indices of the bridge, falling.
            guidance_scale: Weight w of uncond + w (cond - uncond), on the text only; 1 or less switches it off. By
                default what the model says, else the backbone's.
            use_dynamic_cfg: Whether that weight changes from step to step, as in diffusers' CogVideoX pipelines, with
                the time that the network is told.
            num_videos_per_prompt: Videos for each pair of image and prompt.
            generator: The source of every draw; a list gives one to each video. By default one with a fresh seed.
            latents: Where the sampler starts, [B, T, C, h, w], in place of the scheduler's own start.
            prompt_embeds: Text embeddings [B, L, D] in place of `prompt`.
            negative_prompt_embeds: Text embeddings of the negative prompt.
            batch_size: Inputs of one call of the network, of which a video with guidance has two; with 1 each has a
                call of its own. By default all, and fewer once an accelerator's memory ends.
            tiling: Whether frames are decoded by overlapping tiles, for less memory and slightly other pixels: "on",
                "off", or "auto", above 256 x 256 pixels or if `vae.enable_tiling()` was called.
            output_type: "pil", "np", "pt" (in [0, 1], [B, F, 3, H, W]) or "latent" (float32 [B, T, C, h, w]).
            return_dict: Whether to return the output of diffusers' own pipeline or a plain tuple.
            attention_kwargs: Passed to the attention processors (LoRA's `scale`).
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; what it
                returns under "latents" replaces them.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets; by default ["latents"].
            max_sequence_length: Tokens of a prompt; by default those of the backbone.
            **embeds: Further arguments of diffusers' own `encode_prompt`, where it has some (attention masks).

        Returns:
            The output of diffusers' own pipeline with the videos as `.frames`, or a tuple whose only element they are.

        Raises:
            FrameBridgeError: If an argument is unknown or of the wrong type, or a size or a number does not fit.
        """
        own = {*inspect.signature(type(self).__call__).parameters, *inspect.signature(self.encode_prompt).parameters}
        if problem := unknown_name(embeds, own - {"embeds", "device", "do_classifier_free_guidance"}):
            raise FrameBridgeError(f"{type(self).__name__}: {problem}")
        num_inference_steps, guidance_scale = call_defaults(self, num_inference_steps, timesteps, guidance_scale)
        is_embedded = prompt_embeds is not None and (negative_prompt_embeds is not None or guidance_scale <= 1)
        remedy = "give it (for the text also prompt_embeds and negative_prompt_embeds)"
        for part in ("transformer", "vae", *(() if is_embedded else ("text_encoder", "tokenizer"))):
            if getattr(self, part) is None:
                raise FrameBridgeError(f"{type(self).__name__} has no {part}, which a call needs; {remedy}")
        config, facts = self.transformer.config, self.adapter.facts
        given_clip = zip((num_frames, height, width), self._default_clip(), strict=True)
        num_frames, height, width = (default if given is None else given for given, default in given_clip)
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        rule = facts.clip_rule(self.vae.config, config)
        for name, problem in rule.problems(num_frames, height, width):
            raise FrameBridgeError(f"{name}: {problem}")
        image_BCHW = images_to_pixels(image, height, width)
        if isinstance(prompt, str):
            prompt = [prompt]
        num_prompts = len(prompt) if prompt is not None else 1 if prompt_embeds is None else prompt_embeds.shape[0]
        num_pairs = common_batch_size(image_BCHW.shape[0], num_prompts, "prompts")
        num_videos = num_pairs * num_videos_per_prompt
        generator = check_generator(generator, num_videos)
        if prompt is not None and num_prompts == 1:
            prompt = prompt * num_pairs
        given = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "negative_prompt": negative_prompt,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            **embeds,
        }
        taken = inspect.signature(self.check_inputs).parameters
        self.check_inputs(**{name: value for name, value in given.items() if name in taken})
        self._attention_kwargs = attention_kwargs
        device = self._execution_device

        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt]
        if negative_prompt is not None and len(negative_prompt) == 1:
            negative_prompt = negative_prompt * (len(prompt) if prompt is not None else num_prompts)
        encoding = {
            "max_sequence_length": max_sequence_length or self.adapter.max_sequence_length(config),
            "device": device,
            **embeds,
        }
        guided = guidance_scale > 1.0
        conditions: tuple[Mapping[str, torch.Tensor | None], ...]
        given_embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        if prompt is None or embeds or negative_prompt_embeds is not None:
            encoded = self.encode_prompt(
                prompt, negative_prompt, do_classifier_free_guidance=guided, **given_embeds, **encoding
            )
            conditions = self.adapter.text_conditions(encoded)
        else:
            conditions = self._encode_texts(prompt, (negative_prompt or [""] * num_pairs) if guided else [], encoding)
        positive, negative = (
            {name: repeat_batch(value, num_videos) for name, value in some.items()} for some in conditions
        )

        num_latent_frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        # One at a time, and each picture once: a backbone may encode a whole video of it.
        distinct, places = image_BCHW.unique(dim=0, return_inverse=True)
        stills = [self.adapter.encode_still(self.vae, one, num_frames, device) for one in distinct.split(1)]
        image_latents = repeat_batch(torch.cat(stills)[places], num_videos)
        image_latents = image_latents.expand(-1, num_latent_frames, -1, -1, -1)
        latents = self.denoise(
            image_latents,
            image_latents,
            positive.pop("encoder_hidden_states"),
            negative.pop("encoder_hidden_states"),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            attention_kwargs=attention_kwargs,
            conditions=positive,
            negative_conditions=negative,
            timesteps=timesteps,
            use_dynamic_cfg=use_dynamic_cfg,
            generator=generator,
            latents=latents,
            batch_size=batch_size,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        return self._result(latents, output_type, return_dict, tiling)

    def _encode_texts(
        self, prompts: list[str], negatives: list[str], encoding: Mapping[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
        """The conditions of prompts and of negative ones, or of none of these; each distinct text is encoded once."""
        if len(negatives) not in (0, len(prompts)):
            problem = "give one for all, or one for each"
            raise FrameBridgeError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; {problem}")
        rows = {text: row for row, text in enumerate(dict.fromkeys([*prompts, *negatives]))}
        encoded = self.encode_prompt(list(rows), None, do_classifier_free_guidance=False, **encoding)
        found, _ = self.adapter.text_conditions(encoded)
        positive = {name: value[[rows[text] for text in prompts]] for name, value in found.items()}
        negative = [rows[text] for text in negatives]
        return positive, {name: value[negative] if negative else None for name, value in found.items()}

    @torch.no_grad()
    def denoise(
        self,
        image_latents: torch.Tensor,
        prior: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        attention_kwargs: dict[str, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
        negative_conditions: Mapping[str, Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        **loop: Any,
    ) -> torch.Tensor:
        """The sampling loop on latents: what a call runs between encoding and decoding.

        Args:
            image_latents: Latents of the still condition image, [B, T, C, h, w].
            prior: End point z_T of the bridge, [B, T, C, h, w]; not used by the diffusion baseline.
            prompt_embeds: Text embeddings [B, L, D].
            negative_prompt_embeds: Text embeddings of the negative prompt; needed with guidance.
            num_inference_steps: Calls of the network.
            guidance_scale: Weight of classifier-free guidance on the text; 1 or less switches it off.
            attention_kwargs: Passed to the attention processors.
            conditions: What else the network is told, by the names of its arguments.
            negative_conditions: The same for the negative prompt.
            callback_on_step_end_tensor_inputs: As in `__call__`.
            **loop: `timesteps`, `use_dynamic_cfg`, `generator`, `latents`, `batch_size`, `callback_on_step_end`: as in
                `__call__`.

        Returns:
            Float32 latents of the videos, [B, T, C, h, w].
        """
        # Not transformer.dtype, that of the first weight: LoRA training keeps the input projection in float32.
        dtype = self.transformer.get_submodule(self.adapter.text_layer).weight.dtype
        negative = None
        if negative_prompt_embeds is not None:
            negative = {"encoder_hidden_states": negative_prompt_embeds.to(dtype), **(negative_conditions or {})}
        return self._denoise(
            self.transformer,
            image_latents,
            prior,
            {"encoder_hidden_states": prompt_embeds.to(dtype), **(conditions or {})},
            negative,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            network_settings=None if attention_kwargs is None else {"attention_kwargs": attention_kwargs},
            callback_tensors={"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds},
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
            **loop,
        )

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Loads LoRA layers as diffusers does; refuses the folder of an earlier version, where they are not all."""
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, str | os.PathLike):
            folder = Path(source).parent if os.path.isfile(source) else Path(source, kwargs.get("subfolder") or "")
            if (problem := two_file_problem(folder)) is not None:
                raise FrameBridgeError(problem)
        parent: Any = super()
        parent.load_lora_weights(source, *args, **kwargs)

    def _default_clip(self) -> tuple[int, int, int]:
        """Frames, height and width of a call that does not say them."""
        plain = self.adapter.facts.plain
        num_frames, height, width = (self.config[name] or plain[name] for name in _CLIP)
        return num_frames, height, width
