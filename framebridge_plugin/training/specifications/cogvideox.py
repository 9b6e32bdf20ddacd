"""CogVideoX image-to-video as a finetrainers model specification: `--model_name cogvideox_bridge`.

Layouts: B batch, F video frames, T latent frames, C channels, H and W height and width.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from finetrainers.data import VideoArtifact
from finetrainers.models.cogvideox import CogVideoXModelSpecification
from finetrainers.models.cogvideox.utils import prepare_rotary_positional_embeddings
from peft import LoraConfig
from PIL import Image

from framebridge_plugin.backbones.cogvideox.facts import INPUT_PROJECTION, config_problem
from framebridge_plugin.backbones.cogvideox.pipeline import FrameBridgeCogVideoXPipeline
from framebridge_plugin.backbones.encoding import add_pixel_noise, encode_image, encode_video
from framebridge_plugin.backbones.fingerprint import component_fingerprint
from framebridge_plugin.backbones.lora_folders import LoraInfo
from framebridge_plugin.backbones.saving import (
    COGVIDEOX_COMPONENTS,
    describe_base,
    local_folder,
    save_lora_folder,
    save_model_folder,
)
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.calling import call_transformer
from framebridge_plugin.models.projection_adapter import (
    add_projection,
    freeze_identity,
    full_rank_settings,
    with_identity,
)
from framebridge_plugin.models.whole_weights import whole_weights
from framebridge_plugin.models.widening import load_bridge_transformer, widen_input_channels
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.finetrainers.registration import parsed_objective
from framebridge_plugin.training.objective import Network, ObjectiveSettings, build_scheduler
from framebridge_plugin.training.specifications.loading import (
    LOADING_ERRORS,
    cannot_load,
    load_backbone,
    load_config,
    load_text_encoder,
    load_tokenizer,
    rate_setting,
    set_switches,
)
from framebridge_plugin.training.specifications.samples import (
    caption_or_empty,
    evaluate_objective,
    sample_generator,
    validation_image,
    validation_settings,
    video_of_sample,
)


class CogVideoXBridgeSpecification(CogVideoXModelSpecification):
    """A FrameBridge, or its diffusion baseline, on a CogVideoX text-to-video checkpoint (2B, or 5B with rotary).

    `pretrained_model_name_or_path` may be a plain CogVideoX folder or id, whose `patch_embed.proj` is widened when it
    is loaded, or a model with doubled input channels, which is loaded as it is; `transformer_id` may be a fine-tuned
    `transformer/` folder alone.

    Works with finetrainers' stock `SFTTrainer` and with `FrameBridgeTrainer`.

    Args:
        pretrained_model_name_or_path: Folder or hub id of the base model.
        objective: What is trained; by default what the parsed command line says, else the reference's settings.
        **kwargs: As for finetrainers' `CogVideoXModelSpecification`: `transformer_id`, `vae_dtype`, `revision`, ...
    """

    default_objective = ObjectiveSettings()

    def __init__(
        self,
        pretrained_model_name_or_path: str = "THUDM/CogVideoX-2b",
        *,
        objective: ObjectiveSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained_model_name_or_path, **kwargs)
        self.objective = objective or parsed_objective(self.default_objective)
        # Of the training clips, once a trainer knows them: (frames, height, width), and frames per second.
        self.clip_shape: tuple[int, int, int] | None = None
        self.clip_rate: float | None = None

    # Loading

    # finetrainers' own reading of configs fails for a folder alone (`transformer_id`, `vae_id`).

    def _load_transformer_config(self) -> None:
        source, subfolder = self._source("transformer")
        self.transformer_config = load_config(CogVideoXTransformer3DModel, source, subfolder, **self._hub_settings)
        if problem := config_problem("transformer", self.transformer_config):
            raise cannot_load("transformer", source, f"it {problem}")
        load_backbone(self.pretrained_model_name_or_path, **self._hub_settings)  # refused here if it is foreign

    def _load_vae_config(self) -> None:
        source, subfolder = self._source("vae")
        self.vae_config = load_config(AutoencoderKLCogVideoX, source, subfolder, **self._hub_settings)

    @property
    def _hub_settings(self) -> dict[str, Any]:
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    def _source(self, component: str) -> tuple[str, str]:
        """Where a component comes from: folder or id, and the subfolder in it ("" for a component alone)."""
        alone = getattr(self, f"{component}_id")
        return (self.pretrained_model_name_or_path, component) if alone is None else (alone, "")

    def blank_network(self) -> CogVideoXTransformer3DModel:
        """The network without weights: its modules, by which LoRA layers find their places."""
        with torch.device("meta"):
            network = CogVideoXTransformer3DModel.from_config(self.transformer_config)
        return widen_input_channels(network, INPUT_PROJECTION)

    def load_diffusion_models(self) -> dict[str, Any]:
        """The widened `transformer` and the `scheduler` of the objective."""
        source, subfolder = self._source("transformer")
        try:
            transformer = load_bridge_transformer(
                source, subfolder=subfolder, dtype=self.transformer_dtype, **self._hub_settings
            )
        except FrameBridgeError:
            raise
        except LOADING_ERRORS as error:
            raise cannot_load("transformer", source, error) from error
        scheduler = self._load_scheduler()
        self.transformer_config = transformer.config
        return {"transformer": transformer, "scheduler": scheduler}

    def _load_scheduler(self) -> FrameBridgeScheduler | CogVideoXDDIMScheduler:
        """The scheduler of the objective, over the noise schedule of the base model."""
        backbone = load_backbone(self.pretrained_model_name_or_path, **self._hub_settings)
        if backbone is None:
            raise cannot_load("scheduler", self.pretrained_model_name_or_path, "its bridge has no backbone")
        return build_scheduler(backbone, self.objective)

    def load_condition_models(self) -> dict[str, Any]:
        """The `tokenizer` and the `text_encoder`."""
        tokenizer = load_tokenizer(*self._source("tokenizer"), **self._hub_settings)
        source, subfolder = self._source("text_encoder")
        text_encoder = load_text_encoder(source, subfolder, self.text_encoder_dtype, **self._hub_settings)
        return {"tokenizer": tokenizer, "text_encoder": text_encoder}

    def load_latent_models(self) -> dict[str, Any]:
        """The video autoencoder, `vae`."""
        try:
            with whole_weights():
                return super().load_latent_models()
        except LOADING_ERRORS as error:
            raise cannot_load("autoencoder", self._source("vae")[0], error) from error

    def load_pipeline(self, transformer: CogVideoXTransformer3DModel | None = None, **kwargs: Any) -> Any:
        """A pipeline around the components that are given; the others are loaded.

        Args:
            transformer: The network that is being trained; loaded from the base model if None.
            **kwargs: `tokenizer`, `text_encoder`, `vae`, `scheduler` and finetrainers' switches `enable_slicing`,
                `enable_tiling`, `enable_model_cpu_offload` and `training`.

        Returns:
            A `FrameBridgeCogVideoXPipeline`.
        """
        components: dict[str, Any] = {name: kwargs.get(name) for name in (*COGVIDEOX_COMPONENTS, "scheduler")}
        if transformer is None:
            transformer = self.load_diffusion_models()["transformer"]
        if components["scheduler"] is None:
            components["scheduler"] = self._load_scheduler()
        if components["tokenizer"] is None or components["text_encoder"] is None:
            components.update(self.load_condition_models())
        if components["vae"] is None:
            components.update(self.load_latent_models())
        pipeline = FrameBridgeCogVideoXPipeline(transformer=transformer, **self._clip_settings, **components)
        set_switches(pipeline, kwargs)
        return pipeline

    # From a clip to what the network sees

    @torch.no_grad()
    def prepare_conditions(
        self,
        tokenizer: Any,
        text_encoder: torch.nn.Module,
        caption: str | list[str],
        generator: torch.Generator | None = None,
        sample_seed: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Text embeddings of a caption, or of the empty one for the share that `caption_dropout` says.

        Args:
            tokenizer: T5 tokenizer.
            text_encoder: T5 encoder.
            caption: The text, or a list with one text (as a loader of batches of one gives it).
            generator: The source of the dropout's draw where no `sample_seed` is given.
            sample_seed: Seed of this sample's draws, from `ClipStream`.
            **kwargs: The other parts of the sample; not used.

        Returns:
            {"encoder_hidden_states": [1, L, D]}
        """
        caption = caption_or_empty(caption, self.objective.caption_dropout, sample_seed, generator)
        return super().prepare_conditions(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            caption=caption,
            max_sequence_length=self.transformer_config.max_text_seq_length,
        )

    @torch.no_grad()
    def prepare_latents(
        self,
        vae: AutoencoderKLCogVideoX,
        video: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_seed: int | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Latents of a clip, of its first frame as the condition image, and of a noisy prior if noise is on.

        Always the mode of the autoencoder's posterior. Without noise the condition image and the prior share one
        latent, encoded as one frame.

        Args:
            vae: The autoencoder.
            video: Pixels in [-1, 1], [F, 3, H, W] or [1, F, 3, H, W].
            generator: The source of the noise where no `sample_seed` is given.
            sample_seed: Seed of this sample's draws, from `ClipStream`.
            **kwargs: The other parts of the sample; not used.

        Returns:
            "latents" [1, T, C, h, w], "image_latents" [1, 1, C, h, w], and "prior_latents": [1, T, C, h, w] with
            noise on the prior.

        Raises:
            FrameBridgeError: If the sample has no video.
        """
        settings = self.objective
        video_BFCHW = video_of_sample(video)
        image_BCHW = video_BFCHW[:, 0]
        noise = (settings.noise_log_mean, settings.noise_log_std)

        result = {"latents": encode_video(vae, video_BFCHW)}
        condition = image_BCHW
        if settings.image_noise:
            condition = add_pixel_noise(image_BCHW, *noise, sample_generator(sample_seed, "image noise", generator))
        result["image_latents"] = encode_image(vae, condition)
        if settings.objective == "bridge":
            if settings.prior_noise:
                prior = image_BCHW.unsqueeze(1).expand_as(video_BFCHW)
                prior = add_pixel_noise(prior, *noise, sample_generator(sample_seed, "prior noise", generator))
                result["prior_latents"] = encode_video(vae, prior)
            elif settings.image_noise:
                result["prior_latents"] = encode_image(vae, image_BCHW)
        return result

    def precomputation_facts(self) -> dict[str, Any]:
        """What `prepare_latents` and `prepare_conditions` depend on besides clip, caption and seeds."""
        settings = ("objective", "image_noise", "prior_noise", "noise_log_mean", "noise_log_std")
        return {
            **{name: getattr(self.objective, name) for name in settings},
            "vae_dtype": str(self.vae_dtype),
            "text_encoder_dtype": str(self.text_encoder_dtype),
            "max_text_seq_length": self.transformer_config.max_text_seq_length,
            **{name: component_fingerprint(self._component_folder(name)) for name in COGVIDEOX_COMPONENTS},
        }

    def forward(
        self,
        transformer: CogVideoXTransformer3DModel,
        scheduler: FrameBridgeScheduler | CogVideoXDDIMScheduler,
        condition_model_conditions: dict[str, torch.Tensor],
        latent_model_conditions: dict[str, torch.Tensor],
        sigmas: torch.Tensor,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One evaluation of the objective on a batch.

        Args:
            transformer: The widened network.
            scheduler: What `load_diffusion_models` returned.
            condition_model_conditions: What `prepare_conditions` returned, collated.
            latent_model_conditions: What `prepare_latents` returned, collated.
            sigmas: Index (bridge) or timestep (diffusion) divided by the number of training steps; any shape of B
                elements.
            generator: The source of eps; torch's global one if None (the stock trainer passes none).
            **kwargs: finetrainers' other arguments; not used.

        Returns:
            (prediction, target, sigmas): both [B, T, C, h, w] in float32, and the sigmas that finetrainers' loss
            weights are looked up with.
        """
        z_0 = latent_model_conditions["latents"].float()
        image_latents = latent_model_conditions["image_latents"].float()
        prior = latent_model_conditions.get("prior_latents", image_latents)
        prior = prior.float().expand_as(z_0)
        text = condition_model_conditions["encoder_hidden_states"]
        network = self.bind_network(transformer, text, image_latents.expand_as(z_0))
        return evaluate_objective(network, scheduler, z_0, prior, sigmas, generator)

    def bind_network(
        self,
        transformer: CogVideoXTransformer3DModel,
        encoder_hidden_states: torch.Tensor,
        image_latents: torch.Tensor,
    ) -> Network:
        """The transformer with text, image and positions bound, as the objective calls it.

        Args:
            transformer: The widened network.
            encoder_hidden_states: Text embeddings [B, L, D].
            image_latents: Latents of the condition image, repeated over time, [B, T, C, h, w].

        Returns:
            A callable (latents [B, T, C, h, w], time [B]) -> float32 output [B, T, C, h, w].
        """
        config = self.transformer_config
        scale = 2 ** (len(self.vae_config.block_out_channels) - 1)
        _, num_frames, _, height, width = image_latents.shape
        image_rotary_emb = None
        if config.use_rotary_positional_embeddings:
            image_rotary_emb = prepare_rotary_positional_embeddings(
                height=height * scale,
                width=width * scale,
                num_frames=num_frames,
                vae_scale_factor_spatial=scale,
                patch_size=config.patch_size,
                attention_head_dim=config.attention_head_dim,
                device=encoder_hidden_states.device,
                base_height=config.sample_height * scale,
                base_width=config.sample_width * scale,
            )

        def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            hidden_states = torch.cat([latents, image_latents], dim=2)
            return call_transformer(transformer, hidden_states, timestep, encoder_hidden_states, image_rotary_emb)

        return network

    # What is trained, validated and saved

    def complete_lora_config(self, transformer: CogVideoXTransformer3DModel, config: LoraConfig) -> None:
        """Adds the widened input projection to what a LoRA trains: low-rank layers alone never see the image."""
        add_projection(config, transformer, INPUT_PROJECTION)

    def prepare_trainable_parameters(self, transformer: CogVideoXTransformer3DModel, training_type: str) -> None:
        """Trains the input projection as itself when LoRA freezes everything else.

        Args:
            transformer: The network after finetrainers chose its trainable parameters.
            training_type: "lora" or "full-finetune".
        """
        if training_type == "lora":
            _ = self._lora_info  # taken now: the base's files may change while the run lasts
            freeze_identity(transformer, INPUT_PROJECTION)

    def validation(
        self,
        pipeline: FrameBridgeCogVideoXPipeline,
        prompt: str,
        image: Image.Image | None = None,
        video: list[Image.Image] | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> list[VideoArtifact]:
        """Samples one video from an image, or from the first frame of a video.

        Args:
            pipeline: What `load_pipeline` returned.
            prompt: The text.
            image: The image.
            video: A video, used where no image is given.
            generator: The source of every draw.
            **kwargs: `height`, `width`, `num_frames`, `num_inference_steps` and `guidance_scale` of the validation
                file; other columns are not used.

        Returns:
            One video.

        Raises:
            FrameBridgeError: If there is neither image nor video.
        """
        frames = pipeline(
            image=validation_image(prompt, image, video),
            prompt=prompt,
            generator=generator,
            output_type="pil",
            **validation_settings(kwargs),
        ).frames[0]
        return [VideoArtifact(value=frames)]

    def _save_model(
        self,
        directory: str,
        transformer: CogVideoXTransformer3DModel,
        transformer_state_dict: Mapping[str, torch.Tensor] | None = None,
        scheduler: Any = None,
    ) -> None:
        assert transformer_state_dict is not None
        save_model_folder(
            directory,
            pipeline_class=FrameBridgeCogVideoXPipeline.__name__,
            network_name="transformer",
            network_class=CogVideoXTransformer3DModel,
            network_config=transformer.config,
            network_state_dict=transformer_state_dict,
            scheduler=scheduler,
            linked_components={
                name: (library, class_name, self._component_folder(name))
                for name, (library, class_name) in COGVIDEOX_COMPONENTS.items()
            },
            settings=self._clip_settings | {**FrameBridgeCogVideoXPipeline.default_call, **rate_setting(self)},
        )

    def _save_lora_weights(
        self,
        directory: str,
        transformer_state_dict: Mapping[str, torch.Tensor] | None = None,
        scheduler: Any = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        assert transformer_state_dict is not None
        assert metadata is not None
        patch_size = self.transformer_config.patch_size
        layers = with_identity(transformer_state_dict, INPUT_PROJECTION, (patch_size, patch_size))
        settings = json.loads(metadata["lora_config"])
        rank = len(layers[f"{INPUT_PROJECTION}.lora_A.weight"])
        save_lora_folder(
            directory,
            info=dataclasses.replace(self._lora_info, fps=self.clip_rate),
            lora_state_dict=layers,
            adapter_metadata=settings | full_rank_settings(INPUT_PROJECTION, rank, settings["target_modules"]),
            scheduler=scheduler,
        )

    @property
    def _clip_settings(self) -> dict[str, Any]:
        return dict(zip(("num_frames", "height", "width"), self.clip_shape or (None, None, None), strict=True))

    @functools.cached_property
    def _lora_info(self) -> LoraInfo:
        """What a LoRA remembers of its base, as it was when it was loaded."""
        components = {name: (self._source(name)[0], folder) for name, folder in self.frozen_components("lora").items()}
        return LoraInfo(
            pipeline_class=FrameBridgeCogVideoXPipeline.__name__,
            network_name="transformer",
            **self._clip_settings,
            **describe_base(self.pretrained_model_name_or_path, components),
        )

    def frozen_components(self, training_type: str) -> dict[str, Path]:
        """The folders of what training leaves as it is; with LoRA layers the network is one of them."""
        names = ("transformer", *COGVIDEOX_COMPONENTS) if training_type == "lora" else COGVIDEOX_COMPONENTS
        return {name: self._component_folder(name) for name in names}

    def _component_folder(self, name: str) -> Path:
        source, subfolder = self._source(name)
        patterns = [f"{subfolder}/*"] if subfolder else None
        return local_folder(source, patterns=patterns, **self._hub_settings) / subfolder
