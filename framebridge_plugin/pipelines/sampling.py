"""`finetrainers sample`: opens what a run, a base model or the authors' release left on the disk, and samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.folder_checks import LORA_INFO_FILE, find_saved_model
from framebridge_plugin.media import contact_sheet, read_image, write_video
from framebridge_plugin.pipelines.cogvideox import FrameBridgeCogVideoXPipeline
from framebridge_plugin.pipelines.saving import load_lora_base, local_folder
from framebridge_plugin.sample_request import SampleRequest
from framebridge_plugin.schedulers import FrameBridgeScheduler

_OURS = FrameBridgeCogVideoXPipeline.__name__
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sample(request: SampleRequest) -> list[Path]:
    """Samples videos and writes them, with a contact sheet of all.

    Args:
        request: What to sample, checked.

    Returns:
        The videos' files.

    Raises:
        FrameBridgeError: If the model cannot be opened, or a size does not fit it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_dtype = "bf16" if device.type == "cuda" else "fp32"
    pipeline = open_pipeline(
        request.model, transformer=request.transformer, torch_dtype=_DTYPES[request.dtype or default_dtype]
    )
    if isinstance(pipeline.scheduler, FrameBridgeScheduler):
        pipeline.scheduler = FrameBridgeScheduler.from_config(
            pipeline.scheduler.config,
            sampler=request.sampler,
            order=request.order,
            eta=request.eta,
            grid=request.grid,
            start=request.start,
        )
    else:
        _say(f"a diffusion model: sampled with its {type(pipeline.scheduler).__name__}, not with --sampler")
    pipeline.to(device)

    paths, videos, labels = request.video_paths(), [], []
    for number, path in enumerate(paths):
        image = number // request.num_videos
        seed = request.seed + number
        pipeline.set_progress_bar_config(desc=f"Video {number + 1} of {len(paths)}")
        video = pipeline(
            image=read_image(request.images[image]),
            prompt=request.prompt_of(image),
            num_frames=request.num_frames,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).frames[0]
        write_video(video, path)
        videos.append(video)
        labels.append(f"{path.name}: seed {seed}, {request.prompt_of(image)}")
        _say(f"video: {path}")
    contact_sheet(videos, request.contact_sheet_path(), labels=labels)
    _say(f"contact sheet: {request.contact_sheet_path()}")
    return paths


def open_pipeline(
    model: str, *, transformer: str | None = None, torch_dtype: torch.dtype | None = None
) -> FrameBridgeCogVideoXPipeline:
    """Opens a model, wherever a run or a release left it.

    Args:
        model: A run's folder, one of its checkpoints, a model folder, a LoRA folder, or a hub id.
        transformer: A fine-tuned `transformer/` folder or id to put into `model`, with the bridge settings beside it
            if there are any, and those of the reference if not.
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
            f"cannot open model {str(source)!r}: {line}; give a run's folder, or a complete CogVideoX model in "
            "diffusers format"
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


def _open_lora(folder: Path, torch_dtype: torch.dtype | None) -> FrameBridgeCogVideoXPipeline:
    info = json.loads((folder / LORA_INFO_FILE).read_text())
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


def _open_model(
    folder: Path, transformer: str | None, torch_dtype: torch.dtype | None
) -> FrameBridgeCogVideoXPipeline:
    class_name = _class_name(folder / "model_index.json")
    replaced: dict[str, Any] = {}
    if transformer is not None:
        replaced["transformer"] = CogVideoXTransformer3DModel.from_pretrained(transformer, dtype=torch_dtype)
    if transformer is not None and _class_name(Path(transformer).parent / "model_index.json") == _OURS:
        replaced["scheduler"] = _load_scheduler(Path(transformer).parent / "scheduler")
    elif class_name == "CogVideoXPipeline":
        backbone = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        replaced["scheduler"] = FrameBridgeScheduler.from_backbone(backbone, target="v", alignment_edge="reference")
        _say("the model has no bridge settings: the reference's are used (target v, SNR-aligned, beta .01 to 50)")
    elif class_name != _OURS:
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
