"""Latte and its neural prior as training and sampling ask for them.

Layouts: B batch, F video frames, C channels, h and w rows and columns of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, CogVideoXDDIMScheduler
from diffusers.configuration_utils import FrozenDict

from framebridge_plugin.backbones.adapter import BackboneAdapter, Draw, Network
from framebridge_plugin.backbones.encoding import decode_frames, encode_frames
from framebridge_plugin.backbones.fingerprint import component_fingerprint, short_digest
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE, LATTE_NEURAL_PRIOR
from framebridge_plugin.backbones.latte.networks import (
    EXPECTED,
    blank_network,
    call_latte,
    find_neural_prior_network,
    latte_backbone,
    load_network,
    read_network,
)
from framebridge_plugin.backbones.latte.rules import scratch_config
from framebridge_plugin.backbones.loading import load_backbone_scheduler, load_config
from framebridge_plugin.errors import FrameBridgeError, UsageError, get_logger
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.settings.choices import BASELINE_TARGETS

logger = get_logger(__name__)

DEFAULT_CLIP_SHAPE = (16, 256, 256)
_AUTOENCODER = "an AutoencoderKL in diffusers format (config.json, diffusion_pytorch_model.safetensors)"
_WARNINGS = 20


class LatteAdapter(BackboneAdapter):
    """A bridge on Latte, or its diffusion baseline; a network from scratch where neither model nor network is given.

    The caption of a sample is the name of its class; the empty caption, and one that names no class of the model,
    stands for no class. With a neural prior the bridge starts from its video instead of the repeated image, and the
    network sees that video as further input channels. The neural prior is frozen: in evaluation mode, in float32,
    without gradients. Its label is the true one where the network's is dropped, as in the reference. It stays whole on
    every process, since it is no part of what finetrainers trains, shards and saves; a saved model links to its files.
    """

    facts = LATTE_BRIDGE
    network_class = LatteTransformer
    vae_class = AutoencoderKL
    backbone_class = CogVideoXDDIMScheduler
    largest_whole_frame = math.inf  # its frames are decoded one at a time
    setting_names: tuple[str, ...] = ("latte_size", "neural_prior", "class_names", "seed")
    stage = "bridge"
    latte_size: str
    neural_prior: str | None
    class_names: Sequence[str]
    seed: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.prior_network: LatteTransformer | None = None
        self._unknown_captions: set[str] = set()
        super().__init__(*args, **kwargs)
        for name in ("image_noise", "prior_noise"):
            if getattr(self.objective, name):
                raise UsageError(
                    f"{name}: Latte's image condition, prior and first target frame share one clean latent; switch it "
                    "off"
                )

    @property
    def expected(self) -> str:
        """What the model's folder should be, for errors."""
        return EXPECTED[self.stage]

    # Configs

    @property
    def is_from_scratch(self) -> bool:
        """Whether the network starts from a seed and not from trained weights."""
        return not self.source.name_or_path and self.facts.network not in self.source.replaced

    def load_part_config(self, part: str, component_class: Any) -> FrozenDict:
        """The config of a component, refused if it is of another kind."""
        if part != "vae":
            return super().load_part_config(part, component_class)
        place = self.source.place("vae")
        if not place[0]:
            raise UsageError(
                "a Latte network from scratch needs an autoencoder; give vae_id, for example stabilityai/sd-vae-ft-ema"
            )
        return load_config(component_class, self.source, place, _AUTOENCODER)

    def read_network_config(self) -> FrozenDict:
        """The network's config, of a seed or of a saved model."""
        if self.is_from_scratch:
            self._blank_network = blank_network(self._new_config())
        else:
            self._blank_network = read_network(self.source, self.source.place(self.facts.network), self.stage)
        if not self.is_from_scratch or self.clip_shape is not None:
            # Else the trainer has yet to say which clips the network is for; then it is checked when it is loaded.
            self._check_network()
        return self._blank_network.config

    def blank_network(self) -> LatteTransformer:
        """The network without weights."""
        return self._blank_network

    def _new_config(self) -> dict[str, Any]:
        clip, parts = self.clip_shape or DEFAULT_CLIP_SHAPE, frozenset({"neural_prior"} if self.neural_prior else ())
        config = scratch_config(self.latte_size, self.vae_config, clip, list(self.class_names), parts)
        rule = self.facts.clip_rule(self.vae_config, {"patch_size": config["patch_size"]})
        for name, problem in rule.problems(*clip):
            raise UsageError(f"clips: {name}: {problem}")
        return config | {"stage": self.stage}

    def _check_network(self) -> None:
        """Compares what comes from different places, from the configs alone."""
        configs = {"vae": self.vae_config, self.facts.network: self._blank_network.config}
        places = {part: self.source.place(part) for part in configs}
        if self._takes_neural_prior and self.objective.objective == "diffusion":
            raise UsageError("neural_prior: objective=diffusion starts from noise; leave neural_prior out")
        if self._takes_neural_prior or self.neural_prior is not None:
            places["neural_prior"] = self.place("neural_prior")
            configs["neural_prior"] = read_network(self.source, places["neural_prior"], "neural_prior").config
        for part, problem in self.facts.problems(configs):
            raise FrameBridgeError(f"{Path(*places[part])} {problem}")

    # Weights

    def load_network(self, dtype: torch.dtype) -> LatteTransformer:
        """The network, and the frozen neural prior that belongs to it."""
        if self.is_from_scratch:
            self._blank_network = blank_network(self._new_config())
            self._check_network()
            self.network_config = self._blank_network.config
            network = LatteTransformer.from_scratch(self.network_config, self.seed).to(dtype)
        else:
            network = load_network(self.source, self.source.place(self.facts.network), self.stage, dtype)
        if self._takes_neural_prior and self.prior_network is None:
            prior = load_network(self.source, self.place("neural_prior"), "neural_prior", torch.float32)
            self.prior_network = prior.requires_grad_(False).eval()
        return network

    def load_backbone(self) -> CogVideoXDDIMScheduler:
        """The noise schedule that the model was saved with, or Latte's."""
        is_baseline = self.objective.objective == "diffusion"
        wanted = BASELINE_TARGETS.get(self.objective.target) if is_baseline else None
        source = self.source.name_or_path
        saved = load_backbone_scheduler(self.source, self.facts, self.expected) if source else None
        if saved is None:
            return latte_backbone(wanted or "epsilon")
        if wanted not in (None, saved.config.prediction_type):
            raise UsageError(
                f"target: {self.objective.target} is not what {source} was trained for, "
                f"{saved.config.prediction_type}; leave it out"
            )
        shift = saved.config.get("snr_shift_scale", 1.0)  # which only CogVideoX's own classes have
        return CogVideoXDDIMScheduler.from_config(saved.config, snr_shift_scale=shift)

    def load_condition_models(self, dtype: torch.dtype) -> dict[str, Any]:
        """No models: the network itself embeds the class."""
        return {}

    def own_components(self) -> dict[str, Any]:
        """The neural prior, if the network takes one."""
        return {"neural_prior": self.prior_network}

    def blank_components(self) -> Iterator[tuple[str, Any]]:
        """Yields the neural prior without weights, if the network takes one."""
        if self._takes_neural_prior:
            prior = read_network(self.source, self.place("neural_prior"), "neural_prior")
            self.prior_network = prior.requires_grad_(False).eval()
            yield "neural_prior", self.prior_network

    @property
    def _takes_neural_prior(self) -> bool:
        return self.stage == "bridge" and self._blank_network.takes_neural_prior

    # From a sample to what the network sees

    def label_of(self, caption: str) -> int:
        """The label of a class; the null label for no class, and for a caption that names none, with a warning for
        each of the first such captions.
        """
        label = self._blank_network.label_of(caption)
        if label is not None:
            return label
        if caption and caption not in self._unknown_captions and len(self._unknown_captions) < _WARNINGS:
            self._unknown_captions.add(caption)
            logger.warning(f"caption {caption!r} names no class of the model; the clip is trained on without a class")
        return self._blank_network.null_label

    def encode_caption(self, models: Mapping[str, Any], caption: str, dropped: bool) -> dict[str, torch.Tensor]:
        """What the network is told, and the true class, which a frozen neural prior is told: int64 [1] each."""
        label = torch.tensor([self.label_of(caption)])
        told = torch.tensor([self._blank_network.null_label]) if dropped else label
        return {"class_labels": told, "true_class_labels": label}

    @staticmethod
    def drop_caption(
        conditions: Mapping[str, torch.Tensor], empty_conditions: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Stored conditions of a sample that loses its class; the true one is kept beside it."""
        return {**conditions, "class_labels": empty_conditions["class_labels"]}

    def encode_clip(self, vae: Any, video_BFCHW: torch.Tensor, draw: Draw) -> dict[str, torch.Tensor]:
        """Latents of a clip, a sample of the posterior for every frame; the first is image condition and prior too."""
        self.check_clips((video_BFCHW.shape[1], *video_BFCHW.shape[-2:]))
        latents_BFChw = encode_frames(vae, video_BFCHW, draw("posterior") or torch.default_generator)
        return {"latents": latents_BFChw, "image_latents": latents_BFChw[:, :1].clone()}

    @classmethod
    def decode(cls, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents [B, F, C, h, w], some frames at a time, to pixels in about [-1, 1], [B, 3, F, H, W]."""
        return decode_frames(vae, latents).transpose(1, 2)

    def encoding_facts(self) -> dict[str, Any]:
        """What a bridge, its neural prior and the diffusion baseline have in common."""
        names = ("num_classes", "class_names")
        facts = {name: self.network_config[name] for name in names}
        return facts | {"vae": component_fingerprint(self.folder("vae"))}

    # A batch

    @torch.no_grad()
    def prior(self, conditions: Mapping[str, Any], latents: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The repeated image, or the neural prior's video of it."""
        still_BFChw = super().prior(conditions, latents)
        prior = self.prior_network
        if prior is None:
            return still_BFChw
        if prior.device != still_BFChw.device:
            prior.to(still_BFChw.device)  # the trainers move only the models that they know
        true_labels = conditions.get("true_class_labels", conditions["class_labels"])
        return call_latte(prior, still_BFChw, None, _labels(true_labels, still_BFChw))

    @classmethod
    def bind(
        cls, network: Any, conditions: Mapping[str, Any], image_latents: torch.Tensor, prior: torch.Tensor, **call: Any
    ) -> Network:
        """The network with class, image and the neural prior's video bound."""
        labels, image = _labels(conditions["class_labels"], prior), image_latents[:, :1]
        coarse = prior if network.config.in_channels != network.config.out_channels else None
        return lambda latents, timestep: call_latte(network, latents, timestep, labels, image, coarse)

    # Checks, and what is saved

    def check_training(self, training_type: str) -> None:
        """Refuses LoRA layers on random weights."""
        if training_type == "lora" and self.is_from_scratch:
            raise UsageError(
                "LoRA layers need a trained network; give a model as pretrained_model_name_or_path, or train from "
                "scratch with training_type full-finetune"
            )

    def resume_settings(self) -> dict[str, str]:
        """Classes are numbers to the network."""
        config = self.network_config
        return {"classes": f"{config.num_classes}, names of digest {short_digest(config.class_names)}"}

    def frozen_parts(self) -> list[str]:
        """The autoencoder, and the neural prior if the network takes one."""
        return ["vae", "neural_prior"] if self._takes_neural_prior else ["vae"]

    def place(self, part: str) -> tuple[str, str]:
        """Folder or id that a component comes from, and its subfolder in it."""
        if part != "neural_prior" or self.stage != "bridge":
            return super().place(part)
        if self.neural_prior is not None:
            return find_neural_prior_network(self.neural_prior)
        if not self.source.name_or_path:
            network = self.source.replaced[self.facts.network]
            raise UsageError(f"neural_prior: the network of {network} takes one; give its folder")
        return super().place(part)

    def part_class(self, part: str) -> tuple[str, str]:
        """Library and class of a frozen component."""
        if part == "neural_prior":
            return LatteTransformer.__module__, LatteTransformer.__name__
        return super().part_class(part)

    def pipeline(self, **components: Any) -> Any:
        """The pipeline of these components."""
        return self.facts.load_pipeline()(**components)

    def pipeline_settings(self) -> dict[str, Any]:
        """What a saved model says of a call, besides the rate of its videos."""
        return self.facts.default_call

    def validation_condition(self, prompt: str) -> dict[str, Any]:
        """The class of a validation row."""
        label = self.label_of(prompt)
        return {"class_label": "" if label == self._blank_network.null_label else label}


class NeuralPriorAdapter(LatteAdapter):
    """Latte without time and without the image in front: a coarse video from an image and a class, in one call.

    The network maps the repeated image latent and the class to the video's latents; the loss is the mean squared
    error, so that it learns the mean video (arXiv 2410.15371). Trained first, it is the frozen start of a bridge.
    """

    facts = LATTE_NEURAL_PRIOR
    setting_names = ("latte_size", "class_names", "seed")
    stage = "neural_prior"
    neural_prior = None
    predicts_video = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.objective.objective == "diffusion":
            raise UsageError("objective=diffusion: a neural prior has no noise; leave it out, or train a latte_bridge")

    def load_backbone(self) -> None:
        """None: there is no noise."""

    def own_components(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @classmethod
    def bind(
        cls, network: Any, conditions: Mapping[str, Any], image_latents: torch.Tensor, prior: torch.Tensor, **call: Any
    ) -> Network:
        """The network with class and image bound; latents and time are not used."""
        labels = _labels(conditions["class_labels"], prior)
        return lambda latents, timestep: call_latte(network, image_latents.expand_as(prior), None, labels)

    def pipeline_settings(self) -> dict[str, Any]:
        """Nothing: one call of the network makes the video."""
        return {}


def _labels(labels: Any, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(labels, device=like.device)
