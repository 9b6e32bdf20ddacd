"""What all our specifications do with finetrainers' samples, batches and validation rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from PIL import Image

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.objective import Network, bridge_prediction, diffusion_prediction


def sample_generator(
    sample_seed: int | None, purpose: str, generator: torch.Generator | None
) -> torch.Generator | None:
    """The generator of one draw for a sample.

    Args:
        sample_seed: Seed of the sample's draws, from `ClipStream`; None under the stock trainer.
        purpose: What is drawn.
        generator: What the trainer gives.

    Returns:
        A generator keyed on the sample where its seed is known, else the trainer's.
    """
    if sample_seed is None:
        return generator
    return torch.Generator().manual_seed(derive_seed(int(sample_seed), purpose))


def drops_caption(share: float, sample_seed: int | None, generator: torch.Generator | None = None) -> bool:
    """Draws whether a sample loses its caption, for classifier-free guidance.

    Args:
        share: Share of samples that do.
        sample_seed: As for `sample_generator`.
        generator: As for `sample_generator`; it gives one number in any case.

    Returns:
        Whether it does.
    """
    draw = sample_generator(sample_seed, "caption dropout", generator)
    device = draw.device if draw is not None else "cpu"
    return bool(torch.rand((), generator=draw, device=device) < share)


def one_caption(caption: str | list[str]) -> str:
    """The caption of a sample.

    Args:
        caption: The text, or a list with one text (as a loader of batches of one gives it).

    Returns:
        The text.
    """
    return caption if isinstance(caption, str) else caption[0]


def caption_or_empty(
    caption: str | list[str], share: float, sample_seed: int | None, generator: torch.Generator | None
) -> str:
    """Drops captions.

    Args:
        caption: As for `one_caption`.
        share: As for `drops_caption`.
        sample_seed: As for `drops_caption`.
        generator: As for `drops_caption`.

    Returns:
        The caption, or the empty one.
    """
    return "" if drops_caption(share, sample_seed, generator) else one_caption(caption)


def video_of_sample(video: torch.Tensor | None) -> torch.Tensor:
    """The clip of a sample, as a batch of one.

    Args:
        video: Pixels [F, 3, H, W] or [1, F, 3, H, W], or None for a sample of an image data set.

    Returns:
        Pixels [1, F, 3, H, W].

    Raises:
        FrameBridgeError: If there is none.
    """
    if video is None:
        raise FrameBridgeError("a sample has no video; image-to-video training needs clips, not images")
    return video if video.ndim == 5 else video.unsqueeze(0)


def evaluate_objective(
    network: Network,
    scheduler: FrameBridgeScheduler | CogVideoXDDIMScheduler,
    z_0: torch.Tensor,
    prior: torch.Tensor,
    sigmas: torch.Tensor,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One evaluation of the bridge's objective, or the diffusion baseline's, as finetrainers' loop asks for it.

    Args:
        network: The network with everything but latents and time bound.
        scheduler: What `build_scheduler` returned.
        z_0: Latents of the video in float32, [B, T, C, h, w].
        prior: End point z_T of the bridge, [B, T, C, h, w]; the baseline has none.
        sigmas: Index (bridge) or timestep (diffusion) divided by the number of training steps; any shape of B
            elements.
        generator: The source of eps; torch's global one if None.

    Returns:
        (prediction, target, sigmas): both of the shape of `z_0`, and the sigmas [B] that finetrainers' loss weights
        are looked up with.
    """
    noise = torch.randn(z_0.shape, generator=generator, device=z_0.device, dtype=z_0.dtype)
    num_train_timesteps = scheduler.config.num_train_timesteps
    index = (sigmas.flatten().double() * num_train_timesteps).round().clamp(0, num_train_timesteps - 1)
    if isinstance(scheduler, FrameBridgeScheduler):
        prediction, target = bridge_prediction(network, scheduler, z_0, prior, noise, index)
    else:
        prediction, target = diffusion_prediction(network, scheduler, z_0, noise, index.long())
    # finetrainers truncates sigma * 1000 to find the loss weight: half a step keeps it on this index.
    return prediction, target, ((index + 0.5) / num_train_timesteps).float()


def validation_image(prompt: str, image: Image.Image | None, video: list[Image.Image] | None) -> Image.Image:
    """The image that a validation row starts from.

    Args:
        prompt: Its caption.
        image: Its image.
        video: Its video, whose first frame counts where there is no image.

    Returns:
        The image.

    Raises:
        FrameBridgeError: If there is neither.
    """
    if image is not None:
        return image
    if not video:
        raise FrameBridgeError(
            f"validation sample {prompt!r} has no image; add an image_path (or video_path) to the validation file"
        )
    return video[0]


def validation_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that a validation row gives for a pipeline's call.

    Args:
        row: The row; a column with an empty cell arrives as floats.

    Returns:
        Those of `height`, `width`, `num_frames`, `num_inference_steps` and `guidance_scale` that are given.
    """
    types = {"height": int, "width": int, "num_frames": int, "num_inference_steps": int, "guidance_scale": float}
    return {name: kind(row[name]) for name, kind in types.items() if row.get(name) is not None}
