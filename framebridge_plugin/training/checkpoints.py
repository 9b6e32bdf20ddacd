"""Checkpoints that a killed run can be trusted to have: whole or not there at all, and no pickle in them.

    <output_dir>/checkpoints/step_000500/
        model/ or lora/             what `finetrainers sample` opens; with an average of the weights (EMA) the average
        trainer/weights.safetensors the weights in training (LoRA or EMA only: else they are the network's in model/)
        trainer/ema.safetensors     their average in float32 (EMA only)
        trainer/optimizer.safetensors
        trainer/state.json          step, samples seen, numbers of the optimizer, the settings that a resume compares

A checkpoint is written beside its final name and renamed when everything is on disk. Weights are gathered whole, so
that a run can be resumed with another number of processes.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from framebridge_plugin.backbones.folders import two_file_problem
from framebridge_plugin.errors import FrameBridgeError, first_line
from framebridge_plugin.training.ema import WeightAverage
from framebridge_plugin.training.resume_settings import (
    Groups,
    setting_differences,
    settings_refusal,
    tensors_difference,
)

_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass
class TrainingState:
    """The progress of a run: all that is not in the weights and the optimizer."""

    step: int = 0
    samples_seen: int = 0


@dataclass(kw_only=True)
class Checkpointer:
    """Saves and loads a run's checkpoints.

    Every method is called by all ranks together; rank 0 alone writes.
    """

    root: Path
    """The folder of all checkpoints."""
    model: torch.nn.Module
    """The network, sharded or not."""
    optimizer: torch.optim.Optimizer
    export: Callable[[Path, Mapping[str, torch.Tensor]], None]
    """Writes into a folder, out of the whole weights, what sampling opens; called on rank 0."""
    trainable_only: bool
    """Whether a checkpoint holds the trained parameters alone (LoRA)."""
    limit: int | None
    """How many checkpoints to keep; None for all."""
    settings: Groups
    """What a resumed run has in common with the stored one: see `run_settings`."""
    allowed: Collection[str] = ()
    """The groups of settings in which it may differ."""
    average: WeightAverage | None
    """The average of the weights, if the run has one; it is exported in their place."""
    network_name: str
    """Folder of the network in what `export` writes for a full fine-tune."""
    is_main_process: bool
    barrier: Callable[[], None]
    """Waits for all ranks."""

    def __post_init__(self) -> None:
        self.changes: dict[str, str] = {}
        """The groups in which the run does differ from the checkpoint that it goes on from, and what that has."""

    def save(self, state: TrainingState) -> Path:
        """Writes the checkpoint of a step and returns its folder; then removes the oldest beyond the limit."""
        weights: dict[str, Any] = get_model_state_dict(
            self.model,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.trainable_only),
        )
        optimizer_state = get_optimizer_state_dict(
            self.model, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        average = self.average.gather(keep=self.is_main_process) if self.average is not None else {}
        folder = self.root / f"step_{state.step:06d}"
        if self.is_main_process:
            partial = folder.with_name(f".{folder.name}.partial")
            try:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "trainer").mkdir(parents=True)
                self.export(partial, weights | {name: mean.to(weights[name].dtype) for name, mean in average.items()})
                if self._stores_weights:
                    save_file(_plain_tensors(weights), partial / "trainer" / "weights.safetensors")
                if average:
                    save_file(_plain_tensors(average), partial / "trainer" / "ema.safetensors")
                tensors: dict[str, torch.Tensor] = {}
                packed = _pack(optimizer_state, "optimizer", tensors)
                save_file(_plain_tensors(tensors), partial / "trainer" / "optimizer.safetensors")
                content = {
                    "step": state.step,
                    "samples_seen": state.samples_seen,
                    "optimizer": packed,
                    "settings": self.settings,
                }
                (partial / "trainer" / "state.json").write_text(json.dumps(content, default=float))
                _flush_to_disk(partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(partial, ignore_errors=True)
                raise FrameBridgeError(
                    f"cannot write checkpoint {folder}: {error}; free disk space or lower "
                    "checkpoints.checkpointing_limit, then resume from the last checkpoint"
                ) from error
            self._remove_oldest()
        self.barrier()
        return folder

    def resume(self, which: int | str) -> TrainingState | None:
        """Loads a step's checkpoint, or the last ("latest", "auto"); None if there is none at all."""
        if which in ("auto", "latest") and not _complete_checkpoints(self.root):
            return None
        return self.load(find_checkpoint(self.root, which))

    def load(self, folder: Path) -> TrainingState:
        """Restores weights, their average and the optimizer's moments; returns the progress.

        Learning rate, weight decay, betas and whatever else a parameter group says stay those of the run that resumes.
        """
        self.changes = check_settings(folder, stored_settings(folder), self.settings, self.allowed)
        try:
            content = json.loads((folder / "trainer" / "state.json").read_text())
            stored = self._read_weights(folder)
            # What is not stored would silently stay as it is in the fresh network.
            expected: dict[str, Any] = get_model_state_dict(
                self.model, options=StateDictOptions(ignore_frozen_params=self.trainable_only)
            )
            difference = tensors_difference(stored, expected)
            if difference is not None:
                raise ValueError(f"its weights are of another network: {difference}")
            set_model_state_dict(
                self.model, stored, options=StateDictOptions(full_state_dict=True, strict=not self.trainable_only)
            )
            if self.average is not None:
                self.average.load(load_file(folder / "trainer" / "ema.safetensors"))
            own = [
                copy.deepcopy({name: value for name, value in group.items() if name != "params"})
                for group in self.optimizer.param_groups
            ]
            # A fresh optimizer has no state yet: asking for it makes the tensors that the stored ones go into.
            live = get_optimizer_state_dict(self.model, self.optimizer)
            tensors = load_file(folder / "trainer" / "optimizer.safetensors")
            set_optimizer_state_dict(
                self.model,
                self.optimizer,
                _unpack(content["optimizer"], "optimizer", tensors, live),
                options=StateDictOptions(full_state_dict=True),
            )
            for group, values in zip(self.optimizer.param_groups, own, strict=True):  # other objects than before
                group.update(values)
            return TrainingState(step=content["step"], samples_seen=content["samples_seen"])
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise _cannot_resume(folder, error) from error

    @property
    def _stores_weights(self) -> bool:
        """Whether what is exported is not all that is trained, or not as it is trained."""
        return self.trainable_only or self.average is not None

    def _read_weights(self, folder: Path) -> dict[str, Any]:
        parts = folder / "trainer" if self._stores_weights else folder / "model" / self.network_name
        files = sorted(parts.glob("weights.safetensors" if self._stores_weights else "*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{parts} has no weights")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def _remove_oldest(self) -> None:
        if self.limit is None or self.limit <= 0:
            return
        found = _complete_checkpoints(self.root)
        for step in sorted(found)[: -self.limit]:
            shutil.rmtree(found[step], ignore_errors=True)


def find_checkpoint(root: Path, which: int | str) -> Path:
    """The folder in `root` of a step's checkpoint, or of the "latest"; it is complete, since it has its final name."""
    found = _complete_checkpoints(root)
    if which in ("auto", "latest"):
        if found:
            return found[max(found)]
    elif int(which) in found:
        return found[int(which)]
    available = ", ".join(map(str, sorted(found))) or "none"
    raise FrameBridgeError(
        f"no checkpoint {which!r} in {root} (steps there: {available}); give one of these steps as "
        "checkpoints.resume_from_checkpoint, or choose another checkpoints.output_dir to start anew"
    )


def stored_settings(folder: Path) -> Groups:
    """The `run_settings` that a checkpoint was trained with."""
    if (problem := two_file_problem(folder / "lora")) is not None:
        raise FrameBridgeError(
            f"cannot resume from {folder}, whose optimizer is of an earlier version; sample from its LoRA, "
            f"or merge it and begin a new run on that: {problem}"
        )
    try:
        return json.loads((folder / "trainer" / "state.json").read_text())["settings"]
    except (OSError, KeyError, ValueError) as error:
        raise _cannot_resume(folder, error) from error


def check_settings(folder: Path, stored: Groups, settings: Groups, allowed: Collection[str] = ()) -> dict[str, str]:
    """Refuses a run that would go on with the checkpoint in `folder` with other settings than are stored in it.

    What it differs in, of the groups that are allowed, is returned: the group, and what is stored.
    """
    changes = setting_differences(stored, settings)
    if (refusal := settings_refusal(changes, allowed)) is not None:
        raise FrameBridgeError(f"cannot resume from {folder}: {refusal}")
    return changes


def _complete_checkpoints(root: Path) -> dict[int, Path]:
    folders = root.iterdir() if root.is_dir() else ()
    return {int(match[1]): folder for folder in folders if (match := _FOLDER.fullmatch(folder.name))}


def _cannot_resume(folder: Path, reason: BaseException | str) -> FrameBridgeError:
    return FrameBridgeError(
        f"cannot resume from {folder}: {first_line(reason)}; resume with the settings of the run's recipe.yaml, or, "
        "if the folder is damaged, remove it to go on from the checkpoint before it"
    )


def _plain_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors refuses tensors that share memory or are views.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Turns an optimizer's state into what JSON can say; its tensors go into `tensors` under their paths.

    Quantised states (torchao's 8-bit AdamW) are tensor subclasses made of plain tensors, stored one by one.
    """
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if hasattr(value, "__tensor_flatten__"):
        parts, _ = value.__tensor_flatten__()
        tensors.update({f"{name}/{part}": getattr(value, part) for part in parts})
        return {"quantised": parts}
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    return value


def _unpack(packed: Any, name: str, tensors: Mapping[str, torch.Tensor], live: Any) -> Any:
    """The inverse of `_pack`; `live` is the present state, which knows the classes of quantised tensors."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "dict":
        present = live if isinstance(live, dict) else {}
        return {key: _unpack(item, f"{name}/{key}", tensors, present.get(key)) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_unpack(item, f"{name}/{i}", tensors, None) for i, item in enumerate(content)]
        return items if kind == "list" else tuple(items)
    if kind == "quantised":
        _, context = live.__tensor_flatten__()
        inner = {part: tensors[f"{name}/{part}"] for part in content}
        return type(live).__tensor_unflatten__(inner, context, live.size(), live.stride())
    return tensors[content]


def _flush_to_disk(folder: Path) -> None:
    """Asks the disk to have every file before the rename makes the checkpoint count."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
