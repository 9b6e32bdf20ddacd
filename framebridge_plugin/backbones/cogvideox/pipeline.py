"""Image-to-video with a channel-expanded CogVideoX, as a bridge or as the matched diffusion baseline.

Layouts: B batch, T latent frames, C channels, H and W height and width (of latents or pixels).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput
from transformers import T5EncoderModel, T5Tokenizer

from framebridge_plugin.backbones.cogvideox.facts import COGVIDEOX, config_problem
from framebridge_plugin.backbones.encoding import encode_image, latent_scale
from framebridge_plugin.backbones.facts import ClipShapeRule
from framebridge_plugin.backbones.folders import plain_problem, read_json, two_file_problem
from framebridge_plugin.backbones.opening import find_model, load_components, opening, say
from framebridge_plugin.backbones.sampling_loop import (
    ImageInput,
    call_defaults,
    check_generator,
    check_output_type,
    check_scheduler,
    common_batch_size,
    images_to_pixels,
    repeat_batch,
    sample_latents,
)
from framebridge_plugin.backbones.saving import SavingWithoutLora
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.media import DEFAULT_FPS
from framebridge_plugin.models.calling import call_transformer
from framebridge_plugin.models.widening import load_bridge_transformer
from framebridge_plugin.schedulers import FrameBridgeScheduler

_LOADERS: dict[str, Callable[..., Any]] = {
    "transformer": load_bridge_transformer,
    "vae": AutoencoderKLCogVideoX,
    "text_encoder": T5EncoderModel,
    "tokenizer": T5Tokenizer,
}
_REFERENCE_CLIP = {"num_frames": 17, "height": 256, "width": 256}


class FrameBridgeCogVideoXPipeline(SavingWithoutLora, CogVideoXPipeline):
    """Image-to-video pipeline for a CogVideoX transformer with doubled input channels.

    With a `FrameBridgeScheduler` it runs the bridge backwards, from the latent of the still image to the video
    (FrameBridge, arXiv 2410.15371). With a CogVideoX scheduler it samples the diffusion baseline, which has the same
    network and the same image condition but starts from noise.

    Text encoding, latent decoding, LoRA loading, slicing, tiling and offloading are diffusers' own.

    Args:
        tokenizer: T5 tokenizer.
        text_encoder: T5 encoder.
        vae: Video autoencoder.
        transformer: The widened network: input channels [aligned latent, image latent].
        scheduler: `FrameBridgeScheduler`, or CogVideoX's DDIM or DPM scheduler for the diffusion baseline.
        num_frames: Frames that the model was trained on, the default of a call.
        height: Height in pixels that it was trained on, the default of a call.
        width: Width in pixels that it was trained on, the default of a call.
        num_inference_steps: Steps with which it is sampled by default; None, here and below, takes `default_call`.
        guidance_scale: Weight of the guidance with which it is sampled by default.
        fps: Frames per second at which its videos are to be shown: the rate of its training clips.
    """

    default_call: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 6.0}

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLCogVideoX,
        transformer: CogVideoXTransformer3DModel,
        scheduler: FrameBridgeScheduler | CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        fps: float = DEFAULT_FPS,
    ) -> None:
        check_scheduler(scheduler)
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self._was_bridge = isinstance(scheduler, FrameBridgeScheduler)
        self.register_to_config(num_frames=num_frames, height=height, width=width, fps=fps)
        self.register_to_config(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        if transformer is not None and (problem := config_problem("transformer", transformer.config)):
            raise FrameBridgeError(f"the transformer {problem}")
        if transformer is not None and transformer.config.in_channels != 2 * transformer.config.out_channels:
            raise FrameBridgeError(
                f"the transformer has {transformer.config.in_channels} input channels, a FrameBridge model has "
                f"{2 * transformer.config.out_channels}; train one with `finetrainers train`, or give a fine-tuned "
                "transformer folder"
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        base_model: str | os.PathLike | None = None,
        allow_other_base: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Opens a run, a model or a LoRA.

        A plain text-to-video model is widened and gets the reference's bridge and clips (17 frames of 256 x 256),
        which is said on stderr: what it lacks is the training, so load a LoRA or weights into it.

        Args:
            pretrained_model_name_or_path: The folder of a run (of an unfinished one the newest checkpoint is taken),
                of a model or of a LoRA, or the hub id of a model or a LoRA. A LoRA is loaded into the model that it
                was trained on.
            base_model: Where that is now, a folder or a hub id; by default where it was.
            allow_other_base: Whether the LoRA may be loaded into another model than that.
            **kwargs: As in diffusers: `dtype`, `revision`, `cache_dir`, components by their names, ...

        Returns:
            The pipeline, on the CPU.

        Raises:
            FrameBridgeError: If something is missing, damaged or of another kind, or the LoRA's base model is another
                one.
        """
        with opening(pretrained_model_name_or_path):
            saved = find_model(
                pretrained_model_name_or_path,
                (COGVIDEOX,),
                kwargs,
                base_model=base_model,
                allow_other_base=allow_other_base,
            )
            base = saved.base
            assert base is not None
            if "transformer" not in kwargs and plain_problem(base / "transformer"):
                saved = saved._replace(components={"transformer": base / "transformer", **saved.components})
            components = kwargs | load_components(saved, _LOADERS, kwargs)
            index = read_json(base / "model_index.json")
            has_bridge = index.get("_class_name") == cls.__name__
            if "scheduler" not in components and not has_bridge:
                backbone = read_json(base / "scheduler" / "scheduler_config.json")
                components["scheduler"] = FrameBridgeScheduler.from_backbone(
                    backbone, target="v", alignment_edge="reference"
                )
                say(
                    "the model has no bridge settings: the reference's are used "
                    "(target v, SNR-aligned, beta .01 to 50; clips of 17 frames of 256 x 256)"
                )
            for name, reference_value in _REFERENCE_CLIP.items():
                of_lora = None if saved.info is None else getattr(saved.info, name)
                components.setdefault(name, of_lora or index.get(name) or reference_value)
            pipeline = super().from_pretrained(base, **components)
            if saved.info is not None and saved.info.fps is not None and "fps" not in kwargs:
                pipeline.register_to_config(fps=saved.info.fps)
            if saved.lora is not None:
                pipeline.load_lora_weights(saved.lora)
        return pipeline

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int | None = None,
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
            num_frames: Number of frames, 8 k + 1 for CogVideoX; by default what the model was trained on.
            num_inference_steps: Calls of the network (twice as many with guidance); by default what the model says,
                else 50.
            timesteps: Their times, in place of their number: indices of the bridge, falling.
            guidance_scale: Weight w of uncond + w (cond - uncond), on the text only; 1 or less switches it off. By
                default what the model says, else 6.
            use_dynamic_cfg: Whether that weight changes from step to step, as in diffusers' CogVideoX pipelines, with
                the time that the network is told.
            num_videos_per_prompt: Videos for each pair of image and prompt.
            generator: The source of every draw; a list gives one to each video. By default one with a fresh seed.
            latents: Where the sampler starts, [B, T, C, h, w], in place of the scheduler's own start.
            prompt_embeds: Text embeddings [B, L, D] in place of `prompt`.
            negative_prompt_embeds: Text embeddings of the negative prompt.
            output_type: "pil", "np", "pt" (in [0, 1], [B, F, 3, H, W]) or "latent" (float32 [B, T, C, h, w]).
            return_dict: Whether to return a `CogVideoXPipelineOutput` or a plain tuple.
            attention_kwargs: Passed to the attention processors (LoRA's `scale`).
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; what it
                returns under "latents" replaces them.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets; by default ["latents"].
            max_sequence_length: Tokens of a prompt; by default what the transformer was built for.

        Returns:
            A `CogVideoXPipelineOutput` with the videos as `.frames`, or a tuple whose only element they are.

        Raises:
            FrameBridgeError: If a size or the number of frames or images does not fit.
        """
        config = self.transformer.config
        check_output_type(output_type)
        height = height or self.config.height or config.sample_height * self.vae_scale_factor_spatial
        width = width or self.config.width or config.sample_width * self.vae_scale_factor_spatial
        num_frames = num_frames or self.config.num_frames or config.sample_frames
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        rule = ClipShapeRule(2 * self.vae_scale_factor_temporal, self.vae_scale_factor_spatial * config.patch_size)
        for name, problem in rule.problems(num_frames, height, width):
            raise FrameBridgeError(f"{name}: {problem}")
        image_BCHW = images_to_pixels(image, height, width)
        if isinstance(prompt, str):
            prompt = [prompt]
        num_prompts = len(prompt) if prompt is not None else 1 if prompt_embeds is None else prompt_embeds.shape[0]
        batch_size = common_batch_size(image_BCHW.shape[0], num_prompts, "prompts")
        num_videos = batch_size * num_videos_per_prompt
        generator = check_generator(generator, num_videos)
        if prompt is not None and num_prompts == 1:
            prompt = prompt * batch_size
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            callback_on_step_end_tensor_inputs,
            prompt_embeds,
            negative_prompt_embeds,
        )
        num_inference_steps, guidance_scale = call_defaults(self, num_inference_steps, guidance_scale)
        self._attention_kwargs = attention_kwargs
        device = self._execution_device

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            [negative_prompt] * (len(prompt) if prompt is not None else num_prompts)
            if isinstance(negative_prompt, str)
            else negative_prompt,
            do_classifier_free_guidance=guidance_scale > 1.0,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length or config.max_text_seq_length,
            device=device,
        )

        num_latent_frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        image_latents = encode_image(self.vae, image_BCHW, device)
        image_latents = repeat_batch(image_latents, num_videos).expand(-1, num_latent_frames, -1, -1, -1)

        latents = self.denoise(
            image_latents=image_latents,
            prior=image_latents,
            prompt_embeds=repeat_batch(prompt_embeds, num_videos),
            negative_prompt_embeds=repeat_batch(negative_prompt_embeds, num_videos),
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            use_dynamic_cfg=use_dynamic_cfg,
            generator=generator,
            latents=latents,
            image_rotary_emb=self._prepare_rotary_positional_embeddings(height, width, num_latent_frames, device)
            if config.use_rotary_positional_embeddings
            else None,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        if output_type == "latent":
            video: Any = latents
        else:
            video = self.decode_latents(latents)
            video = self.video_processor.postprocess_video(video=video, output_type=output_type)
        self.maybe_free_model_hooks()
        return CogVideoXPipelineOutput(frames=video) if return_dict else (video,)

    @torch.no_grad()
    def denoise(
        self,
        image_latents: torch.Tensor,
        prior: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> torch.Tensor:
        """The sampling loop on latents: what `__call__` runs between encoding and decoding.

        Args:
            image_latents: Latent of the condition image, repeated over time, [B, T, C, h, w].
            prior: End point z_T of the bridge, [B, T, C, h, w]; not used by the diffusion baseline.
            prompt_embeds: Text embeddings [B, L, D].
            negative_prompt_embeds: Text embeddings of the negative prompt; needed with guidance.
            num_inference_steps: Calls of the network.
            timesteps: As in `__call__`.
            guidance_scale: Weight of classifier-free guidance on the text; 1 or less switches it off.
            use_dynamic_cfg: As in `__call__`.
            generator: The source of every draw; a list gives one to each video.
            latents: Where the sampler starts, in place of the scheduler's own start.
            image_rotary_emb: Cosines and sines of the rotary embedding, for networks that have one.
            attention_kwargs: Passed to the attention processors.
            callback_on_step_end: As in `__call__`.
            callback_on_step_end_tensor_inputs: As in `__call__`.

        Returns:
            Float32 latents of the videos, [B, T, C, h, w].
        """
        # Not transformer.dtype, that of the first weight: LoRA training keeps the input projection in float32.
        dtype = self.transformer.patch_embed.text_proj.weight.dtype
        text, image = prompt_embeds, image_latents
        if guidance_scale > 1.0:
            assert negative_prompt_embeds is not None
            text, image = torch.cat([negative_prompt_embeds, prompt_embeds]), torch.cat([image_latents] * 2)
        text = text.to(dtype)

        def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return call_transformer(
                self.transformer,
                torch.cat([latents, image], dim=2),
                time,
                text,
                image_rotary_emb,
                attention_kwargs,
            )

        return sample_latents(
            self,
            network,
            prior,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            use_dynamic_cfg=use_dynamic_cfg,
            generator=generator,
            latents=latents,
            callback_on_step_end=callback_on_step_end,
            callback_tensors={"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds},
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes scaled latents [B, T, C, h, w] to pixels in about [-1, 1], [B, 3, F, H, W]."""
        latents_BCTHW = latents.transpose(1, 2) / latent_scale(self.vae)
        return self.vae.decode(latents_BCTHW.to(self.vae.dtype)).sample

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Loads LoRA layers as diffusers does; refuses the folder of an earlier version, where they are not all."""
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, str | os.PathLike):
            folder = Path(source).parent if os.path.isfile(source) else Path(source, kwargs.get("subfolder") or "")
            if (problem := two_file_problem(folder)) is not None:
                raise FrameBridgeError(problem)
        super().load_lora_weights(source, *args, **kwargs)
