"""What a change of the inside must leave as it is: settings, losses, saved files, samples, fingerprints of stores.

The values lie in `tests/data/snapshots`. A commit that changes them says why, and writes them anew by
`python -m tests.test_snapshots`.
"""

from __future__ import annotations

import contextlib
import csv
import enum
import functools
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import yaml
from PIL import Image
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file

from framebridge_plugin import FrameBridgeCogVideoXPipeline, FrameBridgeLattePipeline, FrameBridgeScheduler
from framebridge_plugin.cli import main
from framebridge_plugin.recipe import Recipe, resolve_recipe, shipped_recipes
from tests.tiny_models import (
    CLASS_NAMES,
    LATTE_KINDS,
    make_clips,
    make_tiny_cogvideox,
    make_tiny_image_vae,
    make_tiny_latte,
    moving_square,
    write_video,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SNAPSHOTS = DATA / "snapshots"

RELATIVE = 1e-3
ABSOLUTE = {"losses": 1e-6, "latents": 2e-4, "sampled": 2.0, "distance": 2e-5}
"""Tolerances of what is computed in float32, and so differs a little between processors; all else is exact."""

SIZE, CLIP_FRAMES, LATTE_FRAMES = 32, 9, 4
TRAINING_TYPES = {
    "full": ("training.training_type=full-finetune",),
    "lora": ("training.training_type=lora", "lora.rank=4", "lora.lora_alpha=8"),
}


# --- Settings ---


def resolved_recipe(name: str, folder: Path) -> dict[str, Any]:
    """A shipped recipe as a run writes it, the description of its data, and what a check says about its files."""
    recipe, _ = resolve_recipe(name)
    return {"recipe": yaml.safe_load(recipe.to_yaml()), "dataset_config": recipe.dataset_config()}


def recipe_arguments(name: str, folder: Path) -> dict[str, Any]:
    recipe, _ = resolve_recipe(name)
    (folder / "data.json").write_text(json.dumps(recipe.dataset_config()))
    return arguments_of(recipe, folder / "data.json")


def arguments_of(recipe: Recipe, dataset_config: Path) -> dict[str, Any]:
    """What a run of a recipe gives to finetrainers, by name: this is the one place that knows how."""
    from framebridge_plugin.training.finetrainers.registration import recipe_arguments

    return values_of(recipe_arguments(recipe, dataset_config))


def command_line_arguments(model_name: str, training_type: str, folder: Path) -> dict[str, Any]:
    """What a program that uses finetrainers' own parser gets if it says no more than it must."""
    import framebridge_plugin

    framebridge_plugin.register()
    from finetrainers import BaseArgs
    from finetrainers.trainer.sft_trainer import SFTFullRankConfig, SFTLowRankConfig

    (folder / "data.json").write_text("{}")
    args = BaseArgs()
    args.register_args(SFTLowRankConfig() if training_type == "lora" else SFTFullRankConfig())
    given = {"model_name": model_name, "training_type": training_type, "pretrained_model_name_or_path": "model"}
    given |= {"dataset_config": str(folder / "data.json"), "output_dir": "run"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *(f"--{name}={value}" for name, value in given.items())])
        return values_of(args.parse_args())


def values_of(args: Any) -> dict[str, Any]:
    """finetrainers' arguments by name; the fields of settings among them stand beside the others."""
    found = {name: getattr(args, name) for name in type(args).__annotations__ if name != "attention_provider_args"}
    found |= vars(args) | vars(args.attention_provider_args)
    values: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, BaseModel):
            values |= value.model_dump()
        elif not name.startswith("_"):
            values[name] = str(value) if isinstance(value, torch.dtype | enum.Enum) else value
    return values


# --- Runs ---


