"""What can be told about a model's folder without loading it: is it there, is it whole, which clips fit it.

Needs the standard library alone, so that a wrong path costs a second and not a minute. How the parts of a Latte model
fit each other is in `latte_checks`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LORA_INFO_FILE = "framebridge.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
EXTRA_WEIGHTS_FILE = "extra_weights.safetensors"
"""Beside the LoRA file of an earlier version: the trained input projection."""
TWO_FILE_LORA = "two-file-lora"
"""What `finetrainers convert --from` calls the LoRA folders of that version."""
_CHECKPOINTS = (".pt", ".pth", ".ckpt")
_WEIGHTS = ("*.safetensors", "*.bin")
_DIFFUSION_SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class ModelKind:
    """What makes up a model's folder in diffusers' format.

    Attributes:
        name: What the class of its pipeline has in its name.
        parts: Its components, each with the class that its config.json must name, or None for any.
        predictions: What its network may predict as a diffusion model, as diffusers' schedulers say it.
    """

    name: str
    parts: Mapping[str, str | None]
    predictions: tuple[str, ...] = ("epsilon", "v_prediction")


COGVIDEOX = ModelKind(
    "CogVideoX",
    {
        "transformer": "CogVideoXTransformer3DModel",
        "vae": "AutoencoderKLCogVideoX",
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": None,
    },
    predictions=("v_prediction",),
)
LATTE_BRIDGE = ModelKind(
    "FrameBridgeLatte", {"transformer": "LatteTransformer", "vae": "AutoencoderKL", "scheduler": None}
)
LATTE_NEURAL_PRIOR = ModelKind("FrameBridgeLatte", {"neural_prior": "LatteTransformer", "vae": "AutoencoderKL"})


@dataclass(frozen=True)
class ClipShapeRule:
    """Which clips a model can take and return.

    Attributes:
        frames_step: `num_frames` must be 1 or a multiple of this, plus 1. It is twice the VAE's temporal compression:
            AutoencoderKLCogVideoX decodes an even number of latent frames to the wrong number of frames.
        size_step: Height and width must be multiples of this many pixels: the VAE's spatial compression times the
            transformer's patch size.
    """

    frames_step: int = 8
    size_step: int = 16

    def problems(self, num_frames: int | None, height: int | None, width: int | None) -> Iterator[tuple[str, str]]:
        """Yields the names of the arguments that do not fit, with what is wrong; None is not checked."""
        if num_frames is not None and (num_frames - 1) % self.frames_step:
            nearest = _nearest(num_frames - 1, self.frames_step, least=0) + 1
            rule = f"{self.frames_step} k + 1 frames"
            yield "num_frames", f"the VAE returns only {rule}, not {num_frames}; the nearest is {nearest}"
        for name, size in (("height", height), ("width", width)):
            if size is not None and size % self.size_step:
                nearest = _nearest(size, self.size_step, least=self.size_step)
                yield name, f"should be a multiple of {self.size_step} for this model, not {size}; try {nearest}"


def _nearest(value: int, step: int, least: int) -> int:
    return max(least, (value + step // 2) // step * step)


def local_path(name: str) -> Path | None:
    """The path that a name stands for, existing or not; None for a hub id (`owner/name`, and no folder `owner`)."""
    path = Path(name)
    looks_like_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return None if looks_like_id and not path.exists() and not path.parent.is_dir() else path


def model_kind(folder: Path) -> ModelKind | None:
    """The kind of a model's or a LoRA's folder; None if the folder says nothing, or names something else."""
    try:
        if (folder / LORA_INFO_FILE).is_file():
            info = read_json(folder / LORA_INFO_FILE)
            # LoRA folders of version 0.1.0 do not say it: there was only one kind.
            class_name = info.get("pipeline_class", "FrameBridgeCogVideoXPipeline")
            is_bridge = info.get("network_name") != "neural_prior"
        else:
            index = read_json(folder / "model_index.json")
            class_name, is_bridge = _class_name(index), _is_present("transformer", index)
    except ValueError:
        return None
    if class_name == "FrameBridgeLattePipeline":
        return LATTE_BRIDGE if is_bridge else LATTE_NEURAL_PRIOR
    return COGVIDEOX if COGVIDEOX.name in str(class_name) else None


def folder_problem(path: Path, kind: ModelKind = COGVIDEOX) -> str | None:
    """What is wrong with a model's whole folder in diffusers' format."""
    if (problem := _place_problem(path)) is not None:
        return problem
    try:
        class_name = _class_name(read_json(path / "model_index.json"))
    except ValueError as error:
        return f"{error}; give the folder of a whole {kind.name} model in diffusers' format"
    if kind.name not in str(class_name):
        return f"{path} holds a {class_name}, not a {kind.name} pipeline"
    problems = (part_problem(path / part, part, kind) for part in kind.parts)
    return next((problem for problem in problems if problem is not None), None)


def part_problem(path: Path, part: str, kind: ModelKind = COGVIDEOX) -> str | None:
    """What is wrong with the folder of one component of a kind of model."""
    if (problem := _place_problem(path)) is not None:
        return problem
    if part == "tokenizer" and not any((path / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        # transformers would make up a vocabulary without a word.
        return f"{path} has no vocabulary (spiece.model); download the model again"
    if part == "tokenizer":
        return None
    try:
        config = read_json(path / ("scheduler_config.json" if part == "scheduler" else "config.json"))
        if problem := config_problem(config, part, kind):
            return f"{path} {problem}"
        if part == "scheduler":
            return None
        for index in path.glob("*.index.json"):
            for name in sorted(set(read_json(index).get("weight_map", {}).values())):
                if not (path / name).is_file():
                    return f"{path / name} is missing, although {index.name} lists it; download the model again"
    except ValueError as error:
        return str(error)
    weights = [file for pattern in _WEIGHTS for file in sorted(path.glob(pattern))]
    if not weights:
        return f"{path} holds no weights ({' or '.join(_WEIGHTS)}); download the model again"
    return next((problem for file in weights if (problem := weights_problem(file)) is not None), None)


def config_problem(config: Mapping[str, Any], part: str, kind: ModelKind) -> str | None:
    """What a component's configuration is instead, to be read after its place; a scheduler's may lack its class."""
    if part == "scheduler":
        return _scheduler_problem(config, kind)
    wanted, found = kind.parts[part], config.get("_class_name")
    if wanted is not None and found != wanted:
        return f"holds a {found}, not a {wanted}"
    if kind is COGVIDEOX and part == "transformer":
        return version_problem(config)
    return None


def version_problem(transformer: Mapping[str, Any]) -> str | None:
    """That a transformer is a CogVideoX 1.5, to be read after its place."""
    if transformer.get("patch_size_t") is None:
        return None
    return (
        "is a CogVideoX 1.5 (patch_size_t is set), which is not supported; use a CogVideoX 1.0 checkpoint such as "
        "THUDM/CogVideoX-2b or THUDM/CogVideoX-5b"
    )


def _scheduler_problem(config: Mapping[str, Any], kind: ModelKind) -> str | None:
    """The bridge is aligned to one kind of process: variance-preserving, in steps, with CogVideoX's shift."""
    if config.get("_class_name") == "FrameBridgeScheduler":
        if config.get("backbone") is None:
            return None
        config = config["backbone"]
    name, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")  # diffusers' default
    betas = config.get("beta_schedule")
    if name not in _DIFFUSION_SCHEDULERS:
        found = "names no scheduler" if name is None else f"is for a {name}"
    elif config.get("use_flow_sigmas"):
        found = "is for flow matching (use_flow_sigmas)"
    elif prediction not in kind.predictions:
        found = f"has prediction_type {prediction}"
    elif betas is not None and betas not in _BETA_SCHEDULES:
        found = f"has beta_schedule {betas}"
    else:
        return None
    wanted = " or ".join(kind.predictions)
    return (
        f"{found}; the bridge knows a {kind.name} by its {' or '.join(_DIFFUSION_SCHEDULERS)} with prediction_type "
        f"{wanted}: give the model as it was released"
    )


