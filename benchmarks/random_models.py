"""Models of published widths with random weights: made from their configs, nothing to download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from made_videos import VideoForm, write_video

from framebridge_plugin.backbones.files import read_json
from framebridge_plugin.backbones.published import write_published
from framebridge_plugin.recipe import Recipe, resolve_recipe
from framebridge_plugin.training.finetrainers.registration import recipe_arguments, register
from framebridge_plugin.training.run import build_specification

TOKENIZER = Path(__file__).parents[1] / "examples" / "quickstart" / "model" / "tokenizer"
SEED = 1
CLIPS = 2


def model_recipe(
    name: str, folder: Path, clip: tuple[int, int, int], changes: Mapping[str, Mapping[str, Any]], *overrides: str
) -> Recipe:
    """A shipped recipe on a model in `folder`, which gets the configs of the recipe's own.

    Args:
        name: The recipe.
        folder: An empty folder, or one that this has filled.
        clip: Frames, height and width.
        changes: What the config of each component has in place of the published values.
        overrides: Of the recipe.
    """
    model = resolve_recipe(name, ())[0].model
    path, key = folder / "model", "pretrained_model_name_or_path"
    if model.pretrained_model_name_or_path is None:  # from scratch, for the latents of a published autoencoder
        path, key = folder / "model" / "vae", "vae_id"
    if not path.exists():
        path.mkdir(parents=True)
        write_published(getattr(model, key), path)
        if key != "vae_id":
            shutil.copytree(TOKENIZER, path / "tokenizer")
    for part, values in changes.items():
        file = folder / "model" / part / "config.json"
        file.write_text(json.dumps(read_json(file) | values))
    shape = zip(("num_frames", "height", "width"), clip, strict=True)
    data = [f"framebridge.data.{name}={value}" for name, value in shape]
    return resolve_recipe(name, (f"model.{key}={path}", *data, "parallelism.dp_degree=1", *overrides))[0]


def make_specification(recipe: Recipe, dataset_config: Path | str = "") -> tuple[Any, Any]:
    """finetrainers' arguments of a recipe, and the specification of its model."""
    register()
    args = recipe_arguments(recipe, dataset_config, processes=1)
    return args, build_specification(recipe, args)


def make_parts(specification: Any, device: torch.device, widened: bool = True) -> dict[str, Any]:
    """Network, autoencoder and what encodes captions, in float32 with random weights."""
    torch.manual_seed(SEED)
    adapter = specification.adapter
    config = adapter.blank_network().config if widened else adapter.network_config
    with torch.device(device):
        network = adapter.network_class.from_config(config)
        parts = {adapter.facts.network: network, "vae": adapter.vae_class.from_config(adapter.vae_config)}
        if "text_encoder" in adapter.facts.parts:
            place = adapter.source.local(*adapter.place("text_encoder"), settings_only=True)
            kind = adapter.text_encoder_class
            parts["text_encoder"] = kind(kind.config_class.from_dict(read_json(place / "config.json")))
            parts["tokenizer"] = adapter.tokenizer_class.from_pretrained(TOKENIZER)
    if hasattr(network, "initialize_weights") and device.type != "meta":
        network.initialize_weights(SEED)
        with torch.no_grad():  # from scratch its output is 0, and a loss of it would tell nothing
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    network.train()
    for part in ("vae", "text_encoder"):
        if part in parts:
            parts[part].eval().requires_grad_(False)
    return parts


def write_run(
    name: str, folder: Path, clip: tuple[int, int, int], changes: Mapping[str, Mapping[str, Any]], *overrides: str
) -> Recipe:
    """`model_recipe` with what a run of it needs: the model's weights, and clips; its run goes into `folder`."""
    recipe = model_recipe(name, folder, clip, changes, *overrides)
    _, specification = make_specification(recipe)
    adapter, scratch = specification.adapter, recipe.is_from_scratch
    precision = {part: getattr(specification, f"{part}_dtype") for part in ("transformer", "vae", "text_encoder")}
    for part, module in make_parts(specification, torch.device("cpu"), widened=False).items():
        if part != "tokenizer" and not (scratch and part == adapter.facts.network):
            module.to(precision[part]).save_pretrained(folder / "model" / part)
    frames, height, width = clip
    clips = folder / "clips"
    classes = [clips / "A", clips / "B"] if scratch else [clips]
    for number in range(CLIPS):
        place = classes[number % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        file = place / (f"v_{place.name}_g{number:02}_c01.mp4" if scratch else f"{number}.mp4")
        write_video(file, VideoForm(width, height, 48 if scratch else frames, key_every=12, bit_rate=200_000))
        if not scratch:
            file.with_suffix(".txt").write_text(f"clip {number}")
    roots = {"csv": None, "video_root": None, "data_root": clips} if not scratch else {"class_root": clips}
    data = [f"framebridge.data.{key}={'null' if root is None else root}" for key, root in roots.items()]
    here = (*data, "dataloader.dataloader_num_workers=0", "dataloader.pin_memory=false")
    return model_recipe(name, folder, clip, {}, *here, f"checkpoints.output_dir={folder / 'run'}", *overrides)


def make_trainer(recipe: Recipe, folder: Path, trainer_class: Any) -> Any:
    """A trainer of what `write_run` wrote."""
    (folder / "data.json").write_text(json.dumps(recipe.dataset_config()))
    args, specification = make_specification(recipe, folder / "data.json")
    args.logging_dir = str(folder / "logs")
    return trainer_class(args, specification)