def write_inputs(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """Writes a model and clips; returns the model and the recipe's sections `model` and `framebridge`."""
    if kind.startswith("cogvideox"):
        model = make_tiny_cogvideox(folder / "base", sample_size=SIZE)
        clips = make_clips(folder / "clips", count=4, frames=12, size=SIZE)
        data = {"data_root": str(clips), "num_frames": CLIP_FRAMES, "window": "random"}
        sections = {"model": {"model_name": "cogvideox_bridge"}, "framebridge": {"data": data}}
    else:
        for number, name in enumerate(CLASS_NAMES):
            (folder / "clips" / name).mkdir(parents=True)
            write_video(folder / f"clips/{name}/{number}.mp4", moving_square(number, 8, SIZE, SIZE))
        model = make_tiny_latte(folder / "base", kind.removeprefix("latte_"), size=SIZE, num_frames=LATTE_FRAMES)
        name = "latte_neural_prior" if kind == "latte_neural_prior" else "latte_bridge"
        data = {"class_root": str(folder / "clips"), "num_frames": LATTE_FRAMES, "window_frames": 8}
        data["frame_sampling"] = "linspace"
        sections = {"model": {"model_name": name}, "framebridge": {"ema_decay": 0.5, "data": data}}
    if kind.endswith("diffusion"):
        sections["framebridge"]["objective"] = "diffusion"
    data |= {"height": SIZE, "width": SIZE, "horizontal_flip": True}
    sections["framebridge"]["caption_dropout"] = 0.3
    sections["model"]["pretrained_model_name_or_path"] = str(model)
    return model, sections


def run(kind: str, training_type: str, folder: Path) -> dict[str, Any]:
    """Three updates of two micro-steps: their losses, what is saved, and a video from it."""
    is_cogvideox = kind.startswith("cogvideox")
    model, sections = write_inputs(folder, kind)
    precision = dict.fromkeys(("transformer_dtype", "vae_dtype"), "fp32")
    if is_cogvideox:
        precision["text_encoder_dtype"] = "fp32"
    Image.fromarray(moving_square(9, 1, 40, 48)[0]).save(folder / "image.png")
    condition = "a red square" if is_cogvideox else CLASS_NAMES[1]
    columns = "caption,image_path,num_inference_steps\n"
    (folder / "validation.csv").write_text(f"{columns}{condition},{folder / 'image.png'},1\n")
    recipe = {
        **sections,
        "training": {"batch_size": 2, "gradient_accumulation_steps": 2, "seed": 7},
        "optimization": {"train_steps": 3, "lr": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 0},
        "precision": precision,
        "checkpoints": {"output_dir": str(folder / "run"), "checkpointing_steps": 3, "checkpointing_limit": 2},
        "validation": {"validation_dataset_file": str(folder / "validation.csv"), "validation_steps": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command("train", f"--recipe={folder / 'recipe.yaml'}", *TRAINING_TYPES[training_type])
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    measured = [name for name in lines[0] if name != "samples_per_second"]
    video = folder / "sample.mp4"
    given = ["--image", folder / "image.png", "--prompt" if is_cogvideox else "--class-name", condition]
    given += [] if kind == "latte_neural_prior" else ["--steps", 3]
    command("sample", "--model", folder / "run", "--output", video, *given)
    return {
        "losses": [{name: rounded(line[name]) for name in measured} for line in lines],
        "sampled": blocks_of(video),
        "files": described(folder / "run", model),
    }


def blocks_of(video: Path) -> list[list[float]]:
    """Mean brightness of 16 parts of every frame."""
    with av.open(str(video)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="gray")).float() for frame in container.decode(video=0)]
    means = torch.nn.functional.adaptive_avg_pool2d(torch.stack(frames)[:, None], 4)
    return [[rounded(mean) for mean in frame] for frame in means.flatten(1).tolist()]


def command(*arguments: str | int | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


# --- Samples ---


def make_pipeline(kind: str, folder: Path) -> Any:
    """A pipeline of random weights, saved and opened again."""
    if not kind.startswith("cogvideox"):
        make_tiny_latte(folder / "model", kind.removeprefix("latte_"), size=SIZE, num_frames=LATTE_FRAMES)
        return FrameBridgeLattePipeline.from_pretrained(folder / "model")
    from diffusers import CogVideoXPipeline

    base = make_tiny_cogvideox(folder / "base", sample_size=SIZE, in_channels=8, rotary="rotary" in kind)
    parts = CogVideoXPipeline.from_pretrained(base).components
    if not kind.endswith("diffusion"):
        parts["scheduler"] = FrameBridgeScheduler.from_backbone(parts["scheduler"], target="v")
    FrameBridgeCogVideoXPipeline(**parts).save_pretrained(folder / "model")
    return FrameBridgeCogVideoXPipeline.from_pretrained(folder / "model")


SAMPLERS: dict[str, dict[str, Any]] = {
    "default": {},
    "second order": {"sampler": "dbim", "order": 2, "grid": "lambda"},
    "noisy": {"sampler": "dbim", "eta": 0.5, "grid": "trailing"},
    "clean prior": {"start": "clean_prior", "grid": "linspace"},
}
PIPELINES = (
    *("cogvideox", "cogvideox_rotary", "cogvideox_diffusion"),
    *(f"latte_{kind}" for kind in LATTE_KINDS),
)


def samples(kind: str, folder: Path) -> dict[str, Any]:
    """Latents of every sampler at a fixed seed, with and without guidance, and the model's files."""
    pipeline = make_pipeline(kind, folder)
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(moving_square(5, 1, 40, 48)[0])
    call: dict[str, Any] = {"image": image}
    call |= {"prompt": "a red square"} if kind.startswith("cogvideox") else {"class_label": CLASS_NAMES[2]}
    if kind.startswith("cogvideox"):
        call |= {"num_frames": CLIP_FRAMES, "height": SIZE, "width": SIZE}
    is_bridge = isinstance(pipeline.scheduler, FrameBridgeScheduler)
    settings = {"num_inference_steps": 4, "output_type": "latent"}
    found, config = {}, pipeline.scheduler.config if is_bridge else None
    for name, sampler in (SAMPLERS if is_bridge else {"default": {}}).items():
        if sampler:
            pipeline.scheduler = FrameBridgeScheduler.from_config(config, **sampler)
        for guidance in (None, 1.0):
            generator = torch.Generator().manual_seed(1)
            latents = pipeline(**call, **settings, guidance_scale=guidance, generator=generator).frames
            found[f"{name}, guidance {guidance}"] = summary(latents)
    return {"latents": found, "files": described(folder / "model", folder / "base")}


def summary(values: torch.Tensor) -> dict[str, Any]:
    flat = values.double().flatten()
    places = torch.linspace(0, len(flat) - 1, 8).long()
    numbers = [flat.mean(), flat.std(), flat.abs().max(), *flat[places]]
    return {"shape": list(values.shape), "values": [rounded(float(number)) for number in numbers]}


# --- Stores ---


def store(kind: str, folder: Path) -> dict[str, Any]:
    """A store of committed clips, by a model of committed or plain weights: its fingerprint is the same anywhere."""
    videos = [DATA / "h264_no_reorder_info.mp4", DATA / "sar_16_9.mp4"]
    model: dict[str, Any]
    if kind == "cogvideox":
        (folder / "clips").mkdir()
        rows = [("file_name", "caption"), *((video.name, f"{video.stem} moves") for video in videos)]
        with (folder / "clips/metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        for video in videos:
            shutil.copy(video, folder / "clips")
        model = {"model_name": "cogvideox_bridge"}
        model["pretrained_model_name_or_path"] = str(ROOT / "examples/quickstart/model")
        data = {"data_root": str(folder / "clips"), "num_frames": CLIP_FRAMES}
    else:
        for name, video in zip(CLASS_NAMES, videos, strict=False):
            (folder / "clips" / name).mkdir(parents=True)
            shutil.copy(video, folder / "clips" / name)
        vae = make_tiny_image_vae()
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) % 16 - 8) / 32)
        vae.save_pretrained(folder / "vae")
        model = {"model_name": "latte_bridge", "vae_id": str(folder / "vae")}
        data = {"class_root": str(folder / "clips"), "num_frames": LATTE_FRAMES, "resize": "decoder"}
    recipe = {
        "model": model,
        "framebridge": {"data": {**data, "height": SIZE, "width": SIZE}},
        "training": {"training_type": "full-finetune", "seed": 7},
        "checkpoints": {"output_dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command("precompute", f"--recipe={folder / 'recipe.yaml'}", f"--output={folder / 'store'}", "--variants=2")
    return {"files": described(folder / "store")}


# --- Descriptions ---


def described(folder: Path, base: Path | None = None) -> dict[str, Any]:
    """Every file of a folder: what JSON and safetensors files say, and the names of the others.

    `base` is the model of random weights that it came from, whose digests differ from machine to machine.
    """
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = re.sub(r"tfevents\.[\w.-]+", "tfevents", str(file.relative_to(folder)))
        name = re.sub(r"-[0-9a-f]{16}/", "-DIGEST/", name)
        content = content_of(file, base)
        same = first.setdefault(json.dumps(content), name)
        found[name] = content if same == name or isinstance(content, str) else f"as {same}"
    return found


def content_of(file: Path, base: Path | None) -> Any:
    if file.suffix == ".safetensors":
        source = base and base / re.sub(r"-[0-9a-f]{16}$", "", file.parent.name) / file.name
        if source and source.is_file() and source.read_bytes() == file.read_bytes():
            return "that of the model it began with"
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            described_tensors = {name: f"{str(t.dtype)[6:]} {list(t.shape)}" for name, t in sorted(tensors.items())}
            metadata = {name: read_json(text) for name, text in sorted((content.metadata() or {}).items())}
        found = {"metadata": metadata, "tensors": shortened(described_tensors)}
        if source and file.parent.name != "trainer":
            begun = load_file(source) if source.is_file() else {}
            kept = {name: t for name, t in begun.items() if name in tensors and t.shape == tensors[name].shape}
            changes = [(t.double() - kept.get(name, torch.zeros(()))).flatten() for name, t in tensors.items()]
            found["distance"] = rounded(float(torch.cat(changes).square().mean().sqrt()))
        return found
    digests_alone = file.name == "manifest.json" and base is not None  # a store's says what is in it
    if file.suffix == ".json" and file.name != "tokenizer.json" and not digests_alone:
        text = file.read_text()
        content = json.loads(re.sub(r'\b([0-9a-f]{16}|[0-9a-f]{32})"', 'DIGEST"', text) if base else text)
        return list(content) if file.name == "versions.json" else {key: shortened(content[key]) for key in content}
    return "a file"


def shortened(value: Any) -> Any:
    """What would fill pages, as what the optimiser has for each parameter, shows that it changed, not where."""
    text = json.dumps(value, sort_keys=True)
    return value if len(text) < 5000 else f"{len(value)} values, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def read_json(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def rounded(number: float) -> float:
    return float(f"{number:.5g}")


def portable(value: Any, folder: Path) -> Any:
    """The value without folders of this machine and versions of packages."""
    if isinstance(value, dict):
        return {
            key: "a version" if key.endswith("_version") else portable(item, folder) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [portable(item, folder) for item in value]
    if isinstance(value, str | Path):
        return str(value).replace(str(folder), "FOLDER").replace(str(ROOT), "REPOSITORY")
    return value


# --- Comparing ---

RUNS = ("cogvideox", "cogvideox_diffusion", *(f"latte_{kind}" for kind in LATTE_KINDS))
BRIDGE_MODELS = ("cogvideox_bridge", "latte_bridge", "latte_neural_prior")

CASES: dict[str, dict[str, Callable[[Path], Any]]] = {
    "recipes": {name: functools.partial(resolved_recipe, name) for name in shipped_recipes()},
    "arguments": {
        **{name: functools.partial(recipe_arguments, name) for name in shipped_recipes()},
        **{
            f"{name} by command line, {training_type}": functools.partial(command_line_arguments, name, training_type)
            for name in BRIDGE_MODELS
            for training_type in ("full-finetune", "lora")
        },
    },
    "runs": {
        f"{kind}, {training_type}": functools.partial(run, kind, training_type)
        for kind in RUNS
        for training_type in TRAINING_TYPES
        if (kind, training_type) != ("latte_diffusion", "lora")
    },
    "samples": {kind: functools.partial(samples, kind) for kind in PIPELINES},
    "stores": {kind: functools.partial(store, kind) for kind in ("cogvideox", "latte")},
}


def take(group: str, case: str, folder: Path) -> Any:
    folder = folder.resolve()
    with contextlib.chdir(folder):
        return json.loads(json.dumps(portable(CASES[group][case](folder), folder)))


@functools.cache
def stored(group: str) -> dict[str, Any]:
    return json.loads((SNAPSHOTS / f"{group}.json").read_text())


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value within dictionaries and lists, and where it is; of an empty one, the thing itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    items = list(items)
    if not items:
        yield path, value
    for key, item in items:
        yield from leaves(item, (*path, str(key)))


def differences(expected: Any, actual: Any) -> list[str]:
    there, here = dict(leaves(expected)), dict(leaves(actual))
    return [
        f"{' > '.join(path)}: {there.get(path, 'nothing')!r} became {here.get(path, 'nothing')!r}"
        for path in {**there, **here}
        if not (path in there and path in here and is_same(path, there[path], here[path]))
    ]


def is_same(path: tuple[str, ...], expected: Any, actual: Any) -> bool:
    if isinstance(expected, float) and isinstance(actual, float) and (names := ABSOLUTE.keys() & set(path)):
        return abs(actual - expected) <= ABSOLUTE[names.pop()] + RELATIVE * abs(expected)
    return type(expected) is type(actual) and expected == actual


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("group", "case"), [(group, case) for group, cases in CASES.items() for case in cases])
def test_nothing_changed(group, case, tmp_path):
    assert case in stored(group), "there is no snapshot of it: python -m tests.test_snapshots"
    assert "\n".join(differences(stored(group)[case], take(group, case, tmp_path))) == ""


@pytest.mark.parametrize("group", CASES)
def test_every_snapshot_has_its_case(group):
    assert list(stored(group)) == list(CASES[group])


def write_snapshots() -> None:
    SNAPSHOTS.mkdir(exist_ok=True)
    for group, cases in CASES.items():
        values = {}
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                values[case] = take(group, case, Path(folder))
        text = json.dumps(values, indent=1)
        lists_in_a_line = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match.group().split()), text)
        (SNAPSHOTS / f"{group}.json").write_text(lists_in_a_line + "\n")


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (its settings)

    write_snapshots()
