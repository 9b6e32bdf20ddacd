"""What can be told about a Latte model without loading it: do its parts fit, which clips and classes does it know.

Needs the standard library alone, as `folder_checks`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.folders import (
    LORA_INFO_FILE,
    backbone_of,
    config_problem,
    file_problem,
    find_saved_model,
    folder_problem,
    part_problem,
    read_json,
)
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE, LATTE_NEURAL_PRIOR

VAE_DEFAULTS = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None, "block_out_channels": [64]}
"""What diffusers takes for these where the configuration of an `AutoencoderKL` leaves them out."""

LATTE_SIZES = {"Ti": (6, 192, 6), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Blocks (half of them spatial, half temporal), width, heads. Ti is this package's own, for trials on a CPU."""

_STAGES = {"bridge": "a bridge", "neural_prior": "a neural prior"}
# What a neural prior and the bridge that takes its videos have in common.
_SHARED = {
    "num_frames": "frames",
    "sample_height": "rows of its latents",
    "sample_width": "columns of its latents",
    "out_channels": "channels of its latents",
    "num_classes": "classes",
}


@dataclass(frozen=True)
class LatteFacts:
    """What a Latte model can be asked for.

    Attributes:
        num_frames: Frames of its videos.
        height: Height of its videos in pixels.
        width: Width of its videos in pixels.
        num_classes: Number of classes it was trained on; their labels are 0 to `num_classes` - 1.
        class_names: Names of the classes in the order of their labels; empty where only the numbers are known.
    """

    num_frames: int
    height: int
    width: int
    num_classes: int
    class_names: tuple[str, ...] = ()

    def problems(self, num_frames: int | None, height: int | None, width: int | None) -> Iterator[tuple[str, str]]:
        """Say which wishes do not fit: the model gives videos of the size it was trained on, and no others.

        Args:
            num_frames: Frames of the clip; None is not checked.
            height: Pixels; None is not checked.
            width: Pixels; None is not checked.

        Yields:
            The name of an argument, and what is wrong with it.
        """
        for name, given in {"num_frames": num_frames, "height": height, "width": width}.items():
            trained = getattr(self, name)
            if given is not None and given != trained:
                yield name, f"this model was trained on {trained} and takes no other, not {given}"

    def class_problem(self, name: str) -> str | None:
        """Look a class up.

        Args:
            name: Name of the class, or its label in digits.

        Returns:
            What is wrong, with the nearest names, or None if the model knows it.
        """
        return class_problem(name, self.num_classes, self.class_names)


def class_problem(name: str, num_classes: int, class_names: Sequence[str]) -> str | None:
    """Look a class up.

    Args:
        name: Name of the class, or its label in digits.
        num_classes: Number of classes that the model knows.
        class_names: Their names in the order of their labels; empty where only the numbers are known.

    Returns:
        What is wrong, with the nearest names, or None if the model knows it.
    """
    if name in class_names or (name.isdecimal() and int(name) < num_classes):
        return None
    if name.lstrip("-").isdecimal():
        return f"the model knows no class {name}: its labels run from 0 to {num_classes - 1}"
    if not class_names:
        return f"the model knows its classes by number only, 0 to {num_classes - 1}, not {name!r}"
    by_small_letters = {known.casefold(): known for known in class_names}
    near = difflib.get_close_matches(name.casefold(), by_small_letters, n=3)
    if near:
        return f"the model knows no class {name!r}; the nearest: {', '.join(by_small_letters[key] for key in near)}"
    return f"the model knows no class {name!r}; it knows {num_classes}: {', '.join(class_names[:3])}, ..."


