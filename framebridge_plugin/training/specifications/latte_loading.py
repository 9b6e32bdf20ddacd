"""Where the parts of a Latte specification come from: a seed, a saved model, or folders of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import AutoencoderKL
from finetrainers.models.modeling_utils import ModelSpecification

from framebridge_plugin.data import UCF101_CLASSES
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.models.latte import LatteTransformer, parse_latte_size
from framebridge_plugin.models.whole_weights import whole_weights
from framebridge_plugin.training.finetrainers.arguments import TrainerSettings
from framebridge_plugin.training.finetrainers.registration import parsed_arguments, parsed_objective
from framebridge_plugin.training.objective import ObjectiveSettings
from framebridge_plugin.training.specifications.latte_networks import (
    FOLDER_OF_STAGE,
    blank_network,
    load_network,
    read_network,
)
from framebridge_plugin.training.specifications.loading import LOADING_ERRORS, cannot_load, load_config

DEFAULT_CLIP_SHAPE = (16, 256, 256)
_AUTOENCODER = "an AutoencoderKL in diffusers format (config.json, diffusion_pytorch_model.safetensors)"


class LatteLoading(ModelSpecification):
    """Where network and autoencoder of a Latte specification come from; `LatteSpecification` is the rest of it.

    The network starts from scratch where neither a model nor a `transformer_id` is given, else it goes on from them.

    Args:
        pretrained_model_name_or_path: Folder or hub id of a saved model of the same stage; empty for a network from
            scratch.
        objective: What is trained; by default what the parsed command line says, else the reference's settings.
        latte_size: Size and patch of a network from scratch, such as "S/2"; by default the parsed command line's.
        class_names: Names of its classes in the order of their labels; by default UCF-101's.
        clip_shape: (frames, height, width) of the clips that it is built for; by default the reference's.
        seed: What its weights are drawn from.
        **kwargs: As for finetrainers' `ModelSpecification`: `vae_id` (which a network from scratch needs),
            `transformer_id` (the network's folder alone), `transformer_dtype`, `vae_dtype`, `revision`, `cache_dir`.

    Raises:
        UsageError: If a network from scratch has no autoencoder, or the clips do not fit it.
        FrameBridgeError: If a file is missing, damaged, or of a model of another kind or stage.
    """

    stage: ClassVar[str]
    default_objective: ClassVar[ObjectiveSettings] = ObjectiveSettings(
        target="eps_psi", snr_aligned=False, image_noise=False, prior_noise=False
    )
    default_trainer_settings: ClassVar[TrainerSettings] = TrainerSettings(ema_decay=0.9999)

    def __init__(
        self,
        pretrained_model_name_or_path: str = "",
        *,
        objective: ObjectiveSettings | None = None,
        latte_size: str | None = None,
        class_names: Sequence[str] | None = None,
        clip_shape: tuple[int, int, int] | None = None,
        seed: int = 42,
        **kwargs: Any,
    ) -> None:
        self.objective = objective or parsed_objective(self.default_objective)
        self.latte_size = latte_size or parsed_arguments().latte_size
        self.class_names = list(UCF101_CLASSES if class_names is None else class_names)
        self.clip_shape = clip_shape
        self.clip_rate: float | None = None
        """(frames, height, width) of the training clips, once they are known; saved with LoRA layers."""
        self.seed = seed
        super().__init__(pretrained_model_name_or_path or "", **kwargs)

    @property
    def network_name(self) -> str:
        """The trained network's folder in a saved model."""
        return FOLDER_OF_STAGE[self.stage]

    @property
    def is_from_scratch(self) -> bool:
        """Whether the network starts from a seed and not from trained weights."""
        return not self.pretrained_model_name_or_path and self.transformer_id is None

    # Configs

    def _load_configs(self) -> None:
        if not self.pretrained_model_name_or_path and self.vae_id is None:
            raise UsageError(
                "a Latte network from scratch needs an autoencoder; give vae_id, for example stabilityai/sd-vae-ft-ema"
            )
        self._load_vae_config()
        self._load_transformer_config()

    def _load_transformer_config(self) -> None:
        if self.is_from_scratch:
            self._set_blank_network(blank_network(self._new_config()))
        else:
            self._set_blank_network(read_network(*self._source(self.network_name), self.stage, **self._hub_settings))
        if not self.is_from_scratch or self.clip_shape is not None:
            # Else the trainer has yet to say which clips the network is for; then it is checked when it is loaded.
            self._check_network()

    def blank_network(self) -> LatteTransformer:
        """The network without weights: its modules, by which LoRA layers find their places."""
        return self._blank_network

    def _set_blank_network(self, network: LatteTransformer) -> None:
        """Keeps the network's config and classes."""
        self._blank_network = network
        self.transformer_config = network.config

    def _check_network(self) -> None:
        """Compares what comes from different places, from the configs alone."""
        channels, latent_channels = self.transformer_config.out_channels, self.vae_config.latent_channels
        if channels != latent_channels:
            raise FrameBridgeError(
                f"{self._source(self.network_name)[0]} is for latents of {channels} channels, the autoencoder "
                f"{self._source('vae')[0]} has {latent_channels}; give the autoencoder that it was trained with"
            )

    def _load_vae_config(self) -> None:
        source, subfolder = self._source("vae")
        self.vae_config = load_config(AutoencoderKL, source, subfolder, expected=_AUTOENCODER, **self._hub_settings)

    @property
    def _hub_settings(self) -> dict[str, Any]:
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    def _source(self, component: str) -> tuple[str, str]:
        """Where a component comes from: folder or id, and the subfolder in it ("" for a component alone)."""
        alone = {"vae": self.vae_id, self.network_name: self.transformer_id}.get(component)
        return (self.pretrained_model_name_or_path, component) if alone is None else (alone, "")

    @property
    def _vae_scale(self) -> int:
        return 2 ** (len(self.vae_config.block_out_channels) - 1)

    def _new_config(self) -> dict[str, Any]:
        """The config of a network from scratch."""
        num_frames, height, width = self.clip_shape or DEFAULT_CLIP_SHAPE
        *_, patch = parse_latte_size(self.latte_size)
        step = self._vae_scale * patch
        if height % step or width % step:
            raise UsageError(
                f"clips of {height} x {width} pixels do not fit Latte-{self.latte_size} and this autoencoder; choose "
                f"multiples of {step}"
            )
        return LatteTransformer.config_from_size(
            self.latte_size,
            sample_height=height // self._vae_scale,
            sample_width=width // self._vae_scale,
            num_frames=num_frames,
            class_names=self.class_names,
            latent_channels=self.vae_config.latent_channels,
            takes_neural_prior=self._takes_neural_prior,
            stage=self.stage,
        )

    @property
    def _takes_neural_prior(self) -> bool:
        """Whether a network from scratch has input channels for a neural prior."""
        return False

    # Weights

    def _load_network(self) -> LatteTransformer:
        if self.is_from_scratch:
            self._set_blank_network(blank_network(self._new_config()))
            self._check_network()
            return LatteTransformer.from_scratch(self.transformer_config, self.seed).to(self.transformer_dtype)
        source, subfolder = self._source(self.network_name)
        return load_network(source, subfolder, self.stage, self.transformer_dtype, **self._hub_settings)

    def load_condition_models(self) -> dict[str, Any]:
        """No models: the network itself embeds the class.

        Returns:
            {}
        """
        return {}

    def load_latent_models(self) -> dict[str, Any]:
        """The autoencoder of images, which encodes every frame by itself.

        Returns:
            {"vae": ...}

        Raises:
            FrameBridgeError: If a file is missing or damaged.
        """
        source, subfolder = self._source("vae")
        try:
            with whole_weights():
                vae = AutoencoderKL.from_pretrained(
                    source, subfolder=subfolder, dtype=self.vae_dtype, use_safetensors=True, **self._hub_settings
                )
        except LOADING_ERRORS as error:
            raise cannot_load("autoencoder", source, error, _AUTOENCODER) from error
        return {"vae": vae}
