"""The trainer: finetrainers' SFTTrainer with a loop that resumes exactly, on any number of processes.

finetrainers prepares models, parallelism, optimizer and precomputation. What is ours is what it gets wrong (see
docs/finetrainers.md): the order of the data and every random draw are computed from (seed, step, place in the update),
gradients are clipped once per update, validation uses the weights that are being trained and draws nothing from
training, and checkpoints are whole or not there. It averages the weights too, if asked to.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from finetrainers.config import TrainingType
from finetrainers.trainer import SFTTrainer
from peft import get_peft_model_state_dict
from torch.distributed.tensor import DTensor

from framebridge_plugin import signals
from framebridge_plugin.backbones.copying import link_tree, written_whole
from framebridge_plugin.backbones.manifest import step_folder
from framebridge_plugin.data import load_dataset_config
from framebridge_plugin.data.folders import common_clip_shape
from framebridge_plugin.errors import FinishedRunError, FrameBridgeError, UsageError, say
from framebridge_plugin.progress import Progress
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training.batches import TrainingBatches
from framebridge_plugin.training.checkpoints import Checkpointer, TrainingState
from framebridge_plugin.training.ema import WeightAverage
from framebridge_plugin.training.heartbeats import heartbeats_of
from framebridge_plugin.training.hub import make_repository, upload
from framebridge_plugin.training.loading import explained_reading_errors
from framebridge_plugin.training.metrics import MetricsLogger
from framebridge_plugin.training.objective import draw_index
from framebridge_plugin.training.precomputation.fingerprint import run_fingerprint
from framebridge_plugin.training.precomputation.store import LatentStore
from framebridge_plugin.training.rates import rate_schedule
from framebridge_plugin.training.refusals import refuse_unsupported
from framebridge_plugin.training.resume_settings import run_settings
from framebridge_plugin.training.run_identity import check_run, note_changes, write_run
from framebridge_plugin.training.specification import BridgeSpecification
from framebridge_plugin.training.stopping import StoppedReadingError, Stopping
from framebridge_plugin.training.trackers import OptionalTracker
from framebridge_plugin.training.validation import check_samples, validate


class FrameBridgeTrainer(SFTTrainer):
    """Trains a `BridgeSpecification`, in LoRA or full, on one process or many.

    `train_steps`, `lr_warmup_steps`, `checkpointing_steps`, `validation_steps` and `logging_steps` count updates; an
    update sees `batch_size * gradient_accumulation_steps` clips on every data-parallel rank.

    Args:
        args: finetrainers' arguments.
        model_specification: The model; `clip_shape` and `clip_rate` are set to those of the clips.
        on_prepared: Called once nothing more can refuse the run, before its first update.
        settings: What trackers show as the run's settings; by default finetrainers' arguments.
        allowed: Groups of settings (`settings.choices.ALLOWABLE`) in which a resume may differ from its checkpoint.

    Raises:
        UsageError: If the arguments ask for what does not work, or the specification is finetrainers' own.
    """

    model_specification: BridgeSpecification
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        args: Any,
        model_specification: BridgeSpecification,
        on_prepared: Callable[[], None] = lambda: None,
        settings: Mapping[str, Any] | None = None,
        allowed: Collection[str] = (),
    ) -> None:
        if not isinstance(model_specification, BridgeSpecification):
            raise UsageError(
                f"{type(model_specification).__name__}: FrameBridgeTrainer trains the specifications of this package; "
                "use finetrainers' SFTTrainer"
            )
        refuse_unsupported(args)
        args.seed = 42 if args.seed is None else args.seed
        args.resume_from_checkpoint = args.resume_from_checkpoint or "auto"
        # finetrainers takes init_timeout for the limit of every collective operation, and nccl_timeout for nothing.
        args.init_timeout = max(args.init_timeout, args.nccl_timeout)
        self.progress = TrainingState()
        self._on_prepared = on_prepared
        self._settings, self._allowed = settings, allowed
        self.average: WeightAverage | None = None
        self._store: LatentStore | None = None
        self._validation_samples: list[dict[str, Any]] = []
        self._validated = True
        super().__init__(args, model_specification)
        world_size, backend = self._data_world_size, self.state.parallel_backend
        self._stopping = Stopping(world_size, backend.device)
        self._beats = heartbeats_of(args, backend.rank, world_size)
        # The first update compiles kernels, and may take longer than others.
        self._reading_counts = False

    def run(self) -> None:
        """Trains, and uploads the result if that is wanted.

        Raises:
            FinishedRunError: If the model is trained and saved, but not validated at the end, or not uploaded.
        """
        super().run()
        if self.state.repo_id is not None:  # of the first process
            upload(self._output_dir / self._export_name, self.state.repo_id)
        if not self._validated:
            raise FinishedRunError(
                f"the final validation failed, see its traceback above; the model lies in {self.args.output_dir}"
            )

    # Preparation

    def _init_trackers(self) -> None:
        def start() -> Any:
            super(FrameBridgeTrainer, self)._init_trackers()
            return self.state.parallel_backend.tracker

        self.state.parallel_backend.tracker = OptionalTracker(start)

    def _get_training_info(self) -> dict[str, Any]:
        if self._settings is not None:
            return dict(self._settings)
        return super()._get_training_info()

    def _init_directories_and_repositories(self) -> None:
        args = self.args
        if self._is_main_process:
            self.state.output_dir = self._output_dir
            self.state.output_dir.mkdir(parents=True, exist_ok=True)
            if args.push_to_hub:
                name = args.hub_model_id or self.state.output_dir.name
                self.state.repo_id = make_repository(name, private=getattr(args, "private", True))

    def _prepare_models(self) -> None:
        # The data first: a network from scratch is made for the shape of its clips.
        self._datasets = load_dataset_config(self.args.dataset_config)
        self.model_specification.clip_shape = common_clip_shape(self._datasets)
        if self.args.precomputed is not None:
            fingerprint = run_fingerprint(self.args, self.model_specification, self._datasets)
            self._store = LatentStore(self.args.precomputed, fingerprint)
        super()._prepare_models()

    def _prepare_for_training(self) -> None:
        super()._prepare_for_training()
        # The torch optimizer without finetrainers' or accelerate's wrapper: the loop below needs neither.
        wrapper = self.optimizer
        self.optimizer = wrapper.optimizers[-1] if hasattr(wrapper, "optimizers") else wrapper.optimizer

    def _prepare_dataset(self) -> None:
        self._validation_samples = check_samples(self.args, self.model_specification, self._datasets)

    def _prepare_checkpointing(self) -> None:
        ours = self.args.framebridge_trainer
        settings = run_settings(self.args, self.model_specification, self._datasets)
        allowed = check_run(self._output_dir, settings, self._allowed)
        if ours.ema_decay > 0.0:
            self.average = WeightAverage(self.transformer, ours.ema_decay, ours.ema_start_step)
        self.checkpointer = Checkpointer(
            root=self._output_dir / "checkpoints",
            model=self.transformer,
            optimizer=self.optimizer,
            export=self._export,
            trainable_only=self._is_lora,
            limit=self.args.checkpointing_limit,
            settings=settings,
            allowed=allowed,
            average=self.average,
            network_name=self.model_specification.network_name,
            is_main_process=self._is_main_process,
        )
        self._resume()
        self.lr_scheduler = rate_schedule(self.args, self.optimizer, self.progress.step)
        if not self._is_lora and self._is_main_process:
            self.model_specification.keep_components(self._output_dir / "components")
        self._on_prepared()
        if self._is_main_process:
            write_run(self._output_dir, settings)

    def _resume(self) -> None:
        which, root = self.args.resume_from_checkpoint, self.checkpointer.root
        progress = self.checkpointer.resume(which)
        if progress is not None:
            self.progress = progress
            message = f"going on after update {progress.step}; to start anew, choose another checkpoints.output_dir"
        elif which == "latest":
            message = f"no checkpoint in {root}: starting at update 1"
        else:
            return
        if self._is_main_process:
            say(message)
            note_changes(self._output_dir, vars(self.progress), self.checkpointer.changes)

    def _export(self, folder: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Writes what sampling opens: a model folder, or LoRA layers."""
        if not self._is_lora:
            self.model_specification._save_model(
                str(folder / self._export_name), self.transformer, dict(state_dict), self.scheduler
            )
            return
        metadata = {
            "r": self.args.rank,
            "lora_alpha": self.args.lora_alpha,
            "init_lora_weights": True,
            "target_modules": self.args.target_modules,
        }
        self.model_specification._save_lora_weights(
            str(folder / self._export_name),
            get_peft_model_state_dict(self.transformer, dict(state_dict)),
            self.scheduler,
            {"lora_config": json.dumps(metadata)},
        )

    # Training

    def _train(self) -> None:
        backend = self.state.parallel_backend
        settings = f"```\n{json.dumps(self._get_training_info(), indent=2, default=str)}\n```"
        with (
            signals.deferred(),
            self._beats,
            MetricsLogger(
                self._output_dir, enabled=self._is_main_process, first_step=self.progress.step, settings=settings
            ) as metrics,
        ):
            checkpoint = self._train_to_the_end(metrics)
            if not self._stopping.agreed():
                self._publish(checkpoint)
                self._validated = self._validate(self.progress.step, metrics, final_validation=True)
            with self._beats.at_leisure("waiting for the last checkpoint"):
                backend.wait_for_everyone()
        backend.destroy()
        self._stopping.raise_if_stopped(self.progress.step, checkpoint)

    def _train_to_the_end(self, metrics: MetricsLogger) -> Path:
        """Makes the updates; returns the checkpoint of the last one."""
        args, backend, progress = self.args, self.state.parallel_backend, self.progress
        clips_per_update = args.batch_size * args.gradient_accumulation_steps * self._data_world_size
        self.transformer.train()
        batches = self._batches()
        self.model_specification.clip_rate = batches.clip_rate
        saved_step = progress.step or None
        progress_bar = Progress(
            args.train_steps, "Training", initial=progress.step, unit="update", disable=not backend.is_main_process
        )
        with explained_reading_errors(), progress_bar:
            while progress.step < args.train_steps and progress.samples_seen < args.max_data_samples:
                step, started = progress.step + 1, time.monotonic()
                learning_rate = float(self.optimizer.param_groups[0]["lr"])
                try:
                    loss, grad_norm = self._update(batches, step)
                except StoppedReadingError:
                    break
                self.checkpointer.mark_finite()
                self._reading_counts = not args.enable_precomputation
                progress.step = step
                progress.samples_seen += clips_per_update

                speed = clips_per_update / (time.monotonic() - started)
                progress_bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.2e}", clips_per_s=f"{speed:.2f}")
                progress_bar.update()
                if step % args.logging_steps == 0:
                    numbers = {
                        "loss": loss,
                        "grad_norm": grad_norm,
                        "lr": learning_rate,
                        "samples_per_second": speed,
                        "samples_seen": progress.samples_seen,
                        "bad_files": batches.bad_files.count(),
                    }
                    metrics.log(step, numbers)
                    backend.log(numbers, step=step)
                if args.checkpointing_steps > 0 and step % args.checkpointing_steps == 0:
                    self._save()
                    saved_step = step
                if args.validation_steps > 0 and step % args.validation_steps == 0 and step < args.train_steps:
                    self._validate(step, metrics)
                    self._stopping.agreed()
                if self._stopping.number is not None:
                    break
        signals.end_workers()
        if saved_step == progress.step:
            return step_folder(self.checkpointer.root, progress.step)
        return self._save() if progress.step else self.checkpointer.root

    def _save(self) -> Path:
        with self._beats.at_leisure("saving"):
            return self.checkpointer.save(self.progress)

    def _update(self, batches: TrainingBatches, step: int) -> tuple[float, float]:
        """Makes one update; returns its loss, and the norm of its gradient before clipping."""
        args = self.args
        loss = self._accumulate_gradients(batches, step)
        clips = step > args.framebridge_trainer.max_grad_norm_start_step
        parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm if clips else math.inf)
        grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FrameBridgeError(
                f"step {step}: the loss is {loss} and its gradient norm {grad_norm}; the update was not made. Resume "
                f"from the last checkpoint in {self.checkpointer.root} with a lower learning rate, or in float32"
            )
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step)
        return loss, grad_norm

    def _accumulate_gradients(self, batches: Iterator[tuple[dict, dict]], step: int) -> float:
        """Adds up the gradients of one update; returns the mean loss over its batches and all ranks."""
        args, device = self.args, self.state.parallel_backend.device
        total = torch.zeros((), device=device)
        for micro_step in range(args.gradient_accumulation_steps):
            self._beats.mark(f"reading clips for update {step}", counts=self._reading_counts)
            conditions, latents = next(batches)
            self._beats.mark(f"computing update {step}", counts=self._reading_counts)
            # The places in the update of this batch's samples, as `ClipStream` hands them out.
            first = micro_step * args.batch_size
            places = [(first + i) * self._data_world_size + self._data_rank for i in range(args.batch_size)]
            draws = [torch.Generator(device).manual_seed(derive_seed("draws", args.seed, step, p)) for p in places]
            # Dropout inside a network draws for a whole batch, from torch's global generator.
            torch.manual_seed(derive_seed("network", args.seed, step, places[0]))
            index = draw_index(self.scheduler, draws)
            with self.attention_provider_ctx(training=True):
                prediction, target = self.model_specification.loss_terms(
                    self.transformer, self.scheduler, conditions, latents, index, draws
                )
                loss = torch.nn.functional.mse_loss(prediction, target) / args.gradient_accumulation_steps
                loss.backward()
            total += loss.detach()
        return self._stopping.mean(total)

    def _batches(self) -> TrainingBatches:
        # _prepare_data hands this to the specification, which draws from the seeds of the samples instead.
        self.state.generator = torch.Generator(self.state.parallel_backend.device).manual_seed(self.args.seed)
        return TrainingBatches(
            self.args,
            self.model_specification,
            self._datasets,
            self._prepare_data,
            backend=self.state.parallel_backend,
            data_rank=self._data_rank,
            data_world_size=self._data_world_size,
            samples_seen=self.progress.samples_seen,
            store=self._store,
            # All ranks read the same number of clips; those of one update are read to its end.
            stop=self._stopping.agreed if self.args.enable_precomputation else None,
        )

    def _publish(self, checkpoint: Path) -> None:
        """Makes the last checkpoint's model the run's: <output_dir>/model or <output_dir>/lora."""
        if self._is_main_process:
            published = self._output_dir / self._export_name
            with written_whole(published) as partial:
                link_tree(checkpoint / self._export_name, partial)
        self.state.parallel_backend.wait_for_everyone()

    @property
    def _output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def _is_main_process(self) -> bool:
        return self.state.parallel_backend.is_main_process

    @property
    def _export_name(self) -> str:
        return "lora" if self._is_lora else "model"

    @property
    def _is_lora(self) -> bool:
        return self.args.training_type == TrainingType.LORA

    # Validation

    def _validate(self, step: int, metrics: MetricsLogger, final_validation: bool = False) -> bool:
        samples = self._validation_samples
        with self._beats.at_leisure("validating"):
            return not samples or validate(self, samples, step, metrics, final=final_validation)

    # Who reads which data

    @property
    def _data_world_size(self) -> int:
        return self.args.dp_degree * self.args.dp_shards

    @property
    def _data_rank(self) -> int:
        return self.state.parallel_backend.rank
