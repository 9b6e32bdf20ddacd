"""A LoRA folder: is its file whole, what does it say of the model that it was trained on, and is that this one.

Needs the standard library alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.files import (
    Reader,
    links_problem,
    parse_json,
    read_json,
    safetensors_header,
    weights_problem,
)
from framebridge_plugin.backbones.fingerprint import component_fingerprint, first_difference
from framebridge_plugin.backbones.folders import LORA_FILE, LORA_INFO_FILE, two_file_problem
from framebridge_plugin.errors import FrameBridgeError

TARGETS_KEY = "target_modules"
"""In the header of a LoRA file: the layers as the recipe named them, in JSON, to be compared and not matched."""

_LAYER = re.compile(r"(\w+)\.([\w.]+)\.(lora_[AB]\.(?:weight|bias))")
_LONGEST_NAME, _MOST_LAYERS, _LARGEST_ALPHA = 300, 10_000, 1e6
HOW_TO_SAY_BASE = "--base, in Python base_model"
HOW_TO_ALLOW_BASE = "--allow-other-base, in Python allow_other_base=True"


@dataclass(frozen=True)
class LoraInfo:
    """What stands in a LoRA folder beside its layers.

    Attributes:
        pipeline_class: Name of the pipeline that the base model and the LoRA make together.
        network_name: The network that the layers are for, "transformer" or "neural_prior".
        base_model: Folder or hub id of the model that was fine-tuned.
        revision: Its commit on the hub; None for a folder.
        replaced_components: Folder or hub id of each component that did not come from it.
        replaced_revisions: The commits of those on the hub.
        fingerprint: That of each component's files, by its name; empty if it is not known.
        num_frames: Frames of the clips that it was trained on.
        height: Their height in pixels.
        width: Their width in pixels.
        fps: The rate at which they were seen, in frames per second; None if it is not known.
    """

    base_model: str
    pipeline_class: str = "FrameBridgeCogVideoXPipeline"
    network_name: str = "transformer"
    revision: str | None = None
    replaced_components: Mapping[str, str] = field(default_factory=dict)
    replaced_revisions: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None

    def write(self, folder: Path) -> None:
        """Write it into a LoRA folder."""
        (folder / LORA_INFO_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def without_places(self) -> LoraInfo:
        """The same with the name alone of each folder, whose place says where somebody keeps their models."""
        replaced = {part: _name_of(source) for part, source in self.replaced_components.items()}
        return replace(self, base_model=_name_of(self.base_model), replaced_components=replaced)

    def other_base_problem(self, folders: Mapping[str, Path]) -> str | None:
        """Where folders of components differ first from those that it was trained on, as far as it knows."""
        known = {part: files for part, files in self.fingerprint.items() if part in folders}
        return first_difference(known, {part: component_fingerprint(folders[part]) for part in known})


def _name_of(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() else source


def read_lora_info(folder: Path, read: Reader = read_json) -> LoraInfo:
    """What a LoRA folder says; a FrameBridgeError if it is not as it was written."""
    path = folder / LORA_INFO_FILE
    try:
        content = read(path)
        info = LoraInfo(**{name: content[name] for name in LoraInfo.__dataclass_fields__ if name in content})
        mappings = (info.replaced_components, info.replaced_revisions, info.fingerprint, *info.fingerprint.values())
        sources = (info.base_model, *info.replaced_components.values())
        if not all(isinstance(value, dict) for value in mappings) or not all(isinstance(n, str) for n in sources):
            raise TypeError
    except (ValueError, TypeError, AttributeError):
        raise FrameBridgeError(f"{path}: is not as it was written; copy the folder again") from None
    return info


def other_base_error(folder: Path, base: str, difference: str) -> str:
    """The line for a LoRA that is to be opened with another base model, `base`, than its own."""
    return (
        f"{base} is not the model that the LoRA {folder} was trained on: {difference}; say where that is "
        f"({HOW_TO_SAY_BASE}), or take this one all the same ({HOW_TO_ALLOW_BASE})"
    )


def lora_problem(folder: Path, facts: BackboneFacts) -> str | None:
    """What is wrong with the LoRA file of a folder that our trainer saved."""
    if (problem := two_file_problem(folder) or links_problem(folder)) is not None:
        return problem
    file, layer = folder / LORA_FILE, facts.input_projection
    if (problem := weights_problem(file)) is not None:
        return problem
    if layer is not None and f"{facts.network}.{layer}.lora_B.weight" not in (safetensors_header(file) or ()):
        return (
            f"{file} lacks the layer of {layer}, without which the network cannot see the image; take the folder as "
            "it was written"
        )
    try:
        adapter_settings(folder, facts.network)
    except FrameBridgeError as error:
        return str(error)
    return None


def adapter_settings(folder: Path, network: str) -> dict[str, Any]:
    """The arguments of peft's `LoraConfig` for the layers of a LoRA file; refuses a file with something else in it.

    They follow from its tensors. Of what it says itself only numbers are taken: patterns may be for ever in matching,
    and other settings name modules to import and files to read.
    """
    file = folder / LORA_FILE
    header = safetensors_header(file) or {}
    found: dict[str, dict[str, list[int]]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match = _LAYER.fullmatch(name) if len(name) < _LONGEST_NAME else None
        if match is None or match[1] != network:
            raise FrameBridgeError(f"{file} holds {name[:60]!r}, which is no layer of a LoRA for the {network}")
        found.setdefault(match[2], {})[match[3]] = entry["shape"]
    ranks = {layer: shapes["lora_A.weight"][0] for layer, shapes in found.items() if shapes.get("lora_A.weight")}
    if not ranks or ranks.keys() != found.keys() or len(ranks) > _MOST_LAYERS:
        raise FrameBridgeError(f"{file} holds no whole layers of a LoRA, or absurdly many; copy the folder again")
    said = _said_settings(header, network)
    rank, alphas = said.get("r"), said.get("alpha_pattern")
    rank = rank if rank in ranks.values() else max(ranks.values())
    alphas = alphas if isinstance(alphas, dict) else {}
    numbers = [said.get("lora_alpha", rank), *alphas.values()]
    are_numbers = all(type(number) in (int, float) and 0 <= number < _LARGEST_ALPHA for number in numbers)
    if not are_numbers or said.get("use_rslora") or said.get("use_dora"):
        raise FrameBridgeError(f"{file} has layers of another kind than this package writes; take one that it wrote")
    return {
        "r": rank,
        "lora_alpha": numbers[0],
        "target_modules": sorted(ranks),
        "rank_pattern": {layer: own for layer, own in ranks.items() if own != rank},
        "alpha_pattern": {layer: alphas[layer] for layer in ranks if layer in alphas},
        "lora_bias": any("lora_B.bias" in shapes for shapes in found.values()),
    }


def lora_settings(folder: Path, facts: BackboneFacts) -> dict[str, Any]:
    """`rank`, `lora_alpha` and `target_modules` that a LoRA's run had, if its file says them."""
    header = safetensors_header(folder / LORA_FILE) or {}
    said = _said_settings(header, facts.network)
    try:
        as_named = header["__metadata__"].get(TARGETS_KEY)  # not in files of an earlier version
        targets = said["target_modules"] if as_named is None else parse_json(as_named)
        if isinstance(targets, str):
            targets = [targets.removesuffix(f"|{facts.input_projection}")]
        names = sorted({*targets} - {facts.input_projection})
        return {"rank": said["r"], "lora_alpha": said["lora_alpha"], "target_modules": names}
    except (KeyError, TypeError, ValueError):
        return {}


def _said_settings(header: Mapping[str, Any], network: str) -> dict[str, Any]:
    """What a LoRA file says of its layers."""
    try:
        content = parse_json(header["__metadata__"]["lora_adapter_metadata"]).items()
        return {key.removeprefix(f"{network}."): value for key, value in content}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
