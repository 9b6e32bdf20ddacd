"""`finetrainers sample`: opens what a run, a base model or the authors' release left on the disk, and samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.media import contact_sheet, write_video
from framebridge_plugin.model_folders.checks import (
    COGVIDEOX,
    LATTE_BRIDGE,
    LATTE_NEURAL_PRIOR,
    LORA_INFO_FILE,
    ModelKind,
    find_saved_model,
)
from framebridge_plugin.pipelines.cogvideox import FrameBridgeCogVideoXPipeline
from framebridge_plugin.pipelines.latte import FrameBridgeLattePipeline
from framebridge_plugin.pipelines.saving import load_latte_lora_base, load_lora_base, local_folder
from framebridge_plugin.schedulers import FrameBridgeScheduler

if TYPE_CHECKING:
    from framebridge_plugin.sample_request import SampleRequest
    from framebridge_plugin.sample_request.inputs import SampleInput

Pipeline = FrameBridgeCogVideoXPipeline | FrameBridgeLattePipeline

_COGVIDEOX_PIPELINE, _LATTE_PIPELINE = FrameBridgeCogVideoXPipeline.__name__, FrameBridgeLattePipeline.__name__
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sample(request: SampleRequest, inputs: Sequence[SampleInput]) -> list[Path]:
    """Samples videos and writes them, with a contact sheet of all.

    Args:
        request: What to sample, checked.
        inputs: Its first frames with their conditions.

    Returns:
        The videos' files.

    Raises:
        UsageError: If the model came from the hub, and the options are not for it.
        FrameBridgeError: If the model cannot be opened, or a size does not fit it.
    """
    request.check_download(local_folder(request.model))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_dtype = "bf16" if device.type == "cuda" else "fp32"
    pipeline = open_pipeline(
        request.model, transformer=request.transformer, torch_dtype=_DTYPES[request.dtype or default_dtype]
    )
    call = _prepare_call(pipeline, request)
    pipeline.to(device)

    paths, videos, labels = request.video_paths(), [], []
    for number, path in enumerate(paths):
        image, condition = inputs[number // request.num_videos]
        seed = request.seed + number
        pipeline.set_progress_bar_config(desc=f"Video {number + 1} of {len(paths)}")
        video = pipeline(
            image, condition, generator=torch.Generator().manual_seed(seed), output_type="pt", **call
        ).frames[0]
        write_video(video, path)
        videos.append(video)
        labels.append(f"{path.name}: seed {seed}, {condition}")
        _say(f"video: {path}")
    contact_sheet(videos, request.contact_sheet_path(), labels=labels)
    _say(f"contact sheet: {request.contact_sheet_path()}")
    return paths


def _kind_of(pipeline: Pipeline) -> ModelKind:
    if isinstance(pipeline, FrameBridgeCogVideoXPipeline):
        return COGVIDEOX
    return LATTE_NEURAL_PRIOR if pipeline.transformer is None else LATTE_BRIDGE


def _prepare_call(pipeline: Pipeline, request: SampleRequest) -> dict[str, Any]:
    """Sets the scheduler as the request says; returns the arguments of a call."""
    kind = _kind_of(pipeline)
    if kind is LATTE_NEURAL_PRIOR:
        _say("a neural prior: one call of the network per video")
        return {}
    settings = request.sampler_settings(kind)
    if isinstance(pipeline.scheduler, FrameBridgeScheduler):
        pipeline.scheduler = FrameBridgeScheduler.from_config(
            pipeline.scheduler.config,
            sampler=settings.sampler,
            order=settings.order,
            eta=settings.eta,
            grid=settings.grid,
            start=settings.start,
        )
    else:
        _say(f"a diffusion model: sampled with its {type(pipeline.scheduler).__name__}, not with --sampler")
    call: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    if kind is COGVIDEOX:
        call |= {"num_frames": request.num_frames, "height": request.height, "width": request.width}
    return call


def open_pipeline(model: str, *, transformer: str | None = None, torch_dtype: torch.dtype | None = None) -> Pipeline:
    """Opens a model, wherever a run or a release left it.

    Args:
        model: A run's folder, one of its checkpoints, a model folder, a LoRA folder, or a hub id.
        transformer: A fine-tuned CogVideoX `transformer/` folder or id to put into `model`, with the bridge settings
            beside it if there are any, and those of the reference if not.
        torch_dtype: Precision of the weights; float32 by default.

    Returns:
        The pipeline, on the CPU.

    Raises:
        FrameBridgeError: If something is missing, damaged or of another kind.
    """
    source = _find_model(local_folder(model))
    try:
        if (source / LORA_INFO_FILE).is_file():
            if transformer is not None:
                raise FrameBridgeError(
                    f"{source} is a LoRA, which goes with the transformer it was trained on; leave --transformer out"
                )
            return _open_lora(source, torch_dtype)
        return _open_model(source, transformer, torch_dtype)
    except FrameBridgeError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FrameBridgeError(
            f"cannot open model {str(source)!r}: {line}; give a run's folder, or a complete model in diffusers format"
        ) from error


def _find_model(folder: Path) -> Path:
    """The model or LoRA folder inside a run's folder."""
    found = find_saved_model(folder)
    if found is None:
        raise FrameBridgeError(
            f"{folder} is no model: it has no model_index.json, and no model/, lora/ or checkpoints/ of a run; give a "
            "run's folder or a model in diffusers format"
        )
    if found.parent.parent.name == "checkpoints":
        _say(f"the run has not ended: its newest checkpoint {found.parent} is used")
    return found


