"""Validation: videos sampled from the model as it is being trained."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import wandb
from diffusers import DiffusionPipeline
from PIL import Image

from framebridge_plugin import signals
from framebridge_plugin.data import ClipIndex, ClipSettings
from framebridge_plugin.data.decoding.exact import read_first_picture
from framebridge_plugin.data.folders import index_heldout
from framebridge_plugin.data.validation_rows import read_validation_rows
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import local_copy
from framebridge_plugin.media import DEFAULT_FPS, contact_sheet, read_image, write_video
from framebridge_plugin.processes import of_all_ranks
from framebridge_plugin.randomness import derive_seed

if TYPE_CHECKING:
    from framebridge_plugin.training.metrics import MetricsLogger
    from framebridge_plugin.training.trainer import FrameBridgeTrainer


class ValidationVideo(NamedTuple):
    """A sample of the validation set."""

    number: int
    """Its row in the validation file, from 0."""
    caption: str
    video: Path
    sheet: Path
    """The contact sheet, a PNG that begins with the input image."""


def validate(
    trainer: FrameBridgeTrainer, samples: list[dict[str, Any]], step: int, metrics: MetricsLogger, *, final: bool
) -> bool:
    """Measures the held-out loss and samples the validation set, with the weights in training, or their average.

    Every rank takes part.

    An error is no end of the run: it is logged with its traceback, and noted in the metrics. Returned is whether there
    was none, the same on every rank.
    """
    from finetrainers.logging import get_logger

    average, transformer = trainer.average, trainer.transformer
    transformer.eval()
    weights = average.in_place_of_weights() if average is not None else contextlib.nullcontext()
    written: list[ValidationVideo] = []
    problem, numbers = None, None
    with weights, torch.no_grad(), trainer.attention_provider_ctx(training=False):
        try:  # within: finetrainers does not undo the context after an exception
            if trainer.heldout is not None:
                numbers = trainer.heldout.measure(trainer)
            if samples:
                written = _sample(trainer, samples, "final" if final else f"step{step:06d}")
        except Exception:
            problem = traceback.format_exc()
    if trainer.args.enable_model_cpu_offload:
        trainer._move_components_to_device()
    transformer.train()

    if numbers is not None:
        metrics.log(step, numbers)
        trainer.state.parallel_backend.log(numbers, step=step)
    shares = of_all_ranks((written, problem))
    problems = [problem for _, problem in shares if problem is not None]
    if trainer.state.parallel_backend.is_main_process and not problems:
        try:
            _record(trainer, [item for written, _ in shares for item in written], step, metrics, final)
        except Exception:
            problem = traceback.format_exc()
    problems += filter(None, of_all_ranks(problem))
    if problems:
        get_logger().error(f"the validation at update {step} failed; the run goes on\n{problems[0]}")
        metrics.log_text(step, "validation_error", problems[0].strip().splitlines()[-1])
    return not problems


def _sample(trainer: FrameBridgeTrainer, samples: list[dict[str, Any]], label: str) -> list[ValidationVideo]:
    args, specification = trainer.args, trainer.model_specification
    embedded = trainer.embedded_prompts()
    if args.enable_model_cpu_offload:
        trainer._move_components_to_device([trainer.text_encoder], "cpu")
    pipeline = specification.load_pipeline(
        transformer=trainer.transformer,
        scheduler=type(trainer.scheduler).from_config(trainer.scheduler.config),
        enable_slicing=args.enable_slicing,
        enable_tiling=args.enable_tiling,
        enable_model_cpu_offload=args.enable_model_cpu_offload,
        vae=trainer.vae,
        embedded=embedded is not None,
    )
    if not args.enable_model_cpu_offload:
        trainer._move_components_to_device(
            [part for part in pipeline.components.values() if part is not trainer.transformer]
        )
    is_main_process = trainer.state.parallel_backend.is_main_process
    pipeline.set_progress_bar_config(desc="Validation", leave=False, disable=not is_main_process)
    try:
        return sample_validation_videos(
            samples,
            pipeline,
            functools.partial(specification.validation, embedded=embedded),
            Path(args.output_dir) / "validation",
            fps=specification.clip_rate or DEFAULT_FPS,
            label=label,
            seed=args.seed,
            rank=trainer.data_rank,
            world_size=trainer.data_world_size,
            # The ranks of a sharded network go through it together, the others each for itself.
            stop=trainer.stopping.agreed if args.dp_shards > 1 else _is_told_to_stop,
            interruptible=trainer.transformer if args.dp_shards == 1 else None,
        )
    finally:
        pipeline.remove_all_hooks()


def _record(
    trainer: FrameBridgeTrainer, written: list[ValidationVideo], step: int, metrics: MetricsLogger, final: bool
) -> None:
    metrics.log_validation(step, written)
    if trainer.args.report_to == "wandb" and written:
        videos = [wandb.Video(str(item.video), caption=item.caption) for item in written]
        trainer.state.parallel_backend.log({"final" if final else "validation": videos}, step=step)


def sample_validation_videos(
    samples: list[dict[str, Any]],
    pipeline: DiffusionPipeline,
    validate: Callable[..., list[Any]],
    output_dir: Path,
    *,
    fps: float,
    label: str,
    seed: int,
    rank: int,
    world_size: int,
    stop: Callable[[], bool] = lambda: False,
    interruptible: torch.nn.Module | None = None,
) -> list[ValidationVideo]:
    """Samples the validation set, a share on every rank; writes and returns this rank's videos and contact sheets.

    All ranks make the same number of calls, repeating samples where the number does not divide: a sharded network
    computes only when all of its ranks do. Every sample has a generator of its own, so that validation draws nothing
    from training and gives the same noise at every step. A row's `export_fps` takes the place of `fps`.

    The rest is left out once `stop` says so; the video that is being sampled too, at the next call of the network
    `interruptible`.
    """
    written = []
    output_dir.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(samples), world_size):
        if stop():
            break
        number = first + rank
        sample = dict(samples[number % len(samples)])
        generator = torch.Generator().manual_seed(derive_seed("validation", seed, number % len(samples)))
        row_fps = float(sample.pop("export_fps", None) or fps)
        with _ended_by_signals(interruptible) as is_whole:
            artifacts = validate(pipeline=pipeline, generator=generator, **sample)
        if number >= len(samples) or not is_whole():
            continue
        stem = output_dir / f"{label}-{number:02d}"
        videos = [artifact.value for artifact in artifacts]
        write_video(videos[0], stem.with_suffix(".mp4"), fps=row_fps)
        image = validation_image(sample["prompt"], sample.get("image"), sample.get("video"))
        item = ValidationVideo(number, str(sample["prompt"]), stem.with_suffix(".mp4"), stem.with_suffix(".png"))
        contact_sheet(videos, item.sheet, labels=[item.caption] * len(videos), images=[image] * len(videos))
        written.append(item)
    return written


def _is_told_to_stop() -> bool:
    return signals.pending() is not None


class _AbandonedError(Exception):
    """The video is not needed any more."""


@contextlib.contextmanager
def _ended_by_signals(network: torch.nn.Module | None) -> Iterator[Callable[[], bool]]:
    """Ends the block at a call of the network once this process is told to stop; yields whether it was whole."""
    is_whole = True

    def look(*_: Any) -> None:
        if _is_told_to_stop():
            raise _AbandonedError

    hook = contextlib.nullcontext() if network is None else network.register_forward_pre_hook(look)
    with hook:
        try:
            yield lambda: is_whole
        except _AbandonedError:
            is_whole = False


def validation_image(prompt: str, image: Image.Image | None, video: list[Image.Image] | None) -> Image.Image:
    """The image that a validation row starts from: its own, or the first frame of its video."""
    if image is not None:
        return image
    if not video:
        raise FrameBridgeError(
            f"validation sample {prompt!r} has no image; add an image_path (or video_path) to the validation file"
        )
    return video[0]


def read_validation_file(file: str | Path) -> list[dict[str, Any]]:
    """The rows of finetrainers' validation file, with the caption as `prompt` too, and with `image`.

    That is the picture at `image_path`, or without it the first frame of the video at `video_path`, as clips have it.
    """
    samples = []
    for row in read_validation_rows(Path(file)):
        sample = row | {"prompt": row.get("caption", "")}
        if "image_path" in row:
            with local_copy(row["image_path"]) as path:
                sample["image"] = read_image(path)
        elif "video_path" in row:
            with local_copy(row["video_path"]) as path:
                sample["image"] = Image.fromarray(read_first_picture(str(path)))
        samples.append(sample)
    return samples


def check_samples(args: Any, specification: Any, datasets: Any) -> list[dict[str, Any]]:
    """Refuses clips and validation samples that the model is not for; returns the validation samples."""
    specification.check_datasets(datasets)
    samples = [] if args.validation_dataset_file is None else read_validation_file(args.validation_dataset_file)
    for sample in samples:
        if sample.get("image") is None:
            raise UsageError(
                f"{args.validation_dataset_file}: sample {sample['prompt']!r} has no image that can be read; give an "
                "image_path (or video_path) in every row"
            )
    specification.check_validation_samples(samples)
    return samples


def check_heldout(content: Any, specification: Any, datasets: Any) -> tuple[ClipIndex, ClipSettings, int] | None:
    """`index_heldout`, which refuses classes that the model does not know as well."""
    found = index_heldout(content, datasets)
    if found is not None:
        specification.adapter.check_captions(found[0].distinct_captions(), "validation.heldout")
    return found