def file_problem(path: Path) -> str:
    """What is wrong with a file where a folder is wanted: of a checkpoint of the authors, how to convert it."""
    if path.suffix not in _CHECKPOINTS:
        return f"{path} is a file, not a folder"
    command = ("finetrainers", "convert", "--from", "reference", str(path), "--to", str(path.with_suffix("")))
    return f"{path} is a checkpoint file, not a folder: make a model folder of it and give that: {shlex.join(command)}"


def find_transformer(path: Path) -> Path:
    """The transformer's folder in its own, a model's, a run's or a checkpoint's; the given one if there is none."""
    if (path / "config.json").is_file():
        return path
    around = (path, find_saved_model(path) or path)
    return next((folder / "transformer" for folder in around if (folder / "transformer").is_dir()), path)


def find_saved_model(folder: Path) -> Path | None:
    """The folder of the model or the LoRA to sample from: the given one, else the run's result, else its newest
    checkpoint's.
    """
    for candidate in (folder, folder / "model", folder / "lora"):
        if (candidate / "model_index.json").is_file() or (candidate / LORA_INFO_FILE).is_file():
            return candidate
    checkpoints = [path for path in folder.glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", path.name)]
    newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("step_")), default=None)
    return None if newest is None else find_saved_model(newest)


def two_file_problem(folder: Path) -> str | None:
    """How to convert the LoRA folder of an earlier version, whose input projection lies in a file of its own."""
    if not (folder / EXTRA_WEIGHTS_FILE).is_file():
        return None
    source = os.path.abspath(folder)
    command = shlex.join(["finetrainers", "convert", "--from", TWO_FILE_LORA, source, "--to", f"{source}-converted"])
    return f"{folder} is a LoRA in the two files of an earlier version; make one of them first: {command}"


