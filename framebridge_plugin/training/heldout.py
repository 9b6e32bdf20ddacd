"""The loss on clips that are not trained on, always at the same times and with the same noise: `validation.heldout`.

What is drawn belongs to the clip and the band of time alone, whatever the run's seed: curves of one run, and of runs
on the same clips, differ by their weights and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from finetrainers import utils

from framebridge_plugin import signals
from framebridge_plugin.backbones.fingerprint import short_digest
from framebridge_plugin.data import BadFilePolicy, ClipError, ClipIndex, ClipSettings
from framebridge_plugin.data.clips import read_pixels
from framebridge_plugin.errors import FrameBridgeError, get_logger
from framebridge_plugin.processes import is_first, of_all_ranks
from framebridge_plugin.progress import Progress
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training.batches import collated

if TYPE_CHECKING:
    from framebridge_plugin.training.trainer import FrameBridgeTrainer

BANDS = 10
RATIOS = tuple(10 ** (1 - band / 3) for band in range(BANDS))
"""The ratios of signal to noise at which bridge and diffusion are compared: 10, 4.64, 2.15, 1, ..., .01."""

logger = get_logger(__name__)


@dataclass
class _Clip:
    number: int
    counts: bool
    """Whether it is no clip of another rank."""
    caption: str
    name: str
    """Its path below the folder of all."""
    video_FCHW: torch.Tensor | None
    """Its pixels until it is encoded."""
    conditions: dict[str, Any] = field(default_factory=dict)
    latents: dict[str, torch.Tensor] = field(default_factory=dict)


class HeldoutClips:
    """This rank's share of the held-out clips: read when it is made, encoded once, and kept in main memory.

    All ranks have as many, clips of others where the number does not divide: a sharded network computes only when all
    of its ranks do. The place of a clip that cannot be read is taken by the row after it, which is said.

    Args:
        index: The rows, from which the clips are taken at even distances.
        settings: How they are cut.
        wanted: How many clips; all rows if they are fewer.
        policy: What is done about files that cannot be read.
        rank: This process among those that share the data.
        world_size: Number of those processes.

    Raises:
        FrameBridgeError: A clip cannot be read, nor what may take its place; without a message on later ranks.
    """

    def __init__(
        self,
        index: ClipIndex,
        settings: ClipSettings,
        wanted: int,
        policy: BadFilePolicy,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count = min(wanted, len(index))
        self._cut = settings.fingerprint()
        self._clips: list[_Clip] = []
        problem = None
        try:
            for place in range(rank, rank + self.count, world_size):
                self._clips.append(self._read(index, settings, place, policy.max_attempts))
        except FrameBridgeError as error:
            problem = f"validation.heldout: {error}; repair or remove the file, or name other clips"
        if problems := [found for found in of_all_ranks(problem) if found]:
            raise FrameBridgeError(*(problems[:1] if is_first() else ()))

    def _read(self, index: ClipIndex, settings: ClipSettings, place: int, attempts: int) -> _Clip:
        number = place % self.count
        first, end = (len(index) * n // self.count for n in (number, number + 1))
        for row in range(first, min(end, first + attempts)):
            path, caption = index[row]
            generator = torch.Generator().manual_seed(derive_seed("held-out clip", number))
            try:
                video_FCHW = read_pixels(path, settings, generator)
            except ClipError as error:
                if row + 1 == min(end, first + attempts):
                    raise
                logger.warning("validation.heldout: %s; the next clip takes its place", error)
            else:
                name = path.removeprefix(index.common_folder())
                return _Clip(number, place < self.count, caption, name, video_FCHW)
        raise AssertionError("there is a row for each clip")

    @property
    def captions(self) -> set[str]:
        """The captions of this rank's clips."""
        return {clip.caption for clip in self._clips}

    @torch.no_grad()
    def encode(self, trainer: FrameBridgeTrainer) -> None:
        """Encodes clips and captions; an autoencoder that the run needs, too, is kept for it."""
        args, specification = trainer.args, trainer.model_specification
        vae = (specification.latent_models or {}).get("vae") or specification.adapter.load_vae(specification.vae_dtype)
        vae.to(trainer.state.parallel_backend.device)
        utils._enable_vae_memory_optimizations(vae, args.enable_slicing, args.enable_tiling)
        embedded = trainer.embedded_prompts()
        with Progress(len(self._clips), "Held-out clips", unit="clip", disable=not is_first(), leave=False) as bar:
            for clip in self._clips:
                if signals.pending() is not None:
                    return  # nothing will be measured
                seed = derive_seed("held-out draws", clip.number)
                latents = specification.prepare_latents(vae=vae, video=clip.video_FCHW, sample_seed=seed)
                clip.latents, clip.video_FCHW = {name: value.cpu() for name, value in latents.items()}, None
                if embedded is not None:
                    clip.conditions = embedded[clip.caption]
                else:
                    clip.conditions = specification.adapter.encode_caption({}, clip.caption, dropped=False)
                bar.update()
        if specification.latent_models is None and not args.enable_precomputation:
            specification.latent_models = {"vae": vae}

    def measure(self, trainer: FrameBridgeTrainer) -> dict[str, float] | None:
        """The losses and errors of the network as it is, the same on all ranks; None if they agreed to stop."""
        bands = 1 if trainer.model_specification.adapter.predicts_video else BANDS
        jobs = [(clip, band) for clip in self._clips for band in range(bands)]
        size = trainer.args.batch_size
        jobs += jobs[-1:] * (-len(jobs) % size)  # compiled code is for one size
        found: dict[tuple[int, int], tuple[float, float, float]] = {}
        problem: Exception | None = None
        with Progress(len(jobs), "Held-out loss", unit="time", disable=not is_first(), leave=False) as bar:
            for first in range(0, len(jobs), size):
                if trainer.stopping.agreed():
                    return None
                if problem is not None:
                    continue  # the other ranks are asking too
                some = jobs[first : first + size]
                try:
                    errors = self._errors(trainer, some)
                except Exception as error:
                    problem = error
                    continue
                found |= {(clip.number, band): e for (clip, band), e in zip(some, errors, strict=True) if clip.counts}
                bar.update(size)
        shares = of_all_ranks(found if problem is None else None)
        if problem is not None:
            raise problem
        for share in shares:
            if share is None:
                return None
            found = found | share
        return summary(found, bands)

    def _errors(
        self, trainer: FrameBridgeTrainer, jobs: Sequence[tuple[_Clip, int]]
    ) -> list[tuple[float, float, float]]:
        """Of each clip and band the loss, the error of the predicted video, and that of the image repeated."""
        specification, device = trainer.model_specification, trainer.state.parallel_backend.device
        items = [(clip.conditions, clip.latents) for clip, _ in jobs]
        conditions, latents = collated(specification, items, device, trainer.args.transformer_dtype)
        models = trainer.transformer, trainer.scheduler, conditions, latents
        # On the CPU, so that the draws are those of every device.
        draws = [torch.Generator().manual_seed(derive_seed("held-out", clip.number, band)) for clip, band in jobs]
        count = trainer.scheduler.config.num_train_timesteps
        shares = [
            (band + float(torch.rand((), generator=g))) / BANDS for g, (_, band) in zip(draws, jobs, strict=True)
        ]
        index = torch.tensor([int(count * share) for share in shares], device=device)
        loss = _squares(*specification.loss_terms(*models, index, draws))
        z_0 = latents["latents"].float()
        if specification.adapter.predicts_video:
            errors = loss
        else:
            ratio = torch.tensor([RATIOS[band] for _, band in jobs], dtype=torch.float64)
            errors = _squares(specification.predicted_video(*models, ratio, draws), z_0)
        still = _squares(latents["image_latents"].float().expand_as(z_0), z_0)
        return list(zip(loss, errors, still, strict=True))

    def describe(self, weights: str) -> str:
        """What the numbers are of; every rank has to call it."""
        shares = of_all_ranks([(clip.number, clip.name, clip.caption) for clip in self._clips])
        clips = sorted({clip for share in shares for clip in share})
        return f"{self.count} clips of digest {short_digest([clips, self._cut])}, weights: {weights}"


def summary(found: Mapping[tuple[int, int], Sequence[float]], bands: int) -> dict[str, float]:
    """The means of losses and errors by (clip, band) over all and over each band; the order of sums does not count."""
    losses, errors, stills = ([values[kind] for values in found.values()] for kind in range(3))
    numbers = {
        "heldout/loss": math.fsum(losses) / len(found),
        "heldout/x0_error": math.fsum(errors) / len(found),
        "heldout/x0_error_relative": math.fsum(errors) / math.fsum(stills),
    }
    if bands == 1:
        return numbers
    for kind, name in enumerate(("loss", "x0_error")):
        for band in range(bands):
            values = [of_clip[kind] for (_, other), of_clip in found.items() if other == band]
            numbers[f"heldout/{name}_band_{band}"] = math.fsum(values) / len(values)
    return numbers


def _squares(prediction: torch.Tensor, target: torch.Tensor) -> list[float]:
    """The mean squared difference of each sample."""
    return (prediction - target).square().flatten(1).mean(1).tolist()
