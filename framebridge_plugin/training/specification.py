"""Every backbone as a finetrainers model specification: `--model_name cogvideox_bridge`, `latte_bridge`, ...

Layouts: B batch, F video frames, T latent frames, C channels, H and W height and width, h and w those of the latents.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from finetrainers.data import VideoArtifact
from finetrainers.models.modeling_utils import ModelSpecification
from peft import LoraConfig
from PIL import Image

from framebridge_plugin.backbones.adapter import BackboneAdapter, Network
from framebridge_plugin.backbones.facts import find_backbone
from framebridge_plugin.backbones.loading import ModelSource, cannot_load
from framebridge_plugin.data import UCF101_CLASSES, ClipIndex, ClipSettings
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.models.projection_adapter import add_projection, freeze_identity
from framebridge_plugin.resizing import as_floats
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.draws import drops_caption, sample_generator
from framebridge_plugin.training.finetrainers.registration import parsed_arguments, parsed_objective
from framebridge_plugin.training.objective import (
    ObjectiveSettings,
    bridge_prediction,
    build_scheduler,
    diffusion_prediction,
    finetrainers_terms,
    video_prediction,
)
from framebridge_plugin.training.quantization import QuantizedParts
from framebridge_plugin.training.saved_bridge import SavedBridge
from framebridge_plugin.training.validation import validation_image

if TYPE_CHECKING:
    from framebridge_plugin.training.captions import CaptionCache

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


class BridgeSpecification(SavedBridge, ModelSpecification):
    """A FrameBridge, or its diffusion baseline, on a backbone, whose adapter does what is particular to it.

    `pretrained_model_name_or_path` may be the backbone's plain text-to-video folder or id, whose network is widened
    when it is loaded, or a model of a bridge, which is loaded as it is; `transformer_id` may be a fine-tuned network's
    folder alone. A Latte network starts from scratch where neither is given.

    Works with finetrainers' stock `SFTTrainer` and with `FrameBridgeTrainer`.

    Args:
        pretrained_model_name_or_path: Folder or hub id of the base model; empty for a network from scratch.
        objective: What is trained; by default what the parsed command line says, else the backbone's own settings.
        clip_shape: (frames, height, width) of the clips, where they are known; a network from scratch is made for it.
        **kwargs: The backbone's own settings (Latte: `latte_size`, `class_names`, `seed`, and `neural_prior`, the
            folder of a run or model, or a hub id), by default what the parsed command line says; those of
            `quantization.QuantizedParts`; and those of finetrainers' `ModelSpecification`: `transformer_id`, `vae_id`,
            `vae_dtype`, `revision`, ...

    Attributes:
        adapter: The backbone's adapter.
        clip_rate: Frames per second of the training clips, once a trainer knows it.
        captions: Where embeddings of captions are kept, if a trainer says so.
        condition_models: What encodes captions, if a trainer has loaded it, or has no use for it ({}).
        latent_models: Likewise what encodes clips.

    Raises:
        UsageError: If two settings do not go together, or the clips do not fit the network.
        FrameBridgeError: If a file is missing, damaged or of a model of another kind.
    """

    model_name: ClassVar[str]

    def __init__(
        self,
        pretrained_model_name_or_path: str = "",
        *,
        objective: ObjectiveSettings | None = None,
        clip_shape: tuple[int, int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        adapter_class = find_backbone(self.model_name).load_adapter()
        parsed, defaults = parsed_arguments(), {"class_names": UCF101_CLASSES, "seed": 42}
        given = {name: kwargs.pop(name, None) for name in adapter_class.setting_names}
        settings = {
            name: getattr(parsed, name, defaults.get(name)) if value is None else value
            for name, value in given.items()
        }
        if kwargs.get("condition_model_processors") or kwargs.get("latent_model_processors"):
            raise UsageError("processors: the backbone's adapter encodes captions and clips; leave them out")
        self.objective = objective or parsed_objective(self.model_name)
        self.clip_rate: float | None = None
        self.captions: CaptionCache | None = None
        self.condition_models: dict[str, Any] | None = None
        self.latent_models: dict[str, Any] | None = None
        self.quantized = QuantizedParts(**{name: kwargs.pop(name, None) for name in QuantizedParts.names()})
        self._run_copies: dict[str, Path] = {}
        self._make_adapter = functools.partial(
            adapter_class, objective=self.objective, clip_shape=clip_shape, **settings
        )
        super().__init__(pretrained_model_name_or_path or "", **kwargs)

    def _load_configs(self) -> None:
        replaced = {part: getattr(self, f"{part}_id") for part in _PARTS}
        replaced[self.network_name] = replaced.pop("transformer")
        source = ModelSource(
            self.pretrained_model_name_or_path,
            {part: place for part, place in replaced.items() if place is not None},
            {"revision": self.revision, "cache_dir": self.cache_dir},
        )
        self.adapter: BackboneAdapter = self._make_adapter(source)
        self.transformer_config, self.vae_config = self.adapter.network_config, self.adapter.vae_config

    @property
    def network_name(self) -> str:
        """The trained network's folder in a saved model."""
        return find_backbone(self.model_name).network

    @property
    def clip_shape(self) -> tuple[int, int, int] | None:
        """(frames, height, width) of the training clips, once they are known."""
        return self.adapter.clip_shape

    @clip_shape.setter
    def clip_shape(self, shape: tuple[int, int, int] | None) -> None:
        self.adapter.clip_shape = shape

    @property
    def _resolution_dim_keys(self) -> dict[str, tuple[int, ...]]:
        return {"latents": (1, 3, 4)}

    # Loading

    def load_diffusion_models(self) -> dict[str, Any]:
        """The network as `transformer`, and the `scheduler` of the objective."""
        network, scheduler = self.adapter.load_network(self.transformer_dtype), self.load_scheduler()
        self.transformer_config = self.adapter.network_config
        return {"transformer": network, "scheduler": scheduler}

    def load_scheduler(self) -> Any:
        """The scheduler of the objective, over the process of the base model."""
        facts, backbone = self.adapter.facts, self.adapter.load_backbone()
        if self.adapter.predicts_video:
            # The trainers draw indices, which are not used, and weigh the loss by it: every weight is 1.
            return FrameBridgeScheduler(target="data")
        if backbone is None:
            source = self.pretrained_model_name_or_path
            raise cannot_load("scheduler", source, "its bridge has no backbone", self.adapter.expected)
        return build_scheduler(backbone, self.objective, grid=facts.sampling["grid"])

    def load_condition_models(self) -> dict[str, Any]:
        """What encodes captions: `tokenizer` and `text_encoder`; nothing for classes."""
        return self.load_text_models() if self.condition_models is None else self.condition_models

    def load_text_models(self) -> dict[str, Any]:
        """The same, whatever a trainer has."""
        return self.quantized.with_text_encoder(self.adapter.load_condition_models(self.text_encoder_dtype))

    def load_latent_models(self) -> dict[str, Any]:
        """The autoencoder, `vae`."""
        return {"vae": self.adapter.load_vae(self.vae_dtype)} if self.latent_models is None else self.latent_models

    def load_pipeline(self, transformer: Any = None, scheduler: Any = None, **kwargs: Any) -> Any:
        """The backbone's pipeline around the components that are given; the others are loaded, but for what encodes
        captions if all calls are `embedded`.
        """
        parts = self.adapter.facts.parts
        components = {part: kwargs.get(part) for part in parts if part not in (self.network_name, "scheduler")}
        components[self.network_name] = (
            transformer if transformer is not None else self.adapter.load_network(self.transformer_dtype)
        )
        if "scheduler" in parts:
            components["scheduler"] = self.load_scheduler() if scheduler is None else scheduler
        of_text = [part for part in ("tokenizer", "text_encoder") if part in parts and not kwargs.get("embedded")]
        if any(components.get(part) is None for part in of_text):
            components |= self.load_text_models()
        if components["vae"] is None:
            components["vae"] = self.adapter.load_vae(self.vae_dtype)
        pipeline = self.adapter.pipeline(**components, **self.adapter.own_components(), **self._rate_setting)
        if kwargs.get("enable_slicing"):
            pipeline.vae.enable_slicing()
        if kwargs.get("enable_tiling"):
            pipeline.vae.enable_tiling()
        if kwargs.get("enable_model_cpu_offload"):
            pipeline.enable_model_cpu_offload()
        return pipeline

    # From a clip to the loss

    @torch.no_grad()
    def prepare_conditions(
        self,
        caption: str | list[str],
        generator: torch.Generator | None = None,
        sample_seed: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The condition of a sample, [1, ...]: of its caption, or of the empty one for the share of `caption_dropout`.

        A loader of batches of one gives the caption as a list. Without a `sample_seed` (of `ClipStream`) the
        dropout is drawn from `generator`.
        """
        dropped = drops_caption(self.objective.caption_dropout, sample_seed, generator)
        text = caption if isinstance(caption, str) else caption[0]
        if self.captions is None:
            return self.adapter.encode_caption(kwargs, text, dropped)
        text = "" if dropped else text
        return self.captions.conditions(text, lambda: self._encode_new(kwargs, text))

    def _encode_new(self, models: Mapping[str, Any], caption: str) -> dict[str, Any]:
        if self.condition_models == {}:
            folder = self.captions and self.captions.folder
            raise FrameBridgeError(
                f"{folder}: an embedding is gone or damaged that was there before the first update; start again"
            )
        return self.adapter.encode_caption(models, caption, dropped=False)

    def collate_conditions(self, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collects the conditions of a batch; labels as lists, since the trainers cast tensors to the precision of the
        network, and bfloat16 has no label 257.
        """
        if self.adapter.facts.condition == "class":
            return {name: [int(item[name]) for item in data] for name in data[0]}
        return super().collate_conditions(data)

    @torch.no_grad()
    def prepare_latents(
        self,
        vae: Any,
        video: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_seed: int | None = None,
        drawn: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Latents of a clip, of its first frame as the condition image, and of the prior where there is pixel noise.

        Of pixels in [-1, 1] or uint8 ones, [F, 3, H, W] or [1, F, 3, H, W]: "latents" [1, T, C, h, w],
        "image_latents" [1, 1 or T, C, h, w] and "prior_latents". Draws as in `prepare_conditions`, or takes what was
        `drawn` by `PixelNoise`.
        """
        if video is None:
            raise FrameBridgeError("a sample has no video; image-to-video training needs clips, not images")
        video_BFCHW = video if video.ndim == 5 else video.unsqueeze(0)
        if video_BFCHW.dtype == torch.uint8:
            video_BFCHW = as_floats(video_BFCHW.to(vae.device, non_blocking=True))
        if drawn is not None:
            return self.adapter.encode_noisy_clip(vae, video_BFCHW, drawn)
        return self.adapter.encode_clip(
            vae, video_BFCHW, lambda purpose: sample_generator(sample_seed, purpose, generator)
        )

    def precomputation_facts(self) -> dict[str, Any]:
        """What `prepare_latents` and `prepare_conditions` depend on besides clip, caption and seeds."""
        precisions = {"vae_dtype": str(self.vae_dtype)}
        if "text_encoder" in self.adapter.facts.parts:
            precisions["text_encoder_dtype"] = str(self.text_encoder_dtype)
            precisions |= self.quantized.text_facts()
        return self.adapter.encoding_facts() | precisions

    def loss_terms(
        self,
        transformer: Any,
        scheduler: Any,
        conditions: Mapping[str, Any],
        latents: Mapping[str, torch.Tensor],
        index: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's output on a collated batch and what it is compared with, by the mean squared error.

        `index` [B] are indices of the bridge, or timesteps of the baseline, in [0, N - 1]; the noise is drawn from one
        generator, or each sample's from its own; both results are [B, T, C, h, w] in float32.
        """
        network, z_0, prior = self._bound(transformer, conditions, latents)
        if self.adapter.predicts_video:
            return network(prior, index), z_0
        noise = randn_tensor(tuple(z_0.shape), generator=generator, device=z_0.device, dtype=z_0.dtype)
        if isinstance(scheduler, FrameBridgeScheduler):
            return bridge_prediction(network, scheduler, z_0, prior, noise, index)
        return diffusion_prediction(network, scheduler, z_0, noise, index)

    def predicted_video(
        self,
        transformer: Any,
        scheduler: Any,
        conditions: Mapping[str, Any],
        latents: Mapping[str, torch.Tensor],
        ratio: torch.Tensor,
        generator: list[torch.Generator],
    ) -> torch.Tensor:
        """What the network takes for the video's latents, float32 [B, T, C, h, w], at ratios of signal to noise [B].

        The other arguments are those of `loss_terms`.
        """
        network, z_0, prior = self._bound(transformer, conditions, latents)
        noise = randn_tensor(tuple(z_0.shape), generator=generator, device=z_0.device, dtype=z_0.dtype)
        return video_prediction(network, scheduler, z_0, prior, noise, ratio)

    def _bound(
        self, transformer: Any, conditions: Mapping[str, Any], latents: Mapping[str, torch.Tensor]
    ) -> tuple[Network, torch.Tensor, torch.Tensor]:
        """The network for a collated batch, the video's latents, and the prior's."""
        prior, call = self.adapter.prior(conditions, latents), self.adapter.call_settings(self.clip_rate)
        network = self.adapter.bind(transformer, conditions, latents["image_latents"].float(), prior, **call)
        return network, latents["latents"].float(), prior

    def forward(
        self,
        transformer: Any,
        scheduler: Any,
        condition_model_conditions: Mapping[str, Any],
        latent_model_conditions: Mapping[str, torch.Tensor],
        sigmas: torch.Tensor,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`loss_terms` as finetrainers' own loop asks for it: see `finetrainers_terms`."""
        given = (transformer, scheduler, condition_model_conditions, latent_model_conditions)
        return finetrainers_terms(scheduler, sigmas, lambda index: self.loss_terms(*given, index, generator))

    # What is trained, validated and saved

    def check_datasets(self, datasets: Iterable[tuple[ClipIndex, ClipSettings]]) -> None:
        """Refuses data that the model is not for."""
        for number, (index, settings) in enumerate(datasets):
            self.adapter.check_clips((settings.num_frames, settings.height, settings.width))
            if self.adapter.facts.condition == "class":
                self.adapter.check_captions(index.distinct_captions(), f"data set {number}")

    def check_validation_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Refuses validation rows (with a "prompt") of classes that the model does not know."""
        self.adapter.check_captions((str(sample.get("prompt") or "") for sample in samples), "validation file")

    def complete_lora_config(self, transformer: Any, config: LoraConfig) -> None:
        """Adds the widened input projection to what a LoRA trains: low-rank layers alone never see the image."""
        if (projection := self.adapter.facts.input_projection) is not None:
            add_projection(config, transformer, projection)

    def prepare_trainable_parameters(self, transformer: Any, training_type: str) -> None:
        """Trains the input projection as itself when LoRA freezes everything else; what is frozen may be quantised."""
        self.adapter.check_training(training_type)
        self.quantized.check_training(training_type)
        if training_type == "lora":
            _ = self._lora_info  # taken now: the base's files may change while the run lasts
            if (projection := self.adapter.facts.input_projection) is not None:
                freeze_identity(transformer, projection)
        self.quantized.convert_network(transformer)

    def validation(
        self,
        pipeline: Any,
        prompt: str,
        image: Image.Image | None = None,
        video: list[Image.Image] | None = None,
        generator: torch.Generator | None = None,
        embedded: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        **kwargs: Any,
    ) -> list[VideoArtifact]:
        """Samples one video from an image, or from the first frame of a video, with a validation row's columns.

        `embedded` holds the conditions of its prompt and of the empty one, where the pipeline does not encode them.
        """
        for component in self.adapter.own_components().values():
            if component is not None and not hasattr(component, "_hf_hook"):  # offloading moves it itself
                component.to(pipeline.transformer.device)
        call = inspect.signature(type(pipeline).__call__).parameters
        # A column with an empty cell arrives as floats.
        types = {"height": int, "width": int, "num_frames": int, "num_inference_steps": int, "guidance_scale": float}
        settings = {name: kind(kwargs[name]) for name, kind in types.items() if kwargs.get(name) is not None}
        frames = pipeline(
            image=validation_image(prompt, image, video),
            generator=generator,
            output_type="pil",
            **(
                self.adapter.validation_condition(prompt)
                if embedded is None
                else self.adapter.embedded_call(embedded[prompt], embedded[""], pipeline._execution_device)
            ),
            **{name: value for name, value in settings.items() if name in call},
        ).frames[0]
        return [VideoArtifact(value=frames)]