def plain_problem(transformer: Path) -> str | None:
    """That a transformer's folder is of a plain CogVideoX; a FrameBridge network takes the image's latent as well."""
    config = _config(transformer)
    channels = config.get("in_channels")
    if not isinstance(channels, int) or channels != config.get("out_channels"):
        return None
    return f"a plain CogVideoX: its transformer has {channels} input channels, a FrameBridge model has {2 * channels}"


def writing_problem(folder: Path) -> str | None:
    """Why a folder cannot be written into, or made."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir():
        return f"{existing} is a file: name another folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable: name another folder"


def clip_shape_rule(vae: Path | None, transformer: Path | None) -> ClipShapeRule:
    """The rule of a model's configurations; a folder that is None or cannot be read stands for CogVideoX's own."""
    compression, levels, patch = 4, 4, 2
    if vae is not None and (config := _config(vae)):
        compression = int(config.get("temporal_compression_ratio", compression))
        levels = len(config.get("block_out_channels", range(levels)))
    if transformer is not None and (config := _config(transformer)):
        patch = int(config.get("patch_size", patch))
    return ClipShapeRule(frames_step=2 * compression, size_step=2 ** (levels - 1) * patch)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError that names the file for anything else."""
    if not path.is_file():  # a named pipe would be waited for
        raise ValueError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return content


def _class_name(index: Mapping[str, Any]) -> Any:
    name = index.get("_class_name")
    return name[-1] if isinstance(name, list) and name else name


def _is_present(component: str, index: Mapping[str, Any]) -> bool:
    entry = index.get(component)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json")
    except ValueError:
        return {}  # reported by part_problem


def _place_problem(path: Path) -> str | None:
    if not path.exists():
        return f"no such folder: {path}"
    if not path.is_dir():
        return file_problem(path)
    if not any(path.iterdir()):
        return f"{path} is empty"
    return two_file_problem(find_saved_model(path) or path)


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """Type, shape and place of each tensor by name, and `__metadata__`; None for another or a cut off file."""
    # 8 bytes with the header's length, the header in JSON, and the tensors' bytes.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 8 + length <= path.stat().st_size else None
        except ValueError:
            header = None
    return header if isinstance(header, dict) else None


def weights_problem(path: Path) -> str | None:
    """What is wrong with an existing file of weights."""
    size = path.stat().st_size
    if size == 0:
        return f"{path} is empty; download it again"
    if path.suffix != ".safetensors":
        return None
    header = safetensors_header(path)
    if header is None:
        return f"{path} is no safetensors file, or cut off in its header; download it again"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    with path.open("rb") as file:
        expected = 8 + int.from_bytes(file.read(8), "little") + max(ends, default=0)
    if size != expected:
        return f"{path} has {size} bytes, its header announces {expected}; download it again"
    return None
