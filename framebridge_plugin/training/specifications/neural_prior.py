"""The neural prior: a coarse video from an image and a class, in one call. `--model_name latte_neural_prior`.

Layouts: B batch, F video frames, C channels, h and w rows and columns of the latents.
"""

from __future__ import annotations

from typing import Any

import torch

from framebridge_plugin.backbones.latte.pipeline import FrameBridgeLattePipeline
from framebridge_plugin.errors import UsageError
from framebridge_plugin.models.calling import call_latte
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.specifications.latte_common import LatteSpecification


class NeuralPriorSpecification(LatteSpecification):
    """Latte without time and without the image in front, from scratch or from a saved model (arXiv 2410.15371).

    The network maps the repeated image latent and the class to the video's latents; the loss is the mean squared
    error, so that it learns the mean video. Trained first, it is the frozen start of a bridge.

    Works with finetrainers' stock `SFTTrainer` and with `FrameBridgeTrainer`. Of the objective's settings only
    `caption_dropout` matters here.

    Args:
        pretrained_model_name_or_path: As for `LatteLoading`.
        **kwargs: As for `LatteLoading`.

    Raises:
        UsageError: If the objective is "diffusion".
    """

    stage = "neural_prior"
    saves_scheduler = False

    def __init__(self, pretrained_model_name_or_path: str = "", **kwargs: Any) -> None:
        super().__init__(pretrained_model_name_or_path, **kwargs)
        if self.objective.objective == "diffusion":
            raise UsageError("objective=diffusion: a neural prior has no noise; leave it out, or train a latte_bridge")

    def load_diffusion_models(self) -> dict[str, Any]:
        """The network, and a scheduler whose indices are drawn by the trainers and not used.

        Returns:
            {"transformer": ..., "scheduler": ...}

        Raises:
            FrameBridgeError: If a file is missing or damaged.
        """
        # finetrainers weighs the loss by its scheduler: under this one every weight is 1.
        return {"transformer": self._load_network(), "scheduler": FrameBridgeScheduler(target="data")}

    def load_pipeline(self, transformer: LatteTransformer | None = None, **kwargs: Any) -> FrameBridgeLattePipeline:
        """A pipeline around the components that are given; the others are loaded.

        Args:
            transformer: The network that is being trained; loaded if None.
            **kwargs: `vae` and finetrainers' switches `enable_slicing`, `enable_tiling`, `enable_model_cpu_offload`;
                others are not used.

        Returns:
            The pipeline, without noise and steps: one call of the network makes the video.
        """
        network = self._load_network() if transformer is None else transformer
        return self._build_pipeline(kwargs, transformer=None, scheduler=None, neural_prior=network)

    def forward(
        self,
        transformer: LatteTransformer,
        condition_model_conditions: dict[str, Any],
        latent_model_conditions: dict[str, torch.Tensor],
        sigmas: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One evaluation of the mean squared error on a batch; nothing is drawn.

        Args:
            transformer: The network.
            condition_model_conditions: What `prepare_conditions` returned, collated.
            latent_model_conditions: What `prepare_latents` returned, collated.
            sigmas: What the trainer drew, B elements; returned as they are.
            **kwargs: finetrainers' other arguments; not used.

        Returns:
            (prediction, target, sigmas): both [B, F, C, h, w] in float32.
        """
        z_0 = latent_model_conditions["latents"].float()
        still = latent_model_conditions["image_latents"].float().expand_as(z_0)
        labels = torch.as_tensor(condition_model_conditions["class_labels"], device=z_0.device)
        return call_latte(transformer, still, None, labels), z_0, sigmas
