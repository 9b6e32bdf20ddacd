"""`finetrainers sample`: opens what a run, a base model or the authors' release left on the disk, and samples."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from framebridge_plugin.errors import FrameBridgeError, say
from framebridge_plugin.media import contact_sheet, write_video
from framebridge_plugin.schedulers import FrameBridgeScheduler

if TYPE_CHECKING:
    from framebridge_plugin.commands.sample_inputs import SampleInput
    from framebridge_plugin.commands.sample_request import SampleRequest

_CALL_SETTINGS = ("num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale")
_CALL_OPTIONS = ("guidance_scale", "use_dynamic_cfg", "num_frames", "height", "width")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sample(request: SampleRequest, inputs: Sequence[SampleInput]) -> list[Path]:
    """Samples videos and writes them, with a contact sheet of all; returns the videos' files."""
    folder = find_folder(request.model)
    saved = request.saved or request.check_download(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_dtype = "bf16" if device.type == "cuda" else "fp32"
    dtype = _DTYPES[request.dtype or default_dtype]
    pipeline = open_pipeline(
        saved if saved.lora is None else folder,  # what a LoRA was trained on may have to be fetched from the hub
        transformer=request.transformer,
        torch_dtype=dtype,
        base_model=request.base,
        allow_other_base=request.allow_other_base,
    )
    call = _prepare_call(pipeline, saved, request)
    pipeline.to(device)

    paths, videos, labels = request.video_paths(), [], []
    for number, path in enumerate(paths):
        image, condition = inputs[number // request.num_videos]
        seed = request.seed + number
        pipeline.set_progress_bar_config(desc=f"Video {number + 1} of {len(paths)}")
        video = pipeline(
            image, condition, generator=torch.Generator().manual_seed(seed), output_type="pt", **call
        ).frames[0]
        write_video(video, path, fps=request.fps or pipeline.config.fps)
        videos.append(video)
        labels.append(f"{path.name}: seed {seed}, {condition}")
        say(f"video: {path}")
    images = [inputs[number // request.num_videos].image for number in range(len(paths))]
    contact_sheet(videos, request.contact_sheet_path(), labels=labels, images=images)
    say(f"contact sheet: {request.contact_sheet_path()}")
    return paths


def _prepare_call(pipeline: Any, saved: SavedModel, request: SampleRequest) -> dict[str, Any]:
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
