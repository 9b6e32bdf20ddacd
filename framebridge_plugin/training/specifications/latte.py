"""Latte as a bridge from an image to a video, or as its diffusion baseline: `--model_name latte_bridge`.

Layouts: B batch, F video frames, C channels, h and w rows and columns of the latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler

from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE
from framebridge_plugin.backbones.latte.pipeline import FrameBridgeLattePipeline
from framebridge_plugin.backbones.latte.rules import neural_prior_mismatch
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.models.calling import call_latte
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.finetrainers.registration import parsed_arguments
from framebridge_plugin.training.objective import ObjectiveSettings, build_scheduler
from framebridge_plugin.training.specifications.latte_common import LatteSpecification
from framebridge_plugin.training.specifications.latte_networks import (
    FOLDER_OF_STAGE,
    find_neural_prior_network,
    load_network,
    read_network,
)
from framebridge_plugin.training.specifications.loading import load_backbone
from framebridge_plugin.training.specifications.samples import evaluate_objective

_NEURAL_PRIOR = FOLDER_OF_STAGE["neural_prior"]


def latte_backbone() -> CogVideoXDDIMScheduler:
    """The diffusion process of Latte: DDPM's linear betas, the network predicts eps.

    It is the noise schedule of the diffusion baseline, and the one that a bridge is aligned to (SAF).

    Returns:
        The scheduler, of the class whose loss finetrainers knows.
    """
    return CogVideoXDDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
        rescale_betas_zero_snr=False,
        snr_shift_scale=1.0,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


class LatteBridgeSpecification(LatteSpecification):
    """A FrameBridge, or its diffusion baseline, on Latte, from scratch or from a saved model.

    With a neural prior the bridge starts from its video instead of the repeated image, and the network sees that video
    as further input channels. The neural prior is frozen: in evaluation mode, in float32, without gradients. Its label
    is the true one where the network's is dropped, as in the reference. It stays whole on every process, since it is
    no part of what finetrainers trains, shards and saves; a saved model links to its files.

    Works with finetrainers' stock `SFTTrainer` and with `FrameBridgeTrainer`.

    Args:
        pretrained_model_name_or_path: As for `LatteLoading`.
        neural_prior: Folder of a `latte_neural_prior` run or of a model that has one, or hub id; by default what the
            parsed command line says, else the one that the saved model has.
        **kwargs: As for `LatteLoading`.

    Raises:
        UsageError: If the objective does not go with the network.
        FrameBridgeError: If a file is missing, damaged, of a model of another kind or stage, or the neural prior is
            for other videos or classes.
    """

    stage = "bridge"

    def __init__(
        self, pretrained_model_name_or_path: str = "", *, neural_prior: str | None = None, **kwargs: Any
    ) -> None:
        self.neural_prior = neural_prior or parsed_arguments().neural_prior
        self._prior_network: LatteTransformer | None = None
        super().__init__(pretrained_model_name_or_path, **kwargs)
        _check_objective(self.objective)

    # Loading

    def _check_network(self) -> None:
        super()._check_network()
        if not self._blank_network.takes_neural_prior:
            if self.neural_prior is not None:
                raise UsageError(
                    f"neural_prior: {self._source(self.network_name)[0]} was trained without one and has no input "
                    "channels for its video; leave neural_prior out, or train from scratch"
                )
            return
        if self.objective.objective == "diffusion":
            raise UsageError("neural_prior: objective=diffusion starts from noise; leave neural_prior out")
        source = self._prior_source()
        prior = read_network(*source, "neural_prior", **self._hub_settings)
        problem = neural_prior_mismatch(prior.config, self._blank_network.config)
        if problem is not None:
            raise FrameBridgeError(f"{source[0]}: {problem}")

    @property
    def _takes_neural_prior(self) -> bool:
        return self.neural_prior is not None

    def _prior_source(self) -> tuple[str, str]:
        if self.neural_prior is not None:
            return find_neural_prior_network(self.neural_prior)
        if not self.pretrained_model_name_or_path:
            raise UsageError(f"neural_prior: the network of {self.transformer_id} takes one; give its folder")
        return self.pretrained_model_name_or_path, _NEURAL_PRIOR

    def load_diffusion_models(self) -> dict[str, Any]:
        """The network and the scheduler of the objective; loads the neural prior too, which stays with this object.

        Returns:
            {"transformer": ..., "scheduler": ...}

        Raises:
            FrameBridgeError: If a file is missing or damaged.
        """
        transformer, scheduler = self._load_network(), self._load_scheduler()
        if self._blank_network.takes_neural_prior and self._prior_network is None:
            prior = load_network(*self._prior_source(), "neural_prior", torch.float32, **self._hub_settings)
            self._prior_network = prior.requires_grad_(False).eval()
        return {"transformer": transformer, "scheduler": scheduler}

    def _load_scheduler(self) -> FrameBridgeScheduler | CogVideoXDDIMScheduler:
        """The scheduler of the objective, over the noise schedule that the model was saved with, or Latte's."""
        backbone = latte_backbone()
        if self.pretrained_model_name_or_path:
            source, expected = self.pretrained_model_name_or_path, "a complete Latte model (scheduler/)"
            saved = load_backbone(source, LATTE_BRIDGE, expected=expected, **self._hub_settings)
            backbone = backbone if saved is None else saved
        scheduler = build_scheduler(backbone, self.objective)
        if isinstance(scheduler, FrameBridgeScheduler):
            # The reference samples Latte on this grid, where it samples CogVideoX on the trailing one.
            scheduler = FrameBridgeScheduler.from_config(scheduler.config, grid="linspace")
        return scheduler

    def load_pipeline(
        self, transformer: LatteTransformer | None = None, scheduler: Any = None, **kwargs: Any
    ) -> FrameBridgeLattePipeline:
        """A pipeline around the components that are given; the others are loaded.

        Args:
            transformer: The network that is being trained; loaded if None.
            scheduler: The objective's scheduler; loaded if None.
            **kwargs: `vae` and finetrainers' switches `enable_slicing`, `enable_tiling`, `enable_model_cpu_offload`;
                others are not used.

        Returns:
            The pipeline.
        """
        if transformer is None or (self._blank_network.takes_neural_prior and self._prior_network is None):
            loaded = self.load_diffusion_models()["transformer"]
            transformer = loaded if transformer is None else transformer
        if scheduler is None:
            scheduler = self._load_scheduler()
        return self._build_pipeline(
            kwargs, transformer=transformer, scheduler=scheduler, neural_prior=self._prior_network
        )

    # Training

    def forward(
        self,
        transformer: LatteTransformer,
        scheduler: FrameBridgeScheduler | CogVideoXDDIMScheduler,
        condition_model_conditions: dict[str, Any],
        latent_model_conditions: dict[str, torch.Tensor],
        sigmas: torch.Tensor,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One evaluation of the objective on a batch.

        Args:
            transformer: The network.
            scheduler: What `load_diffusion_models` returned.
            condition_model_conditions: What `prepare_conditions` returned, collated; without "true_class_labels" no
                class is taken to be dropped.
            latent_model_conditions: What `prepare_latents` returned, collated.
            sigmas: Index (bridge) or timestep (diffusion) divided by the number of training steps; any shape of B
                elements.
            generator: The source of eps; torch's global one if None (the stock trainer passes none).
            **kwargs: finetrainers' other arguments; not used.

        Returns:
            (prediction, target, sigmas): both [B, F, C, h, w] in float32, and the sigmas that finetrainers' loss
            weights are looked up with.
        """
        z_0 = latent_model_conditions["latents"].float()
        image_latents = latent_model_conditions["image_latents"].float()
        labels = torch.as_tensor(condition_model_conditions["class_labels"], device=z_0.device)
        true_labels = torch.as_tensor(condition_model_conditions.get("true_class_labels", labels), device=z_0.device)
        prior_video = self._prior_video(image_latents.expand_as(z_0), true_labels)

        def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return call_latte(transformer, latents, timestep, labels, image_latents, prior_video)

        prior = image_latents.expand_as(z_0) if prior_video is None else prior_video
        return evaluate_objective(network, scheduler, z_0, prior, sigmas, generator)

    @torch.no_grad()
    def _prior_video(self, still_BFChw: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor | None:
        prior = self._prior_network
        if prior is None:
            return None
        if prior.device != still_BFChw.device:
            # The trainers move only the models that they know.
            prior.to(still_BFChw.device)
        return call_latte(prior, still_BFChw, None, labels_B)

    # Validation and saving

    def _place_components(self, pipeline: FrameBridgeLattePipeline) -> None:
        # Offloading moves it itself.
        if pipeline.neural_prior is not None and not hasattr(pipeline.neural_prior, "_hf_hook"):
            pipeline.neural_prior.to(pipeline.transformer.device)

    def _linked_components(self) -> dict[str, tuple[str, str, Path]]:
        components = super()._linked_components()
        if self._blank_network.takes_neural_prior:
            folder = self._component_folder(*self._prior_source())
            components[_NEURAL_PRIOR] = (LatteTransformer.__module__, LatteTransformer.__name__, folder)
        return components

    def _component_sources(self) -> dict[str, tuple[str, str]]:
        sources = super()._component_sources()
        return sources | {_NEURAL_PRIOR: self._prior_source()} if self._blank_network.takes_neural_prior else sources


def _check_objective(objective: ObjectiveSettings) -> None:
    for name in ("image_noise", "prior_noise"):
        if getattr(objective, name):
            raise UsageError(
                f"{name}: Latte's image condition, prior and first target frame share one clean latent; switch it off"
            )