def latte_folder_problem(folder: Path, kind: BackboneFacts = LATTE_BRIDGE) -> str | None:
    """Examine a Latte model's whole folder.

    Args:
        folder: The folder that holds `model_index.json`.
        kind: Which model it should be.

    Returns:
        What is wrong and what to do, or None.
    """
    neural_prior = folder / "neural_prior"
    problem = folder_problem(folder, kind)
    if problem is None and kind is LATTE_BRIDGE and neural_prior.exists():
        problem = part_problem(neural_prior, "neural_prior", LATTE_NEURAL_PRIOR)
    if problem is not None:
        return problem
    transformer = folder / "transformer" if kind is LATTE_BRIDGE else None
    return latte_parts_problem(folder / "vae", transformer, neural_prior if neural_prior.exists() else None)


def latte_parts_problem(vae: Path | None, transformer: Path | None, neural_prior: Path | None) -> str | None:
    """Examine whether the parts of a Latte model fit each other.

    Args:
        vae: Folder of the autoencoder; None is not checked.
        transformer: Folder of the bridge (or the diffusion baseline), if there is one.
        neural_prior: Folder of the neural prior, if there is one.

    Returns:
        What is wrong and what to do, or None.
    """
    try:
        configs = {
            stage: read_json(path / "config.json")
            for stage, path in (("bridge", transformer), ("neural_prior", neural_prior))
            if path is not None
        }
        channels = None if vae is None else read_vae_config(vae)["latent_channels"]
    except ValueError as error:
        return str(error)
    for stage, config in configs.items():
        where, found, wanted = transformer if stage == "bridge" else neural_prior, config.get("stage"), _STAGES[stage]
        if found != stage:
            return f"{where} holds {_STAGES.get(str(found), f'a network of stage {found!r}')}, not {wanted}"
        if channels is not None and config.get("out_channels") != channels:
            return (
                f"{where} has latents of {config.get('out_channels')} channels, the autoencoder {vae} of {channels}; "
                "give the autoencoder that it was trained with"
            )
    if "bridge" not in configs:
        return None
    takes_neural_prior = configs["bridge"].get("in_channels") != configs["bridge"].get("out_channels")
    if takes_neural_prior and neural_prior is None:
        return f"{transformer} takes a neural prior's video, but there is no neural_prior/ beside it; copy it as well"
    if not takes_neural_prior and neural_prior is not None:
        return f"{transformer} takes no neural prior's video, but {neural_prior} is beside it; take that away"
    return neural_prior_mismatch(configs["neural_prior"], configs["bridge"]) if neural_prior is not None else None


def neural_prior_mismatch(neural_prior: Mapping[str, Any], bridge: Mapping[str, Any]) -> str | None:
    """Compare a neural prior with the bridge that is to take its videos.

    Args:
        neural_prior: Configuration of the neural prior's `LatteTransformer`.
        bridge: That of the bridge's; keys that it lacks are not compared.

    Returns:
        What does not fit and what to do, or None.
    """
    differences = [
        f"{neural_prior.get(key)} {name}, not {bridge[key]}"
        for key, name in _SHARED.items()
        if key in bridge and neural_prior.get(key) != bridge[key]
    ]
    names = enumerate(zip(neural_prior.get("class_names") or (), bridge.get("class_names") or (), strict=False))
    different = [(label, own, wanted) for label, (own, wanted) in names if own != wanted]
    if different and not differences:
        label, own, wanted = different[0]
        differences = [f"the class {own!r} at label {label}, not {wanted!r}"]
    if not differences:
        return None
    return (
        f"the neural prior does not fit the bridge: it has {'; '.join(differences)}; train both on clips of one shape "
        "and the same classes"
    )


def find_neural_prior(folder: Path) -> Path | None:
    """Find the neural prior in what a run left behind.

    Args:
        folder: The folder of a run, of one of its checkpoints, or of a model.

    Returns:
        The folder `neural_prior` of the model that is found there, or None if there is no such model.
    """
    found = find_saved_model(folder)
    return found / "neural_prior" if found is not None and (found / "neural_prior").is_dir() else None


