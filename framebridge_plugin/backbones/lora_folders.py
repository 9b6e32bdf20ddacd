"""A LoRA folder: is its file whole, what does it say of the model that it was trained on, and is that this one.

Needs the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.files import Reader, links_problem, read_json, safetensors_header, weights_problem
from framebridge_plugin.backbones.fingerprint import component_fingerprint, first_difference
from framebridge_plugin.backbones.folders import LORA_FILE, LORA_INFO_FILE, two_file_problem
from framebridge_plugin.errors import FrameBridgeError

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

    def other_base_problem(self, folders: Mapping[str, Path]) -> str | None:
        """Where folders of components differ first from those that it was trained on, as far as it knows."""
        known = {part: files for part, files in self.fingerprint.items() if part in folders}
        return first_difference(known, {part: component_fingerprint(folders[part]) for part in known})


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
    names = safetensors_header(file) or {}
    if layer is not None and f"{facts.network}.{layer}.lora_B.weight" not in names:
        return (
            f"{file} lacks the layer of {layer}, without which the network cannot see the image; take the folder as "
            "it was written"
        )
    return None


def lora_settings(folder: Path, facts: BackboneFacts) -> dict[str, Any]:
    """`rank`, `lora_alpha` and `target_modules` (sorted names, or one expression) that a LoRA file says it has, if
    any.
    """
    header = safetensors_header(folder / LORA_FILE) or {}
    try:
        content = json.loads(header["__metadata__"]["lora_adapter_metadata"])
        settings = {key.partition(".")[2]: value for key, value in content.items()}
        targets = settings["target_modules"]
        if isinstance(targets, str):
            targets = [targets.removesuffix(f"|{facts.input_projection}")]
        names = sorted({*targets} - {facts.input_projection})
        return {"rank": settings["r"], "lora_alpha": settings["lora_alpha"], "target_modules": names}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