def _open_lora(folder: Path, torch_dtype: torch.dtype | None) -> Pipeline:
    info = json.loads((folder / LORA_INFO_FILE).read_text())
    pipeline: Pipeline
    if info.get("pipeline_class") == _LATTE_PIPELINE:
        components = load_latte_lora_base(info, torch_dtype)
        if info["network_name"] == "transformer":
            components["scheduler"] = _load_scheduler(folder / "scheduler")
        pipeline = FrameBridgeLattePipeline.from_pretrained(info["base_model"], dtype=torch_dtype, **components)
    else:
        pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(
            info["base_model"],
            scheduler=_load_scheduler(folder / "scheduler"),
            dtype=torch_dtype,
            num_frames=info["num_frames"],
            height=info["height"],
            width=info["width"],
            **load_lora_base(info, torch_dtype),
        )
    pipeline.load_lora_weights(folder)
    return pipeline


def _open_model(folder: Path, transformer: str | None, torch_dtype: torch.dtype | None) -> Pipeline:
    class_name = _class_name(folder / "model_index.json")
    if class_name == _LATTE_PIPELINE:
        if transformer is not None:
            raise FrameBridgeError(f"--transformer is for CogVideoX; {folder} is a whole Latte model: leave it out")
        return FrameBridgeLattePipeline.from_pretrained(folder, dtype=torch_dtype)
    replaced: dict[str, Any] = {}
    if transformer is not None:
        replaced["transformer"] = CogVideoXTransformer3DModel.from_pretrained(transformer, dtype=torch_dtype)
    if transformer is not None and _class_name(Path(transformer).parent / "model_index.json") == _COGVIDEOX_PIPELINE:
        replaced["scheduler"] = _load_scheduler(Path(transformer).parent / "scheduler")
    elif class_name == "CogVideoXPipeline":
        backbone = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        replaced["scheduler"] = FrameBridgeScheduler.from_backbone(backbone, target="v", alignment_edge="reference")
        _say("the model has no bridge settings: the reference's are used (target v, SNR-aligned, beta .01 to 50)")
    elif class_name != _COGVIDEOX_PIPELINE:
        raise FrameBridgeError(
            f"{folder} is a {class_name}, which is no FrameBridge model; fine-tune a CogVideoX text-to-video model "
            "with `finetrainers train`"
        )
    return FrameBridgeCogVideoXPipeline.from_pretrained(folder, dtype=torch_dtype, **replaced)


def _class_name(config: Path) -> str | None:
    """The class that a diffusers JSON file names; None without the file."""
    return json.loads(config.read_text())["_class_name"] if config.is_file() else None


def _load_scheduler(folder: Path) -> Any:
    name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    scheduler_class = FrameBridgeScheduler if name == FrameBridgeScheduler.__name__ else getattr(diffusers, name)
    return scheduler_class.from_pretrained(folder)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