def neural_prior_problem(folder: Path, bridge: Mapping[str, Any] | None = None) -> str | None:
    """Examine a folder that a bridge is to take its neural prior from.

    Args:
        folder: The folder of a neural prior's run, of one of its checkpoints, or of its model.
        bridge: What is known of the bridge's configuration, as for `neural_prior_mismatch`.

    Returns:
        What is wrong and what to do, or None.
    """
    if not folder.is_dir():
        return file_problem(folder) if folder.exists() else f"no such folder: {folder}"
    network = find_neural_prior(folder)
    if network is None:
        found = find_saved_model(folder)
        kind = None if found is None else backbone_of(found)
        what = "no saved model" if found is None else f"a {kind.title if kind else ''} model without a neural prior"
        return f"{folder} holds {what}; give the folder of a latte_neural_prior run that has saved one"
    problem = part_problem(network, "neural_prior", LATTE_NEURAL_PRIOR) or latte_parts_problem(None, None, network)
    if problem is None and (mismatch := neural_prior_mismatch(read_json(network / "config.json"), bridge or {})):
        problem = f"{network}: {mismatch}"
    return problem


def is_of_another_kind(folder: Path, kind: BackboneFacts) -> bool:
    """Tell a model of another kind from one that is missing, damaged or not whole, by the classes that it names.

    Args:
        folder: The folder of a whole model.
        kind: Which model it should be.

    Returns:
        Whether the model or one of its parts says that it is another.
    """
    found = _json_or_nothing(folder / "model_index.json").get("_class_name", kind.title)
    return kind.title not in str(found) or any(is_another_part(folder / part, part, kind) for part in kind.parts)


def is_another_part(folder: Path, part: str, kind: BackboneFacts) -> bool:
    """Tell a component of another class from one that is missing or damaged.

    Args:
        folder: The folder of the component.
        part: Which component it should be, one of the kind's.
        kind: Which model it should be a part of.

    Returns:
        Whether it says that it is another.
    """
    config = _json_or_nothing(folder / ("scheduler_config.json" if part == "scheduler" else "config.json"))
    return bool(config) and config_problem(config, part, kind) is not None


def is_no_neural_prior(folder: Path) -> bool:
    """Tell a folder that holds something else than a neural prior from one that holds nothing, or a damaged one.

    Args:
        folder: As for `neural_prior_problem`.

    Returns:
        Whether the model that is found there says that it has no neural prior.
    """
    network = find_neural_prior(folder)
    if network is not None:
        stage = _json_or_nothing(network / "config.json").get("stage", "neural_prior")
        return stage != "neural_prior" or is_another_part(network, "neural_prior", LATTE_NEURAL_PRIOR)
    found = find_saved_model(folder)
    if found is None:
        return False
    index = _json_or_nothing(found / "model_index.json")
    return (found / LORA_INFO_FILE).is_file() or (bool(index) and index.get("neural_prior") in (None, [None, None]))


def read_vae_config(vae: Path) -> dict[str, Any]:
    """Read an autoencoder's configuration.

    Args:
        vae: Its folder.

    Returns:
        The configuration, with `VAE_DEFAULTS` for what it leaves out.

    Raises:
        ValueError: If it is missing or damaged; the message names it.
    """
    return VAE_DEFAULTS | read_json(vae / "config.json")


def read_latte_facts(vae: Path | None, network: Path) -> LatteFacts:
    """Read what a Latte model can be asked for off its configurations.

    Args:
        vae: Folder of the autoencoder; None stands for Stable Diffusion's, of compression 8.
        network: Folder of the transformer or of the neural prior.

    Returns:
        The facts.

    Raises:
        ValueError: If a configuration is missing, damaged or lacks a value; the message names it.
    """
    config = read_json(network / "config.json")
    levels = 4 if vae is None else len(read_vae_config(vae)["block_out_channels"])
    scale = 2 ** (levels - 1)
    try:
        return LatteFacts(
            num_frames=int(config["num_frames"]),
            height=int(config["sample_height"]) * scale,
            width=int(config["sample_width"]) * scale,
            num_classes=int(config["num_classes"]),
            class_names=tuple(config.get("class_names") or ()),
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{network / 'config.json'} is not as it was written; copy the model again") from None


def _json_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError:
        return {}
