"""How a video is sampled: the settings of the scheduler, and the other options of `finetrainers sample`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from framebridge_plugin.settings.base import Section
from framebridge_plugin.settings.choices import (
    Count,
    FrameRate,
    Grid,
    NonNegative,
    Offload,
    Order,
    Sampler,
    Share,
    Start,
    Tiling,
    sampler_conflicts,
)


class SamplerSection(Section):
    """How the scheduler steps from the image's latents to the video's."""

    sampler: Sampler = Field(default="sde", description="sde: as the reference (default: sde)")
    order: Order = Field(default=1, description="2: multistep, dbim only (default: 1)")
    eta: Share | None = Field(default=None, description="share of fresh noise in a step of dbim, 0 to 1 (default: 0)")
    grid: Grid = Field(default="trailing", description="times (default: trailing; Latte: linspace)")
    start: Start = Field(
        default="booted",
        description="first latent: the prior with its noise, or bare as the reference's (default: booted)",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        yield from super().conflicts()
        yield from sampler_conflicts(self.sampler, self.order, self.eta, self.start)


class CallSection(SamplerSection):
    """How videos are made: the options that `finetrainers sample` and `evaluate` share."""

    steps: Count | None = Field(
        default=None, description="sampling steps (default: the model's, else its backbone's: 50, Latte 1000)"
    )
    guidance_scale: NonNegative | None = Field(
        default=None,
        description="1: none (default: the model's, else its backbone's: CogVideoX 6, Wan 5, LTX 3, Latte 7)",
    )
    use_dynamic_cfg: bool = Field(
        default=False, description="for a model of text: guidance that changes by step, as in diffusers' CogVideoX"
    )
    seed: int = Field(
        default=42, ge=0, lt=2**63, description="of the first video; video i takes seed + i (default: 42)"
    )
    num_frames: Count | None = Field(default=None, description="default: the model's")
    height: Count | None = Field(default=None, description="pixels (default: the model's)")
    width: Count | None = Field(default=None, description="pixels (default: the model's)")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="default: fp32 on a CPU, bf16 on a GPU"
    )
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, ... (default: the GPU, if there is one)")
    batch_size: Count | None = Field(
        default=None,
        description="inputs in a call of the network, two for a video with guidance (default: as many as fit; "
        "without it what does not fit at all is refused)",
    )
    tiling: Tiling = Field(
        default="auto",
        description="decode frames by tiles, for less memory and slightly other pixels; auto: above 256x256, Latte "
        "never (default: auto)",
    )
    offload: Offload = Field(
        default="none",
        description="on a GPU, what waits in main memory: all components but one (model) or all layers but the next "
        "(group; sequential: but one, the slowest) (default: none)",
    )
    compile: bool = Field(default=False, description="compile the network's blocks: minutes once, then faster steps")
    verify: bool = Field(
        default=False, description="read every file of the model first, and compare it with the model's manifest.json"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        yield from super().conflicts()
        if self.steps is not None and self.steps > most_steps(self.grid):
            yield "steps", f"the grid has {most_steps(self.grid)} at most, not {self.steps}; the grid lambda has more"


class SampleSection(CallSection):
    """The options of `finetrainers sample`, besides the model, its inputs and its output."""

    fps: FrameRate | None = Field(
        default=None, description="frames per second (default: those of the model's training clips)"
    )
    num_videos: Count = Field(default=1, description="videos per image (default: 1)")


NETWORKS = ("stlpips", "vmaf", "transnetv2", "efficientnet_lite0")
"""Trained networks that `finetrainers evaluate --also` names; all but vmaf are in the extra `evaluate`."""


class EvaluateSection(CallSection):
    """The options of `finetrainers evaluate`, besides the model, its clips and its output."""

    count: Count | None = Field(
        default=None, description="clips (default: as many as there are, 64 at most) or images"
    )
    clip_seed: int = Field(default=0, ge=0, description="chooses the clips and their windows (default: 0)")
    num_videos: Count = Field(default=1, description="videos of each of --images (default: 1; VBench-I2V: 5)")
    batch_size: Count = Field(
        default=16,
        description="inputs in a call of the network, two for a video with guidance; the videos of a call are a file "
        "of the output (default: 16)",
    )
    fvd_features: str | None = Field(
        default=None, description="the I3D of FVD: a torchscript file, or the hub's repository of one"
    )
    fvd_sha256: str | None = Field(
        default=None, description="the SHA-256 of that file, which is refused if it differs"
    )
    fvd_frames: Count | None = Field(default=None, description="the first frames that FVD looks at (default: all)")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        yield from super().conflicts()
        for name in ("fvd_sha256", "fvd_frames"):
            if getattr(self, name) is not None and self.fvd_features is None:
                yield name, "has an effect with --fvd-features only: give both"


def most_steps(grid: str) -> float:
    """The most steps of a grid: as many as a model's bridge has indices, 1000; no limit between them."""
    return math.inf if grid == "lambda" else 1000
