"""What the specifications of Latte and of its neural prior share besides loading: samples, checks and saving.

Layouts: B batch, F video frames, C channels, H and W height and width, h and w rows and columns of the latents.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from finetrainers import logging
from finetrainers.data import VideoArtifact
from PIL import Image

from framebridge_plugin.backbones.encoding import encode_frames
from framebridge_plugin.backbones.fingerprint import component_fingerprint, short_digest
from framebridge_plugin.backbones.latte.pipeline import FrameBridgeLattePipeline
from framebridge_plugin.backbones.latte.rules import LatteFacts
from framebridge_plugin.backbones.lora_folders import LoraInfo
from framebridge_plugin.backbones.saving import describe_base, local_folder, save_lora_folder, save_model_folder
from framebridge_plugin.data import ClipIndex, ClipSettings
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.training.specifications.latte_loading import LatteLoading
from framebridge_plugin.training.specifications.loading import rate_setting, set_switches
from framebridge_plugin.training.specifications.samples import (
    drops_caption,
    one_caption,
    sample_generator,
    validation_image,
    validation_settings,
    video_of_sample,
)

logger = logging.get_logger()

_WARNINGS = 20


class LatteSpecification(LatteLoading):
    """The common part of `LatteBridgeSpecification` and `NeuralPriorSpecification`.

    The caption of a sample is the name of its class; the empty caption, and one that names no class of the model,
    stands for no class.

    Args:
        *args: As for `LatteLoading`.
        **kwargs: As for `LatteLoading`.
    """

    saves_scheduler: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unknown_captions: set[str] = set()

    @property
    def _resolution_dim_keys(self) -> dict[str, tuple[int, ...]]:
        return {"latents": (1, 3, 4)}

    # From a clip to what the network sees

    def label_of(self, caption: str) -> int:
        """The label of a sample's class.

        Args:
            caption: Name of the class, or its label in digits.

        Returns:
            The label; the null label for the empty caption, and for one that names no class of the model, with a
            warning for each of the first such captions.
        """
        label = self._blank_network.label_of(caption)
        if label is not None:
            return label
        if caption and caption not in self._unknown_captions and len(self._unknown_captions) < _WARNINGS:
            self._unknown_captions.add(caption)
            logger.warning(f"caption {caption!r} names no class of the model; the clip is trained on without a class")
        return self._blank_network.null_label

    def prepare_conditions(
        self,
        caption: str | list[str],
        generator: torch.Generator | None = None,
        sample_seed: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The label of a sample's class, and what the network is told: the null label for the dropped share.

        Args:
            caption: Name of the class, or a list with one (as a loader of batches of one gives it).
            generator: The source of the dropout's draw where no `sample_seed` is given.
            sample_seed: Seed of this sample's draws, from `ClipStream`.
            **kwargs: The other parts of the sample; not used.

        Returns:
            {"class_labels": int64 [1], "true_class_labels": int64 [1]}; the two differ for the share of samples that
            `caption_dropout` says. A frozen neural prior is given the second.
        """
        conditions = {"class_labels": torch.tensor([self.label_of(one_caption(caption))])}
        if drops_caption(self.objective.caption_dropout, sample_seed, generator):
            empty = {"class_labels": torch.tensor([self._blank_network.null_label])}
            return self.drop_caption(conditions, empty)
        return {**conditions, "true_class_labels": conditions["class_labels"]}

    @staticmethod
    def drop_caption(
        conditions: Mapping[str, torch.Tensor], empty_conditions: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Conditions of a sample that loses its class; the true one is kept beside it.

        Args:
            conditions: Those of the sample's class.
            empty_conditions: Those of no class.

        Returns:
            What `prepare_conditions` returns for such a sample.
        """
        return {"class_labels": empty_conditions["class_labels"], "true_class_labels": conditions["class_labels"]}

    @torch.no_grad()
    def prepare_latents(
        self,
        vae: AutoencoderKL,
        video: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_seed: int | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Latents of a clip, a sample of the autoencoder's posterior for every frame.

        That of the first frame is target, image condition and prior at once.

        Args:
            vae: The autoencoder.
            video: Pixels in [-1, 1], [F, 3, H, W] or [1, F, 3, H, W].
            generator: The source of the posterior's samples where no `sample_seed` is given; torch's global one if
                there is none either.
            sample_seed: Seed of this sample's draws, from `ClipStream`.
            **kwargs: The other parts of the sample; not used.

        Returns:
            "latents" [1, F, C, h, w] and "image_latents" [1, 1, C, h, w], the first of them.

        Raises:
            FrameBridgeError: If the sample has no video, or one of another shape than the network is for.
        """
        video_BFCHW = video_of_sample(video)
        self._check_clip_shape((video_BFCHW.shape[1], *video_BFCHW.shape[-2:]))
        draw = sample_generator(sample_seed, "posterior", generator) or torch.default_generator
        latents_BFChw = encode_frames(vae, video_BFCHW, draw)
        return {"latents": latents_BFChw, "image_latents": latents_BFChw[:, :1].clone()}

    def precomputation_facts(self) -> dict[str, Any]:
        """What `prepare_latents` and `prepare_conditions` depend on besides clip, caption and seeds.

        A bridge, its neural prior and the diffusion baseline have this in common.

        Returns:
            Names and values that JSON can say.

        Raises:
            FrameBridgeError: If a file of the model cannot be read.
        """
        return {
            "num_classes": self.transformer_config.num_classes,
            "class_names": self.transformer_config.class_names,
            "vae_dtype": str(self.vae_dtype),
            "vae": component_fingerprint(self._component_folder(*self._source("vae"))),
        }

    def collate_conditions(self, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collects the labels of a batch.

        Args:
            data: What `prepare_conditions` returned for every sample.

        Returns:
            {"class_labels": B integers, "true_class_labels": B integers}: lists, since the trainers cast tensors to
            the precision of the network, and bfloat16 has no label 257.
        """
        return {
            "class_labels": [int(item["class_labels"]) for item in data],
            # Stores of older releases hold the one label of a class; what is dropped of them comes with both.
            "true_class_labels": [int(item.get("true_class_labels", item["class_labels"])) for item in data],
        }

    # Checks before the first step

    def resume_settings(self) -> dict[str, str]:
        """What a resumed run must have in common with the stored one, and its weights do not tell.

        Positions are computed for any size, and classes are numbers to the network.

        Returns:
            "clips" and "classes", short enough for an error's line.
        """
        config = self.transformer_config
        height, width = (size * self._vae_scale for size in (config.sample_height, config.sample_width))
        return {
            "clips": f"{config.num_frames} frames of {height} x {width}",
            "classes": f"{config.num_classes}, names of digest {short_digest(config.class_names)}",
        }

    def check_datasets(self, datasets: Iterable[tuple[ClipIndex, ClipSettings]]) -> None:
        """Refuses data that the network is not for.

        Args:
            datasets: What `load_dataset_config` returned.

        Raises:
            UsageError: If the clips have another shape.
            FrameBridgeError: If a clip's caption names no class of the model.
        """
        for number, (index, settings) in enumerate(datasets):
            self._check_clip_shape((settings.num_frames, settings.height, settings.width))
            self._check_captions(index.distinct_captions(), f"data set {number}")

    def check_validation_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Refuses validation rows of classes that the model does not know.

        Args:
            samples: Rows with a "prompt".

        Raises:
            FrameBridgeError: If a caption names no class of the model.
        """
        self._check_captions((str(sample.get("prompt") or "") for sample in samples), "validation file")

    def _check_captions(self, captions: Iterable[str], where: str) -> None:
        config = self.transformer_config
        facts = LatteFacts(0, 0, 0, config.num_classes, tuple(config.class_names or ()))
        for caption in captions:
            problem = facts.class_problem(caption) if caption else None
            if problem is not None:
                raise FrameBridgeError(f"{where}: {problem}; leave such clips out, or train from scratch on them")

    def _check_clip_shape(self, clip_shape: tuple[int, ...]) -> None:
        config = self.transformer_config
        size = (config.sample_height * self._vae_scale, config.sample_width * self._vae_scale)
        if clip_shape != (config.num_frames, *size):
            raise UsageError(
                f"clips of {clip_shape[0]} frames of {clip_shape[1]} x {clip_shape[2]} pixels do not fit the network, "
                f"which is for {config.num_frames} frames of {size[0]} x {size[1]}; set the clips' num_frames, height "
                "and width to that"
            )

    def prepare_trainable_parameters(self, transformer: LatteTransformer, training_type: str) -> None:
        """Refuses LoRA layers on random weights; all else is as finetrainers chose.

        Args:
            transformer: The network.
            training_type: "lora" or "full-finetune".

        Raises:
            UsageError: If a network from scratch is to be trained by LoRA layers alone.
            FrameBridgeError: If a file of the base model of LoRA layers cannot be read.
        """
        if training_type == "lora" and self.is_from_scratch:
            raise UsageError(
                "LoRA layers need a trained network; give a model as pretrained_model_name_or_path, or train from "
                "scratch with training_type full-finetune"
            )
        if training_type == "lora":
            _ = self._lora_info  # taken now: the base's files may change while the run lasts

    # Validation and saving

    def _build_pipeline(self, settings: Mapping[str, Any], **components: Any) -> FrameBridgeLattePipeline:
        """A pipeline of these components and the autoencoder, with finetrainers' switches."""
        vae = settings.get("vae")
        if vae is None:
            vae = self.load_latent_models()["vae"]
        pipeline = FrameBridgeLattePipeline(vae=vae, **components)
        set_switches(pipeline, settings)
        return pipeline

    def validation(
        self,
        pipeline: FrameBridgeLattePipeline,
        prompt: str,
        image: Image.Image | None = None,
        video: list[Image.Image] | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> list[VideoArtifact]:
        """Samples one video from an image, or from the first frame of a video.

        Args:
            pipeline: What `load_pipeline` returned.
            prompt: Name of the class; empty for none.
            image: The image.
            video: A video, used where no image is given.
            generator: The source of every draw.
            **kwargs: `num_inference_steps` and `guidance_scale` of the validation file; other columns are not used.

        Returns:
            One video.
        """
        self._place_components(pipeline)
        label, settings = self.label_of(prompt), validation_settings(kwargs)
        frames = pipeline(
            image=validation_image(prompt, image, video),
            class_label="" if label == self._blank_network.null_label else label,
            generator=generator,
            output_type="pil",
            **{name: settings[name] for name in ("num_inference_steps", "guidance_scale") if name in settings},
        ).frames[0]
        return [VideoArtifact(value=frames)]

    def _place_components(self, pipeline: FrameBridgeLattePipeline) -> None:
        """Moves the components that no trainer knows to the others."""

    def _linked_components(self) -> dict[str, tuple[str, str, Path]]:
        """The components that training leaves alone: library, class and folder of each."""
        return {"vae": ("diffusers", AutoencoderKL.__name__, self._component_folder(*self._source("vae")))}

    def _component_folder(self, source: str, subfolder: str) -> Path:
        files = Path(subfolder)
        patterns = [str(files / "config.json"), str(files / "*.safetensors*")]
        return local_folder(source, patterns=patterns, **self._hub_settings) / subfolder

    def frozen_components(self, training_type: str) -> dict[str, Path]:
        """The folders of what training leaves as it is; with LoRA layers the network is one of them."""
        sources = self._component_sources()
        if training_type != "lora":
            del sources[self.network_name]
        return {name: self._component_folder(*source) for name, source in sources.items()}

    def _component_sources(self) -> dict[str, tuple[str, str]]:
        """Where each component comes from: folder or hub id, and its subfolder in it ("" for a component alone)."""
        return {name: self._source(name) for name in (self.network_name, "vae")}

    def _save_model(
        self,
        directory: str,
        transformer: LatteTransformer,
        transformer_state_dict: Mapping[str, torch.Tensor] | None = None,
        scheduler: Any = None,
    ) -> None:
        assert transformer_state_dict is not None
        save_model_folder(
            directory,
            pipeline_class=FrameBridgeLattePipeline.__name__,
            network_name=self.network_name,
            network_class=LatteTransformer,
            network_config=transformer.config,
            network_state_dict=transformer_state_dict,
            scheduler=scheduler if self.saves_scheduler else None,
            linked_components=self._linked_components(),
            settings={
                **(FrameBridgeLattePipeline.default_call if self.saves_scheduler else {}),
                **rate_setting(self),
            },
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
        save_lora_folder(
            directory,
            info=dataclasses.replace(self._lora_info, fps=self.clip_rate),
            lora_state_dict=transformer_state_dict,
            adapter_metadata=json.loads(metadata["lora_config"]),
            scheduler=scheduler if self.saves_scheduler else None,
        )

    @functools.cached_property
    def _lora_info(self) -> LoraInfo:
        """What a LoRA remembers of its base, as it was when it was loaded."""
        sources = self._component_sources()
        components = {name: (sources[name][0], folder) for name, folder in self.frozen_components("lora").items()}
        num_frames, height, width = self.clip_shape or (None, None, None)
        return LoraInfo(
            pipeline_class=FrameBridgeLattePipeline.__name__,
            network_name=self.network_name,
            num_frames=num_frames,
            height=height,
            width=width,
            **describe_base(self.pretrained_model_name_or_path, components),
        )
