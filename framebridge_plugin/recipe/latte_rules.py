"""Rules for a Latte's recipe: its network, neural prior, autoencoder, classes and clips have to fit each other.

All of it is read off `config.json` files and folder names, so that a neural prior of another size, a class that the
model does not know or a checkpoint of another stage is refused before torch is imported. What has an id on the Hugging
Face Hub is not looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.facts import ClipShapeRule
from framebridge_plugin.backbones.folders import folder_problem, local_path, part_problem, read_json
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE, LATTE_NEURAL_PRIOR
from framebridge_plugin.backbones.latte.rules import (
    LATTE_SIZES,
    VAE_DEFAULTS,
    LatteFacts,
    find_neural_prior,
    is_another_part,
    is_no_neural_prior,
    is_of_another_kind,
    neural_prior_problem,
    read_latte_facts,
    read_vae_config,
)
from framebridge_plugin.data.ucf101_classes import ucf101_class_names
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.schema import Recipe

_PRETRAINED = "model.pretrained_model_name_or_path"
_NEURAL_PRIOR = "framebridge.neural_prior"


def latte_problems(recipe: Recipe) -> Iterator[Problem]:
    """Check the folders that a Latte's recipe names, and whether they fit each other; the clips are left out.

    Args:
        recipe: A recipe of a Latte whose single values are right.

    Yields:
        Each problem.
    """
    model = recipe.model
    if model.pretrained_model_name_or_path is None:
        yield from _incomplete_problems(recipe)
    if recipe.is_from_scratch:
        if any(root is None for root in _class_roots(recipe)):
            where = "dataset.dataset_config" if recipe.framebridge.data is None else "framebridge.data"
            yield Problem(where, "a Latte from scratch takes its classes from folders: give class_root")
    else:
        yield from _pretrained_problems(recipe)
    vae = None if model.vae_id is None else local_path(model.vae_id)
    if vae is not None and (problem := part_problem(vae, "vae", LATTE_BRIDGE)):
        yield Problem("model.vae_id", problem, on_disk=not is_another_part(vae, "vae", LATTE_BRIDGE))
    if recipe.framebridge.neural_prior is not None and model.model_name == "latte_bridge":
        yield from _neural_prior_problems(recipe, recipe.framebridge.neural_prior)
    yield from _class_problems(recipe)


def latte_clip_rule(recipe: Recipe) -> ClipShapeRule | LatteFacts:
    """Find out which clips the network takes.

    Args:
        recipe: A recipe of a Latte whose single values are right.

    Returns:
        The rule: the one shape that a trained network was trained on, or what fits a new one.
    """
    if not recipe.is_from_scratch:
        return _facts(recipe) or ClipShapeRule(frames_step=1, size_step=1)
    assert recipe.framebridge.latte_size is not None
    patch = int(recipe.framebridge.latte_size.partition("/")[2])
    return ClipShapeRule(frames_step=1, size_step=patch * (_size_factor(_vae_folder(recipe)) or 1))


def latte_sample_rules(recipe: Recipe) -> tuple[ClipShapeRule | LatteFacts, Callable[[str], str | None]]:
    """Find out which samples the network can be validated with.

    Args:
        recipe: A recipe of a Latte whose single values are right.

    Returns:
        The rule for their shape, and what tells what is wrong with the name of a class, or None.
    """
    facts = _facts(recipe)
    return facts or latte_clip_rule(recipe), (lambda name: None) if facts is None else facts.class_problem


def data_class_names(recipe: Recipe) -> list[str] | None:
    """The classes of the data, which a network from scratch is built for.

    Args:
        recipe: A recipe.

    Returns:
        Their names in the order of their labels; None if the data is not in class folders, or not to be seen.
    """
    roots = _class_roots(recipe)
    if not roots or not all(isinstance(root, str) for root in roots):
        return None
    try:
        return sorted({name for root in roots for name in ucf101_class_names(root)})
    except FrameBridgeError:
        return None  # reported with the data


def data_clip_shape(recipe: Recipe) -> tuple[int, int, int] | None:
    """The shape of the clips, which a network from scratch is built for.

    Args:
        recipe: A recipe.

    Returns:
        (frames, height, width); None if the data is not to be seen.
    """
    data = recipe.framebridge.data
    if data is not None:
        return data.num_frames, data.height, data.width
    try:
        entry = _dataset_entries(str(recipe.dataset.dataset_config))[0]
        num_frames, height, width = entry["video_resolution_buckets"][0]
        return int(num_frames), int(height), int(width)
    except (LookupError, TypeError, ValueError):
        return None  # reported with the data


def latte_part_folders(recipe: Recipe) -> dict[str, Path | None]:
    """Find the components of the model that a run trains.

    Args:
        recipe: A recipe of a Latte whose single values are right.

    Returns:
        Their folders, by name; None for those on the hub, and for a network from scratch.
    """
    folders = {"vae": _vae_folder(recipe), _network_name(recipe): _network_folder(recipe)}
    name, whole = recipe.framebridge.neural_prior, recipe.model.pretrained_model_name_or_path
    if recipe.model.model_name == "latte_bridge" and (source := local_path(name or whole or "a/b")) is not None:
        folders["neural_prior"] = find_neural_prior(source)
    return folders


def _class_roots(recipe: Recipe) -> list[Any]:
    """The folder of the class folders of every data set, None for one that is named in another way."""
    if recipe.framebridge.data is not None:
        return [recipe.framebridge.data.class_root]
    return [entry.get("class_root") for entry in _dataset_entries(str(recipe.dataset.dataset_config))]


def _incomplete_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.vae_id is None:
        message = f"is required without {_PRETRAINED}: an AutoencoderKL, such as stabilityai/sd-vae-ft-ema"
        yield Problem("model.vae_id", message)
    if recipe.training.training_type == "lora":
        message = f"lora needs a trained model to adapt: give {_PRETRAINED}, or set full-finetune"
        yield Problem("training.training_type", message)


def _pretrained_problems(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    is_bridge = model.model_name == "latte_bridge"
    kind = LATTE_BRIDGE if is_bridge else LATTE_NEURAL_PRIOR
    part, other = ("transformer", "neural_prior") if is_bridge else ("neural_prior", "transformer")
    size, start_from = recipe.framebridge.latte_size, recipe.framebridge.start_from
    if size is not None and start_from is None:
        yield Problem("framebridge.latte_size", "has no effect: the trained network has its size; remove it")
    whole = None if model.pretrained_model_name_or_path is None else local_path(model.pretrained_model_name_or_path)
    if whole is not None:
        if (whole / other).is_dir() and not (whole / part).is_dir():
            yield Problem(_PRETRAINED, f"{whole} has no {part}/ but a {other}/: it is a model of another stage")
            return
        if problem := folder_problem(whole, kind):
            yield Problem(_PRETRAINED, problem, on_disk=not is_of_another_kind(whole, kind))
            return
    given = recipe.transformer_source
    where = "model.transformer_id" if model.transformer_id is not None else "framebridge.start_from"
    alone = None if given is None else local_path(given)
    if alone is not None and (problem := part_problem(alone, part, kind)):
        yield Problem(where, problem, on_disk=not is_another_part(alone, part, kind))
        return
    folder = _network_folder(recipe)
    if config := _config(folder):
        where = _PRETRAINED if given is None else where
        if size is not None and start_from is not None and (problem := _size_problem(size, config)):
            yield Problem("framebridge.latte_size", f"the network in {folder} {problem}")
        yield from _network_problems(recipe, config, where, f"the network in {folder}")


def _size_problem(size: str, config: dict[str, Any]) -> str | None:
    """Compare the size that a recipe names with that of the network it starts from."""
    name, _, patch = size.partition("/")
    wanted = (*LATTE_SIZES[name], int(patch))
    layers, heads, width = (config.get(key) for key in ("num_layers", "num_attention_heads", "attention_head_dim"))
    if (layers, (heads or 0) * (width or 0), heads, config.get("patch_size")) == wanted:
        return None
    return f"has another size than {size}: remove it, or start from a network of that size"


def _network_problems(recipe: Recipe, config: dict[str, Any], where: str, what: str) -> Iterator[Problem]:
    """Check a trained network against stage, autoencoder and neural prior of the recipe."""
    stage = recipe.model.model_name.removeprefix("latte_")
    if config.get("stage") != stage:
        yield Problem(where, f"{what} is of the stage {config.get('stage')!r}, not {stage!r}: give one of that stage")
        return
    channels, wanted = config.get("out_channels"), _vae_config(_vae_folder(recipe)).get("latent_channels")
    if wanted is not None and channels != wanted:
        message = f"{what} is for latents of {channels} channels, the autoencoder has {wanted}: give its own"
        yield Problem(where, message)
    takes, given = config.get("in_channels") != channels, recipe.framebridge.neural_prior is not None
    if given and not takes:
        yield Problem(_NEURAL_PRIOR, f"{what} takes no neural prior: remove it, or train from scratch")
    whole = recipe.model.pretrained_model_name_or_path
    is_beside = whole is not None and ((path := local_path(whole)) is None or (path / "neural_prior").is_dir())
    if takes and not given and not is_beside:
        yield Problem(_NEURAL_PRIOR, f"is required: {what} takes the video of a neural prior")


def _neural_prior_problems(recipe: Recipe, name: str) -> Iterator[Problem]:
    if recipe.framebridge.objective != "bridge":
        yield Problem(_NEURAL_PRIOR, f"goes with objective bridge, not with {recipe.framebridge.objective}: remove it")
    path = local_path(name)
    if path is None:
        return
    if problem := neural_prior_problem(path):
        yield Problem(_NEURAL_PRIOR, problem, on_disk=not is_no_neural_prior(path))
    elif problem := neural_prior_problem(path, _bridge_config(recipe)) or _other_vae_problem(recipe, path):
        yield Problem(_NEURAL_PRIOR, problem)


def _other_vae_problem(recipe: Recipe, neural_prior: Path) -> str | None:
    network = find_neural_prior(neural_prior)
    ours, theirs = _vae_config(_vae_folder(recipe)), _vae_config(None if network is None else network.parent / "vae")
    # Autoencoders that agree in these make latents of the same shape and scale. No shift is one of 0.
    different = [key for key in VAE_DEFAULTS if ours and theirs and (ours[key] or 0) != (theirs[key] or 0)]
    if not different:
        return None
    there, here = theirs[different[0]], ours[different[0]]
    return f"{neural_prior} was trained with another autoencoder: {different[0]} is {there} there, {here} here"


def _class_problems(recipe: Recipe) -> Iterator[Problem]:
    """Check that a trained network knows every class of the data."""
    facts, names = _facts(recipe), data_class_names(recipe)
    problems = [] if facts is None or names is None else [p for name in names if (p := facts.class_problem(name))]
    if problems:
        where = "dataset.dataset_config" if recipe.framebridge.data is None else "framebridge.data.class_root"
        more = f" (and {len(problems) - 1} more of the data)" if len(problems) > 1 else ""
        yield Problem(where, f"{problems[0]}{more}")


def _facts(recipe: Recipe) -> LatteFacts | None:
    """What is known of the network that the run trains; None if something is to be seen only later."""
    if recipe.is_from_scratch:
        shape, names = data_clip_shape(recipe), data_class_names(recipe)
        return None if shape is None or names is None else LatteFacts(*shape, len(names), tuple(names))
    folder, vae = _network_folder(recipe), _vae_folder(recipe)
    try:
        return None if folder is None else read_latte_facts(vae, folder)
    except ValueError:
        return None  # reported with the folder


def _bridge_config(recipe: Recipe) -> dict[str, Any]:
    """The configuration of the network that the run trains, as far as it is known."""
    if not recipe.is_from_scratch:
        return _config(_network_folder(recipe))
    config: dict[str, Any] = {}
    shape, factor, names = data_clip_shape(recipe), _size_factor(_vae_folder(recipe)), data_class_names(recipe)
    if shape is not None:
        config["num_frames"] = shape[0]
        if factor is not None:
            config |= {"sample_height": shape[1] // factor, "sample_width": shape[2] // factor}
    if names is not None:
        config |= {"num_classes": len(names), "class_names": names}
    channels = _vae_config(_vae_folder(recipe)).get("latent_channels")
    return config if channels is None else config | {"out_channels": channels}


def _network_folder(recipe: Recipe) -> Path | None:
    model = recipe.model
    if (alone := recipe.transformer_source) is not None:
        return local_path(alone)
    whole = None if model.pretrained_model_name_or_path is None else local_path(model.pretrained_model_name_or_path)
    return None if whole is None else whole / _network_name(recipe)


def _network_name(recipe: Recipe) -> str:
    return "transformer" if recipe.model.model_name == "latte_bridge" else "neural_prior"


def _vae_folder(recipe: Recipe) -> Path | None:
    model = recipe.model
    if model.vae_id is not None:
        return local_path(model.vae_id)
    whole = None if model.pretrained_model_name_or_path is None else local_path(model.pretrained_model_name_or_path)
    return None if whole is None else whole / "vae"


def _size_factor(vae: Path | None) -> int | None:
    """Pixels per row of the latents; None if the autoencoder is not on this machine."""
    levels = _vae_config(vae).get("block_out_channels")
    return 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else None


def _config(folder: Path | None) -> dict[str, Any]:
    try:
        return {} if folder is None else read_json(folder / "config.json")
    except ValueError:
        return {}  # reported with the folder


def _vae_config(folder: Path | None) -> dict[str, Any]:
    try:
        return {} if folder is None else read_vae_config(folder)
    except ValueError:
        return {}  # reported with the folder


def _dataset_entries(path: str) -> list[dict[str, Any]]:
    try:
        entries = read_json(Path(path)).get("datasets")
    except ValueError:
        return []  # reported with the data
    return entries if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) else []
