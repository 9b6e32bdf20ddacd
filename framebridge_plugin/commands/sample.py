"""`finetrainers sample`: opens what a run, a base model or the authors' release left on the disk, and samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.files import read_if_whole
from framebridge_plugin.backbones.folders import find_part, pipeline_class
from framebridge_plugin.backbones.hub import local_folder
from framebridge_plugin.backbones.loading import A_MODEL, ModelSource, load_weights, loading
from framebridge_plugin.backbones.opening import (
    find_folder,
    find_model,
    load_scheduler,
)
from framebridge_plugin.backbones.placing import check_compiler, compile_blocks, find_device, place
from framebridge_plugin.backbones.sampling_loop import call_defaults
from framebridge_plugin.commands.sample_memory import inputs_that_fit
from framebridge_plugin.errors import FrameBridgeError, UsageError, say
from framebridge_plugin.media import contact_sheet, to_uint8, write_video
from framebridge_plugin.schedulers import FrameBridgeScheduler

if TYPE_CHECKING:
    from framebridge_plugin.commands.model_request import ModelRequest
    from framebridge_plugin.commands.sample_inputs import SampleInput
    from framebridge_plugin.commands.sample_request import SampleRequest

_CALL_SETTINGS = ("num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale")
_CALL_OPTIONS = ("guidance_scale", "use_dynamic_cfg", "num_frames", "height", "width")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Opened(NamedTuple):
    """A model that is ready to make videos as a request says.

    Attributes:
        pipeline: Its pipeline, on the device.
        saved: What it was found to be.
        call: Arguments of each call.
        rows: Inputs of the network for one video: two with guidance.
        most_inputs: The most inputs that fit into memory at once; None where that is not to be seen beforehand.
        tiling: Whether frames are decoded by tiles.
    """

    pipeline: Any
    saved: SavedModel
    call: dict[str, Any]
    rows: int
    most_inputs: int | None
    tiling: str

    def make(
        self, images: Sequence[Any], conditions: Sequence[Any], seeds: Sequence[int], batch_size: int
    ) -> Iterator[np.ndarray]:
        """Makes a video of each image, with a seed of its own, in calls of the network of `batch_size` inputs; yields
        them decoded one by one, uint8 [F, H, W, 3].
        """
        pipeline = self.pipeline
        found = pipeline(
            [*images],
            [*conditions],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            batch_size=batch_size,
            output_type="latent",
            **self.call,
        ).frames
        for latents in found.split(1):
            pixels = pipeline.decode_latents(latents, self.tiling)
            yield to_uint8(pipeline.video_processor.postprocess_video(pixels, output_type="pt")[0])
        pipeline.maybe_free_model_hooks()


def sample(request: SampleRequest, inputs: Sequence[SampleInput]) -> list[Path]:
    """Samples videos and writes them, with a contact sheet of all; returns the videos' files."""
    opened = open_for(request)
    pipeline, rows, most = opened.pipeline, opened.rows, opened.most_inputs
    paths, videos, labels = request.video_paths(), list[np.ndarray](), []
    images = [inputs[number // request.num_videos].image for number in range(len(paths))]
    batch_size = request.batch_size or (rows if most is None else max(1, min(most // rows, len(paths)) * rows))
    if request.batch_size is None and batch_size > rows:
        say(f"{batch_size // rows} videos at once, as fit into memory; the same bits again: --batch-size {batch_size}")
    while len(videos) < len(paths):
        first, end = len(videos), min(len(videos) + max(1, batch_size // rows), len(paths))
        conditions = [inputs[number // request.num_videos].condition for number in range(first, end)]
        these = f"Video {end}" if end == first + 1 else f"Videos {first + 1} to {end}"
        pipeline.set_progress_bar_config(desc=f"{these} of {len(paths)}")
        seeds = [request.seed + number for number in range(first, end)]
        made = opened.make(images[first:end], conditions, seeds, batch_size)
        for number, condition, video in zip(range(first, end), conditions, made, strict=True):
            videos.append(video)
            write_video(video, paths[number], fps=request.fps or pipeline.config.fps)
            labels.append(f"{paths[number].name}: seed {request.seed + number}, {condition}")
            say(f"video: {paths[number]}")
        if pipeline.last_batch_size < min(batch_size, rows * len(conditions)):  # where memory ended
            batch_size = pipeline.last_batch_size
    contact_sheet(videos, request.contact_sheet_path(), labels=labels, images=images)
    say(f"contact sheet: {request.contact_sheet_path()}")
    return paths


def open_for(request: ModelRequest, own_device: torch.device | None = None) -> Opened:
    """Opens the model of a request, which says how, and puts it on its device; `own_device` if it names none."""
    device = own_device if own_device is not None and request.device is None else find_device(request.device)
    if request.offload != "none" and device.type == "cpu":
        raise UsageError(f"--offload {request.offload}: is for a GPU, on a CPU all is in main memory; leave it out")
    if request.compile:
        check_compiler("--compile")
    folder = find_folder(request.model)
    saved = request.saved or request.check_download(folder)
    dtype = _DTYPES[request.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    most = inputs_that_fit(saved, request, device, dtype)
    pipeline = open_pipeline(
        saved if saved.lora is None else folder,  # what a LoRA was trained on may have to be fetched from the hub
        transformer=request.transformer,
        torch_dtype=dtype,
        base_model=request.base,
        allow_other_base=request.allow_other_base,
    )
    call = _prepare_call(pipeline, saved, request)
    if request.compile:
        compile_blocks(getattr(pipeline, saved.facts.network))
    place(pipeline, device, request.offload)
    has_steps = "scheduler" in saved.facts.parts
    guided = has_steps and call_defaults(pipeline, request.steps, None, request.guidance_scale)[1] > 1.0
    return Opened(pipeline, saved, call, 2 if guided else 1, most, request.tiling)


def _prepare_call(pipeline: Any, saved: SavedModel, request: ModelRequest) -> dict[str, Any]:
    """Sets the scheduler as the request says; returns the arguments of a call."""
    facts = saved.facts
    if "scheduler" not in facts.parts:
        say("a neural prior: one call of the network per video")
        return {}
    if isinstance(pipeline.scheduler, FrameBridgeScheduler):
        settings = request.sampler_settings(facts)
        pipeline.scheduler = FrameBridgeScheduler.from_config(pipeline.scheduler.config, **settings)
    else:
        say(f"a diffusion model: sampled with its {type(pipeline.scheduler).__name__}, not with --sampler")
    # What its call does not take was refused, or is as the model says.
    taken = inspect.signature(type(pipeline).__call__).parameters
    given = {name: getattr(request, name) for name in _CALL_OPTIONS if name in taken}
    return {"num_inference_steps": request.steps, **given}


def open_pipeline(
    model: str | Path | SavedModel,
    *,
    transformer: str | None = None,
    torch_dtype: torch.dtype | None = None,
    base_model: str | None = None,
    allow_other_base: bool = False,
) -> Any:
    """Opens a model of any kind, wherever a run or a release left it, by its pipeline's `from_pretrained`.

    `transformer` is a fine-tuned network to put into a model of text: its folder or id, or that of a model or a run
    that holds one, with the bridge settings beside it if there are any, and those of the reference if not.
    """
    replaced: dict[str, Any] = {} if transformer is None else {"transformer": None}
    saved = find_model(model, None, replaced, base_model=base_model, allow_other_base=allow_other_base)
    if transformer is not None:
        if saved.facts.input_projection is None:
            raise FrameBridgeError(f"--transformer is for models of text, which {saved.base} is not: leave it out")
        if saved.lora is not None:
            raise FrameBridgeError(
                f"{saved.lora} is a LoRA, which goes with the transformer it was trained on; leave --transformer out"
            )
        with loading("model", transformer, A_MODEL):
            replaced = _load_fine_tuned(transformer, saved.facts, torch_dtype)
    return saved.facts.load_pipeline().from_pretrained(saved, dtype=torch_dtype, **replaced)


def _load_fine_tuned(source: str, facts: BackboneFacts, torch_dtype: torch.dtype | None) -> dict[str, Any]:
    """A fine-tuned network, and what the model around it says of its bridge and its clips, if there is one."""
    # Of a whole model on the hub these parts alone.
    patterns = ["config.json", "model_index.json", "diffusion_pytorch_model*", f"{facts.network}/*", "scheduler/*"]
    folder = find_part(local_folder(source, patterns=patterns), facts.network)
    adapter, expected = facts.load_adapter(), f"a fine-tuned {facts.network}, or a run's or a model's folder"
    place = (str(folder), "")
    network = load_weights(
        adapter.network_class, facts.network, ModelSource(place[0]), place, expected, dtype=torch_dtype
    )
    found: dict[str, Any] = {facts.network: network}
    index = read_if_whole(folder.parent / "model_index.json")
    if pipeline_class(index) == facts.load_pipeline().__name__:
        found |= {name: index[name] for name in _CALL_SETTINGS if index.get(name) is not None}
        found["scheduler"] = load_scheduler(folder.parent / "scheduler")
    return found
