"""What is this package's own: the objective, the trainer beyond finetrainers', the beginning of a run, the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from framebridge_plugin.settings.base import CheckedSettings, PathText, Section
from framebridge_plugin.settings.choices import ANEW, REFUSED, AlignmentEdge, BelowOne, Count, NonNegative, Target

Updates = Annotated[int, Field(ge=0)]
DEFAULT_LATTE_SIZE = "S/2"
LatteSize = Literal[
    "Ti/2", "Ti/4", "Ti/8", "S/2", "S/4", "S/8", "B/2", "B/4", "B/8", "L/2", "L/4", "L/8", "XL/2", "XL/4", "XL/8"
]  # fmt: skip


class ProcessSection(Section):
    """The bridge and what its network predicts, as training chooses them and a saved scheduler keeps them."""

    on_resume = "objective", {"target": REFUSED}

    target: Target = Field(
        default="v",
        description="what the network predicts in a bridge (Latte: eps_psi; Wan, LTX: flow); for Latte's diffusion "
        "baseline noise, which is what it predicts if nothing is said, or v",
    )
    alignment_edge: AlignmentEdge = Field(
        default="exact", description="SAF at the 14 indices nearest to the data: exact, or as the authors' release"
    )
    beta_min: NonNegative = Field(default=0.01, description="bridge schedule: g^2 at t = 0")
    beta_max: NonNegative = Field(default=50.0, description="bridge schedule: g^2 at t = 1")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        yield from super().conflicts()
        if self.beta_min == self.beta_max == 0:
            yield "beta_max", "should be above 0 when beta_min is 0: there would be no noise at all"


class ObjectiveSection(ProcessSection):
    """What is trained; the facts of a backbone hold the defaults that are its own."""

    on_resume = "objective", {"objective": REFUSED}

    objective: Literal["bridge", "diffusion"] = Field(
        default="bridge",
        description="diffusion: the matched baseline, the backbone's own loss with the same network, data and image",
    )
    snr_aligned: bool = Field(default=True, description="SNR-aligned fine-tuning (SAF); Latte: off")
    image_noise: bool = Field(
        default=True, description="noise on the pixels of the condition image; models of text only"
    )
    prior_noise: bool = Field(
        default=True, description="noise on the pixels of the prior, drawn per frame; models of text only"
    )
    noise_log_mean: float = Field(
        default=-3.0, ge=-20, le=3, description="the noise's std is exp(N(mean, std^2)), pixels in [-1, 1]"
    )
    noise_log_std: float = Field(default=0.5, ge=0, le=3, description="see noise_log_mean")
    caption_dropout: BelowOne = Field(
        default=0.1, description="probability of an empty caption (Latte: of the null label in place of the class)"
    )


class TrainerSection(Section):
    """What our trainer does and finetrainers' has no argument for."""

    on_resume = ANEW, {"ema_decay": REFUSED, "ema_start_step": REFUSED, "text_encoder_device": "precision"}

    ema_decay: BelowOne = Field(
        default=0.0,
        description="average of the weights over the updates, which becomes the model; 0: off; Latte: .9999",
    )
    ema_start_step: Updates = Field(default=0, description="updates before the average begins")
    max_grad_norm_start_step: Updates = Field(
        default=0, description="updates before gradients are clipped to optimization.max_grad_norm"
    )
    dataloader_prefetch_factor: Count = Field(default=2, description="clips that each reading process holds ready")
    dataloader_timeout: int = Field(
        default=0, ge=0, description="seconds to wait for a reading process before the run ends; 0: for ever"
    )
    text_encoder_device: Literal["cpu"] | None = Field(
        default=None, description="where the text encoder computes; none: beside the network"
    )
    caption_cache_gib: NonNegative = Field(
        default=1.0,
        description="GiB of captions' embeddings that each process keeps (1.85 MB each for CogVideoX in bf16); where "
        "all captions fit, they are embedded first, and the text encoder is not kept",
    )
    caption_cache_dir: PathText | None = Field(
        default=None,
        description="folder for these, up to caption_cache_gib, which processes, later runs and `finetrainers "
        "precompute` share; none, or left empty: in memory",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        yield from super().conflicts()
        if self.ema_start_step and not self.ema_decay:
            yield "ema_start_step", "has no effect with ema_decay 0: remove it"
        if self.caption_cache_dir is not None and not self.caption_cache_gib:
            yield "caption_cache_dir", "has no effect with caption_cache_gib 0: remove it"


class BeginningSection(Section):
    """What a run begins with, besides the pretrained model."""

    on_resume = "base", {"latte_size": REFUSED, "start_from": ANEW, "precomputed": "data"}

    latte_size: LatteSize | None = Field(
        default=None, description=f"size and patch of a Latte from scratch, {DEFAULT_LATTE_SIZE} if nothing is said"
    )
    neural_prior: PathText | None = Field(
        default=None,
        description="latte_bridge only: run or model of a latte_neural_prior, whose video is where the bridge begins",
    )
    start_from: PathText | None = Field(
        default=None,
        description="earlier run (or its model or LoRA) whose weights the new run begins with, at update 0 and with a "
        "fresh optimizer; LoRA for LoRA, a whole model for either",
    )
    precomputed: PathText | None = Field(
        default=None, description="folder that `finetrainers precompute` wrote; none: clips are read and encoded"
    )


class ObjectiveSettings(CheckedSettings, ObjectiveSection):
    """What is trained, as the recipe's section `framebridge` says it; see `ObjectiveSection`.

    Raises:
        UsageError: If a value is out of range.
    """


class TrainerSettings(CheckedSettings, TrainerSection):
    """What our trainer does and finetrainers' has no argument for; see `TrainerSection`.

    Raises:
        UsageError: If a value is out of range.
    """
