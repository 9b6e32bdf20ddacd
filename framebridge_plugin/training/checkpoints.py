"""Checkpoints that a killed run can be trusted to have: whole or not there at all, and no pickle in them.

    <output_dir>/checkpoints/step_000500/
        model/ or lora/             what `finetrainers sample` opens; with an average of the weights (EMA) the average
        trainer/weights.safetensors the weights in training (LoRA or EMA only: else they are the network's in model/)
        trainer/ema.safetensors     their average in float32 (EMA only)
        trainer/optimizer.safetensors
        trainer/state.json          step, samples seen, numbers of the optimizer, the settings that a resume compares
        manifest.json               size and SHA-256 of every file, written last
        next_update_was_finite      an empty file, there once that is known

A checkpoint is written beside its final name and renamed when everything is on disk; what is older goes after that.
Tensors are gathered whole, one by one, so that a run can be resumed with another number of processes. What is read
is compared with the manifest while it is read; a checkpoint that is not as it was written is set aside, and the one
before it taken.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from framebridge_plugin.backbones.copying import remove_folder, sync, tidy, written_whole
from framebridge_plugin.backbones.manifest import (
    AVERAGE_FILE,
    WEIGHTS_FILE,
    DamagedError,
    Manifest,
    files_in,
    folder_problem,
    step_folder,
    step_folders,
    whole_checkpoints,
    write_manifest,
)
from framebridge_plugin.backbones.tensor_files import read_tensors, tensor_bytes, whole_tensor, write_tensors
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.processes import of_all_ranks, this_job
from framebridge_plugin.training.abandoned import remove_abandoned, set_aside
from framebridge_plugin.training.ema import WeightAverage
from framebridge_plugin.training.packing import pack, unpack
from framebridge_plugin.training.resume_settings import Groups, tensors_difference
from framebridge_plugin.training.stored_checkpoints import (
    NEWEST,
    STATE_FILE,
    cannot_resume,
    check_settings,
    damaged,
    find_checkpoints,
    read_state,
)

logger = logging.getLogger("finetrainers")

T = TypeVar("T")
_OPTIMIZER_FILE = "trainer/optimizer.safetensors"
_FINITE = "next_update_was_finite"
_REMEDY = "free disk space or lower checkpoints.checkpointing_limit, then resume from the last checkpoint"
_WENT_BACK = ".went_back"
"""Beside the checkpoints: the step that a job went back to, and the job. When it is started again, it goes on."""
_MARGIN = 64 << 20
"""Bytes that a save needs beside its tensors: small files, and what the file system takes for itself."""


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
    """How many checkpoints to keep, 2 or more; None for all."""
    settings: Groups
    """What a resumed run has in common with the stored one: see `run_settings`."""
    allowed: Collection[str] = ()
    """The groups of settings in which it may differ."""
    average: WeightAverage | None
    """The average of the weights, if the run has one; it is exported in their place."""
    network_name: str
    """Folder of the network in what `export` writes for a full fine-tune."""
    is_main_process: bool
    changes: dict[str, str] = field(default_factory=dict, init=False)
    """The groups in which the run does differ from the checkpoint that it goes on from, and what that has."""
    _unproven: Path | None = field(default=None, init=False)
    """The checkpoint whose next update is not made yet."""

    # Saving

    def save(self, state: TrainingState) -> Path:
        """Writes the checkpoint of a step and returns its folder; then removes the oldest beyond the limit.

        Ranks other than 0 return as soon as the last tensor is gathered: what they do next waits for rank 0 anyway.
        """
        started, folder = time.monotonic(), step_folder(self.root, state.step)
        # The live tensors: they are gathered and copied one by one, as they are written.
        weights: dict[str, Any] = get_model_state_dict(
            self.model, options=StateDictOptions(ignore_frozen_params=self.trainable_only)
        )
        averages = self.average.tensors if self.average is not None else {}
        tensors: dict[str, torch.Tensor] = {}
        packed = pack(get_optimizer_state_dict(self.model, self.optimizer), "optimizer", tensors)
        files: dict[str, Mapping[str, Any]] = {_OPTIMIZER_FILE: tensors}
        if self._stores_weights:
            files[WEIGHTS_FILE] = weights
        if averages:
            files[AVERAGE_FILE] = averages
        size = sum(map(tensor_bytes, (weights, *files.values())))
        if not self.is_main_process:
            self._gather_exported(weights, averages)
            for content in files.values():
                write_tensors(None, content)
            return folder
        self._check_room(size)
        try:
            with written_whole(folder) as partial:
                (partial / "trainer").mkdir()
                self.export(partial, self._gather_exported(weights, averages))
                facts = {name: write_tensors(partial / name, content) for name, content in files.items()}
                content = {
                    "step": state.step,
                    "samples_seen": state.samples_seen,
                    "optimizer": packed,
                    "settings": self.settings,
                }
                (partial / STATE_FILE).write_text(json.dumps(content, default=float))
                last = max((manifest.written for manifest in whole_checkpoints(self.root).values()), default=0)
                write_manifest(partial, facts, written=last + 1)
        except OSError as error:
            tidy(self.root)
            raise FrameBridgeError(f"cannot write checkpoint {folder}: {error}; {_REMEDY}") from error
        self._unproven = folder
        self._remove_oldest()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        logger.info(
            f"Saved {folder.name}: {size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s; main memory of this "
            f"process at most {peak:.1f} GiB so far"
        )
        if (free := shutil.disk_usage(self.root).free) < size + _MARGIN:
            logger.warning(
                f"The next checkpoint will not fit: it takes {size / 1e9:.2f} GB and {self.root} has "
                f"{free / 1e9:.2f} GB free"
            )
        return folder

    def mark_finite(self) -> None:
        """Notes that the update after the last checkpoint was finite: what that holds is no poison.

        The last checkpoint of which this is known is kept whatever the limit.
        """
        if self.is_main_process and self._unproven is not None:
            (self._unproven / _FINITE).touch()
            sync(self._unproven)
        self._unproven = None

    def _gather_exported(
        self, weights: Mapping[str, torch.Tensor], averages: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The weights that sampling takes, whole, in main memory; nothing on other ranks than 0."""
        exported = {}
        for name, tensor in weights.items():
            whole = whole_tensor(averages.get(name, tensor))
            if self.is_main_process:
                exported[name] = whole.cpu().to(tensor.dtype)
        return exported

    def _check_room(self, size: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < size + _MARGIN:
            raise FrameBridgeError(
                f"cannot write a checkpoint: it takes {(size + _MARGIN) / 1e6:,.0f} MB and {self.root} has "
                f"{free / 1e6:,.0f} MB free; {_REMEDY}"
            )

    def _remove_oldest(self) -> None:
        if self.limit is None:
            return
        found = list(whole_checkpoints(self.root))
        proven = next((folder for folder in found if (folder / _FINITE).exists()), None)
        for folder in found[self.limit :]:
            if folder != proven:
                remove_folder(folder)
        remove_abandoned(self.root.parent, max(self.limit - len(found), 0))

    # Resuming

    def resume(self, which: int | str | None) -> TrainingState | None:
        """Restores weights, their average and the optimizer's moments; returns the progress.

        Learning rate, weight decay, betas and whatever else a parameter group says stay those of the run that resumes.
        What came after the checkpoint, and what is not whole, is set aside: see `abandoned`.

        Args:
            which: A step, to which a job that is started again has gone back already; or "latest" or "auto", the one
                that was written last and is whole; or None, to start anew.

        Returns:
            The progress; None if there is no checkpoint at all.

        Raises:
            FrameBridgeError: If the step has no whole checkpoint, none of several is whole, or the checkpoint is of a
                run with other settings.
        """
        folders = self._from_main(lambda: self._to_try(which))
        found = self._load_best(folders, which) if which is not None and folders else None
        if found is None:
            self._from_main(lambda: self._leave(None, 0, which))
            return None
        folder, state = found
        self._from_main(lambda: self._leave(folder, state.step, which))
        self._unproven = None if (folder / _FINITE).exists() else folder
        return state

    def _load_best(self, folders: Sequence[Path], which: int | str) -> tuple[Path, TrainingState] | None:
        """Loads the first checkpoint that turns out whole; returns it, and its progress."""
        for folder in folders:
            try:
                return folder, self._load(folder)
            except DamagedError as error:
                if folder == folders[-1]:
                    raise damaged(folder, error, which) from error
                if self.is_main_process:
                    logger.warning(f"{error}: {folder.name} is set aside, and the checkpoint before it taken")
            except FrameBridgeError:
                raise
            except (KeyError, ValueError, RuntimeError) as error:
                raise cannot_resume(folder, error) from error
        return None

    def _to_try(self, which: int | str | None) -> list[Path]:
        if which is None:
            return []
        tidy(self.root)
        for folder in set(step_folders(self.root).values()) - set(whole_checkpoints(self.root)):
            logger.warning(f"{folder.name} is not whole: {folder_problem(folder)}")
        job, is_started_again = this_job()
        note = self.root / _WENT_BACK
        if is_started_again and note.is_file() and note.read_text() == f"{which} {job}":
            logger.info(f"This job went back to step {which} when it began: it goes on from its last checkpoint")
            which = "latest"
        return find_checkpoints(self.root, which)

    def _leave(self, folder: Path | None, step: int, which: int | str | None) -> None:
        """Sets aside what came after the checkpoint in `folder`, and what is not whole.

        The model that the run had come to is not its model any more: a checkpoint holds it, or it is set aside too.
        """
        whole = whole_checkpoints(self.root)
        last = 0 if folder is None else whole[folder].written
        others = sorted(step_folders(self.root).items(), reverse=True)
        later = [path for _, path in others if path not in whole or whole[path].written > last]
        results = [] if folder is None else self._results_of_no_checkpoint()
        aside = set_aside(self.root.parent, step, [*later, *results])
        if aside is not None and later:
            logger.info(f"What came after step {step} is in {aside}: {', '.join(path.name for path in later)}")
        if folder is not None and which not in NEWEST:
            (self.root / _WENT_BACK).write_text(f"{which} {this_job()[0]}")

    def _results_of_no_checkpoint(self) -> list[Path]:
        """Removes the run's `model` or `lora` if it is that of a checkpoint, and returns it if not."""
        kept = []
        for result in (self.root.parent / name for name in ("model", "lora")):
            exports = [folder / result.name for folder in step_folders(self.root).values()]
            if (files := files_in(result)) is not None and any(files_in(export) == files for export in exports):
                remove_folder(result)
            elif result.is_dir():
                kept.append(result)
        return kept

    def _load(self, folder: Path) -> TrainingState:
        manifest, content = self._together(lambda: read_state(folder))
        self.changes = check_settings(folder, content["settings"], self.settings, self.allowed)
        stored = self._together(lambda: self._read_weights(folder, manifest))
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
        del stored
        if self.average is not None:
            self.average.load(self._together(lambda: read_tensors(folder, AVERAGE_FILE, manifest)))
        tensors = self._together(lambda: read_tensors(folder, _OPTIMIZER_FILE, manifest))
        # A fresh optimizer has no state yet: asking for it makes the tensors that the stored ones go into.
        live = get_optimizer_state_dict(self.model, self.optimizer)
        restored = unpack(content["optimizer"], "optimizer", tensors, live)
        # What the optimizer is told stays as it is; before loading, which asks it where its tensors belong.
        restored["param_groups"] = live["param_groups"]
        set_optimizer_state_dict(self.model, self.optimizer, restored, options=StateDictOptions(full_state_dict=True))
        return TrainingState(step=content["step"], samples_seen=content["samples_seen"])

    def _read_weights(self, folder: Path, manifest: Manifest) -> dict[str, Any]:
        beginning = WEIGHTS_FILE if self._stores_weights else f"model/{self.network_name}/"
        files = [name for name in manifest.files if name.startswith(beginning) and name.endswith(".safetensors")]
        return {name: tensor for file in files for name, tensor in read_tensors(folder, file, manifest).items()}

    def _together(self, read: Callable[[], T]) -> T:
        """What every rank reads for itself; what one of them finds damaged is damaged for all."""
        result, problem = None, None
        try:
            result = read()
        except DamagedError as error:
            problem = str(error)
        problem = next(filter(None, of_all_ranks(problem)), None)
        if problem is not None:
            raise DamagedError(problem)
        return result  # type: ignore[return-value]

    def _from_main(self, work: Callable[[], T]) -> T:
        """What rank 0 does and finds, or fails with, on every rank."""
        result: Any = None
        if self.is_main_process:
            try:
                result = work()
            except FrameBridgeError as error:
                result = error
            except OSError as error:
                result = FrameBridgeError(f"{self.root}: {error}; see that the folder can be written into")
        result = of_all_ranks(result)[0]
        if isinstance(result, FrameBridgeError):
            raise result
        return result

    @property
    def _stores_weights(self) -> bool:
        """Whether what is exported is not all that is trained, or not as it is trained."""
        return self.trainable_only or self.average is not None
