"""What training and sampling ask of a backbone; the defaults are those of a text-to-video model that is widened.

Layouts: B batch, F video frames, T latent frames, C channels, H and W height and width, h and w those of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import FrozenDict

from framebridge_plugin.backbones.encoding import decode_video, encode_video, noisy_pixels
from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.fingerprint import component_fingerprint
from framebridge_plugin.backbones.loading import (
    ModelSource,
    cannot_load,
    load_backbone_scheduler,
    load_config,
    load_tokenizer,
    load_weights,
)
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.library_messages import no_warnings
from framebridge_plugin.models.widening import widen_input_channels

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents [B, T, C, h, w], time [B]) -> float32 output [B, T, C, h, w]; all else is bound already."""

Draw = Callable[[str], torch.Generator | None]
"""The source of a sample's draws for a purpose."""


class BackboneAdapter:
    """A backbone as its parts are loaded, encoded, called and saved; one object for a model that is being trained.

    Args:
        source: Where its components come from.
        objective: What is trained: `framebridge_plugin.training.objective.ObjectiveSettings`.
        **settings: Those of the backbone's own settings, `setting_names`.

    Attributes:
        network_config: Config of the network, as it was found.
        vae_config: Config of the autoencoder.

    Raises:
        FrameBridgeError: If a component is missing, damaged or of another kind.
    """

    facts: ClassVar[BackboneFacts]
    text_pipeline_class: ClassVar[Any]
    """diffusers' own text-to-video pipeline, whose `encode_prompt` is used."""
    network_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    tokenizer_class: ClassVar[Any]
    text_encoder_class: ClassVar[Any]
    call_network: ClassVar[Callable[..., torch.Tensor]]
    """Runs the widened network on [B, T, 2 C, h, w], times [B] and conditions by name; float32 [B, T, C, h, w]."""
    text_layer: ClassVar[str]
    """The network's layer that the text goes into; its precision is the network's."""
    embeddings: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "prompt_embeds"}
    """The argument of its pipeline's call for each of `text_conditions`, with `negative_` before it for the others."""
    backbone_class: ClassVar[Any] = None
    """The class that stands for every scheduler of the backbone; None to take each as it is."""
    still_is_constant: ClassVar[bool] = False
    """Whether the latents of a still video are those of one frame, repeated over time: the autoencoder's time axis is
    padded with the first frame."""
    largest_whole_frame: ClassVar[float] = 256 * 256
    """Pixels of a frame up to which videos are decoded whole, above by tiles, where nobody says otherwise."""
    setting_names: tuple[str, ...] = ()
    """Its own settings, by the names that a specification takes them under."""
    predicts_video: ClassVar[bool] = False
    """Whether the network gives the video in one call, without time and noise (a neural prior)."""

    def __init__(self, source: ModelSource, objective: Any, **settings: Any) -> None:
        self.source, self.objective = source, objective
        self.clip_shape: tuple[int, int, int] | None = settings.pop("clip_shape", None)
        for name in self.setting_names:
            setattr(self, name, settings.get(name))
        self.vae_config: FrozenDict = self.load_part_config("vae", self.vae_class)
        self.network_config: FrozenDict = self.read_network_config()

    # Loading

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each component of its pipeline but the scheduler."""
        parts = [part for part in (*cls.facts.parts, *cls.facts.optional_parts) if part != "scheduler"]
        return {part: getattr(cls, f"{part}_class", cls.network_class) for part in parts}

    @property
    def expected(self) -> str:
        """What the model's folder should be, for errors."""
        parts = ", ".join(f"{part}/" for part in self.facts.parts)
        return f"a complete {self.facts.title} model in diffusers format (model_index.json, {parts})"

    def load_part_config(self, part: str, component_class: Any) -> FrozenDict:
        """The config of a component, refused if it is of another kind."""
        place = self.source.place(part)
        config = load_config(component_class, self.source, place, self.expected)
        if problem := self.facts.config_problem(part, config):
            raise cannot_load(part, place[0], f"it {problem}", self.expected)
        return config

    def read_network_config(self) -> FrozenDict:
        """The network's config; refuses a scheduler that the bridge is not aligned to as well."""
        config = self.load_part_config(self.facts.network, self.network_class)
        self.load_backbone()
        return config

    def blank_network(self) -> Any:
        """The network without weights: its modules, by which LoRA layers find their places."""
        with torch.device("meta"):
            return self.widen(self.network_class.from_config(self.network_config))

    @classmethod
    def widen(cls, network: Any) -> Any:
        """Gives the network channels for the image, where it has none."""
        projection = cls.facts.input_projection
        return network if projection is None else widen_input_channels(network, projection)

    def load_network(self, dtype: torch.dtype) -> Any:
        """The network that is trained."""
        network = self.load_part(self.facts.network, self.network_class, dtype)
        try:
            return self.widen(network)
        finally:
            self.network_config = network.config

    def load_part(self, part: str, component_class: Any, dtype: torch.dtype) -> Any:
        """A component with its weights."""
        what = {"vae": "autoencoder", "text_encoder": "text encoder"}.get(part, part)
        return load_weights(component_class, what, self.source, self.source.place(part), self.expected, dtype=dtype)

    def load_backbone(self) -> Any:
        """The scheduler of the model's own process; None for a bridge that was trained without one."""
        backbone = load_backbone_scheduler(self.source, self.facts, self.expected)
        if backbone is None or self.backbone_class is None:
            return backbone
        return self.backbone_class.from_config(backbone.config)

    def load_vae(self, dtype: torch.dtype) -> Any:
        """The autoencoder."""
        return self.load_part("vae", self.vae_class, dtype)

    def load_condition_models(self, dtype: torch.dtype) -> dict[str, Any]:
        """What encodes captions."""
        tokenizer = load_tokenizer(self.tokenizer_class, self.source, self.expected)
        return {"tokenizer": tokenizer, "text_encoder": self.load_part("text_encoder", self.text_encoder_class, dtype)}

    def own_components(self) -> dict[str, Any]:
        """Loaded components that finetrainers does not know, by their names in the pipeline."""
        return {}

    def blank_components(self) -> Iterator[tuple[str, Any]]:
        """Yields what `own_components` gives after loading, without weights, and takes it for loaded."""
        yield from ()

    # From a sample to what the network sees

    @classmethod
    def max_sequence_length(cls, network_config: Mapping[str, Any]) -> int:
        """Tokens of a caption."""
        raise NotImplementedError

    def encode_caption(self, models: Mapping[str, Any], caption: str, dropped: bool) -> dict[str, torch.Tensor]:
        """The condition of a sample, [1, ...] each, for the empty caption if its own is dropped."""
        parts = {part: models.get(part) for part in self.facts.parts}
        pipeline = self.text_pipeline_class(**parts)
        text_encoder = models["text_encoder"]
        with no_warnings(type(pipeline).__module__, "transformers.tokenization_utils_base"):  # of each long caption
            encoded = pipeline.encode_prompt(
                "" if dropped else caption,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length(self.network_config),
                device=text_encoder.device,
                dtype=text_encoder.dtype,
            )
        return self.text_conditions(encoded)[0]

    @classmethod
    def text_conditions(cls, encoded: tuple[Any, ...]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What `bind` takes, for the captions and for the negative ones, of what `encode_prompt` returned."""
        positive, negative = encoded
        return {"encoder_hidden_states": positive}, {"encoder_hidden_states": negative}

    @classmethod
    def embedded_call(
        cls, positive: Mapping[str, torch.Tensor], negative: Mapping[str, torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The arguments of a pipeline's call for conditions of a prompt and a negative one, in place of the texts."""
        call = {name: positive[condition] for condition, name in cls.embeddings.items()}
        call |= {f"negative_{name}": negative[condition] for condition, name in cls.embeddings.items()}
        return {name: value.to(device) for name, value in call.items()}

    @staticmethod
    def drop_caption(
        conditions: Mapping[str, torch.Tensor], empty_conditions: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Stored conditions of a sample that loses its caption, out of its own and those of the empty one."""
        return dict(empty_conditions)

    def encode_clip(self, vae: Any, video_BFCHW: torch.Tensor, draw: Draw) -> dict[str, torch.Tensor]:
        """Latents of a clip, of its first frame as the condition image, and of a noisy prior if noise is on.

        Always the mode of the autoencoder's posterior. Without noise the condition image and the prior share their
        latents.
        """
        noisy = noisy_pixels(video_BFCHW[:, 0], video_BFCHW.shape[1], self.objective, draw)
        return self.encode_noisy_clip(vae, video_BFCHW, noisy)

    def encode_noisy_clip(
        self, vae: Any, video_BFCHW: torch.Tensor, noisy: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """`encode_clip` with what `noisy_pixels` made of the first frame, where that was drawn before."""
        settings, image_BCHW, num_frames = self.objective, video_BFCHW[:, 0], video_BFCHW.shape[1]
        result = {"latents": encode_video(vae, video_BFCHW)}
        result["image_latents"] = self.encode_still(vae, noisy.get("image", image_BCHW), num_frames)
        if "prior" in noisy:
            result["prior_latents"] = encode_video(vae, noisy["prior"])
        elif settings.objective == "bridge" and settings.image_noise:
            result["prior_latents"] = self.encode_still(vae, image_BCHW, num_frames)
        return result

    @classmethod
    def encode_still(
        cls, vae: Any, image_BCHW: torch.Tensor, num_frames: int, device: torch.device | None = None
    ) -> torch.Tensor:
        """Latents of videos in which nothing moves, [B, T, C, h, w], or [B, 1, C, h, w] where that is the same."""
        frames = 1 if cls.still_is_constant else num_frames
        return encode_video(vae, image_BCHW.unsqueeze(1).expand(-1, frames, -1, -1, -1), device)

    @classmethod
    def decode(cls, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents [B, T, C, h, w] to pixels in about [-1, 1], [B, 3, F, H, W]."""
        return decode_video(vae, latents)

    def encoding_facts(self) -> dict[str, Any]:
        """What `encode_clip` and `encode_caption` depend on besides clip, caption, seeds and precisions."""
        settings = ("objective", "image_noise", "prior_noise", "noise_log_mean", "noise_log_std")
        return {
            **{name: getattr(self.objective, name) for name in settings},
            "max_text_seq_length": self.max_sequence_length(self.network_config),
            **{part: component_fingerprint(self.folder(part)) for part in self.frozen_parts()},
        }

    # A batch

    def prior(self, conditions: Mapping[str, Any], latents: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """End point z_T of the bridge, float32 [B, T, C, h, w]."""
        prior = latents.get("prior_latents", latents["image_latents"])
        return prior.float().expand_as(latents["latents"])

    @classmethod
    def call_settings(cls, frame_rate: float | None) -> dict[str, Any]:
        """What `bind` is told of every call, for videos of so many frames per second (None if it is not known)."""
        return {}

    @classmethod
    def baseline_times(cls, scheduler: Any, num_steps: int, shape: torch.Size) -> dict[str, Any]:
        """The arguments of its own scheduler that say at which times latents [B, T, C, h, w] are sampled."""
        return {"num_inference_steps": num_steps}

    @classmethod
    def bind(
        cls, network: Any, conditions: Mapping[str, Any], image_latents: torch.Tensor, prior: torch.Tensor, **call: Any
    ) -> Network:
        """The network with everything but latents and time bound.

        Args:
            network: The network, sharded (FSDP2) or not.
            conditions: What `encode_caption` returned, collated: [B, ...].
            image_latents: Latents of the condition image, [B, T, C, h, w], or [B, 1, C, h, w] to be repeated.
            prior: What `prior` returned.
            **call: Settings of a call that the caller of a pipeline gave, such as `attention_kwargs`.

        Returns:
            The callable.
        """
        image = image_latents.expand_as(prior)
        return lambda latents, timestep: cls.call_network(
            network, torch.cat([latents, image], dim=2), timestep, **conditions, **call
        )

    # Checks, and what is saved

    def check_clips(self, shape: tuple[int, int, int]) -> None:
        """Refuses clips (frames, height, width) that the model is not for."""
        rule = self.facts.clip_rule(self.vae_config, self.network_config)
        for name, problem in rule.problems(*shape):
            raise UsageError(f"clips: {name}: {problem}")

    def check_captions(self, captions: Iterable[str], where: str) -> None:
        """Refuses captions that name no class of the model; text is free."""
        classes = self.facts.known_classes(self.network_config)
        for caption in filter(None, captions):
            if classes is not None and (problem := classes.problem(caption)):
                raise FrameBridgeError(f"{where}: {problem}; leave such clips out, or train from scratch on them")

    def check_training(self, training_type: str) -> None:
        """Refuses what cannot be trained."""

    def resume_settings(self) -> dict[str, str]:
        """What a resumed run must have in common with the stored one, and its weights do not tell."""
        return {}

    def frozen_parts(self) -> list[str]:
        """The components that training leaves as they are."""
        return [part for part in self.facts.parts if part not in (self.facts.network, "scheduler")]

    def folder(self, part: str) -> Path:
        """The folder of a component on this machine."""
        return self.source.local(*self.place(part))

    def place(self, part: str) -> tuple[str, str]:
        """Folder or id that a component comes from, and its subfolder in it."""
        return self.source.place(part)

    def part_class(self, part: str) -> tuple[str, str]:
        """Library and class of a frozen component, as model_index.json gives them."""
        component_class = self.component_classes()[part]
        return component_class.__module__.partition(".")[0], component_class.__name__

    def pipeline(self, **components: Any) -> Any:
        """The pipeline of these components."""
        num_frames, height, width = self.clip_shape or (None, None, None)
        return self.facts.load_pipeline()(**components, num_frames=num_frames, height=height, width=width)

    def pipeline_settings(self) -> dict[str, Any]:
        """What a saved model says of a call, besides the rate of its videos."""
        sizes = dict(zip(("num_frames", "height", "width"), self.clip_shape or (None, None, None), strict=True))
        return sizes | self.facts.default_call

    def validation_condition(self, prompt: str) -> dict[str, Any]:
        """The arguments of a pipeline's call for a validation row's caption."""
        return {"prompt": prompt}
