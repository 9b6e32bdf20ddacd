"""The earlier run whose weights a new run begins with (`framebridge.start_from`): is it there, does it fit.

Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.files import safetensors_header
from framebridge_plugin.backbones.fingerprint import component_fingerprint, first_difference
from framebridge_plugin.backbones.folders import (
    LORA_FILE,
    LORA_INFO_FILE,
    backbone_of,
    find_saved_model,
    two_file_problem,
)
from framebridge_plugin.backbones.lora_folders import read_lora_info
from framebridge_plugin.backbones.manifest import step_folders
from framebridge_plugin.files import local_path


@dataclass(frozen=True)
class Start:
    """The folder of an earlier run's model or LoRA; of a run with an average of the weights (EMA), of the average."""

    folder: Path
    facts: BackboneFacts | None
    """Of what model; None if the folder does not say it."""

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA."""
        return (self.folder / LORA_INFO_FILE).is_file()

    @property
    def network(self) -> Path:
        """The folder of a whole model's network."""
        return self.folder / ("transformer" if self.facts is None else self.facts.network)

    def kind_problem(self, model_name: str, training_type: str) -> str | None:
        """Why a run of this model and training type cannot begin with it."""
        if (problem := two_file_problem(self.folder)) is not None:
            return problem
        if self.facts is None or self.facts.name != model_name:
            return f"{self.folder} is not from a run of {model_name}: give one that is"
        if self.is_lora and training_type != "lora":
            return (
                f"{self.folder} is a LoRA, and this run trains all weights: set training.training_type=lora, or merge "
                "it (from_pretrained, fuse_lora, unload_lora_weights, save_pretrained) and start from that folder"
            )
        file = self.folder / LORA_FILE
        if self.is_lora and file.is_file() and any(n.endswith(".lora_B.bias") for n in safetensors_header(file) or ()):
            return (
                f"{self.folder} has trained biases (it was converted from two files), and a run trains none: "
                "merge it (from_pretrained, fuse_lora, unload_lora_weights, save_pretrained) and take that folder as "
                "model.pretrained_model_name_or_path"
            )
        return None

    def parts_problem(self, folders: Mapping[str, Path]) -> str | None:
        """What differs between the components that it was trained with, and a LoRA's network, and those of a run."""
        if self.is_lora:
            difference = read_lora_info(self.folder).other_base_problem(folders)
            remedy = "take the model that it was trained on"
        else:
            own = {name: self.folder / name for name in folders if name != self.network.name}
            own = {name: folder for name, folder in own.items() if folder.is_dir()}
            there = {name: component_fingerprint(folder) for name, folder in own.items()}
            difference = first_difference(there, {name: component_fingerprint(folders[name]) for name in own})
            remedy = "take its own model as model.pretrained_model_name_or_path"
        return None if difference is None else f"{self.folder} was trained with another model: {difference}; {remedy}"


def goes_on(output_dir: str | Path, resume_from_checkpoint: int | str | None) -> bool:
    """Whether a run takes its weights from a checkpoint of its folder, be it ours or of finetrainers' own trainer."""
    if resume_from_checkpoint not in ("auto", "latest"):
        return resume_from_checkpoint is not None
    folder = Path(output_dir)
    return bool(step_folders(folder / "checkpoints")) or any(folder.glob("finetrainers_step_*"))


def find_start(name: str | None) -> Start | None:
    """What a run is to begin with: a run's, checkpoint's, model's or LoRA's folder; None for a hub id, or if it is
    none.
    """
    path = None if name is None else local_path(name)
    found = None if path is None else find_saved_model(path)
    return None if found is None else Start(found, backbone_of(found))
