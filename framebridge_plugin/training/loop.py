"""The training loop: the updates of a run that its trainer has prepared."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from framebridge_plugin import signals
from framebridge_plugin.backbones.manifest import step_folder
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.progress import Progress
from framebridge_plugin.randomness import derive_seed, seed_global_generators
from framebridge_plugin.training.batches import TrainingBatches
from framebridge_plugin.training.loading import explained_reading_errors
from framebridge_plugin.training.metrics import MetricsLogger
from framebridge_plugin.training.objective import draw_index
from framebridge_plugin.training.stopping import StoppedReadingError

if TYPE_CHECKING:
    from framebridge_plugin.training.trainer import FrameBridgeTrainer


class TrainingLoop:
    """Trains what `trainer` has prepared on `batches`; saves, validates and logs on the way."""

    def __init__(self, trainer: FrameBridgeTrainer, batches: TrainingBatches, metrics: MetricsLogger) -> None:
        self._trainer, self._batches, self._metrics = trainer, batches, metrics
        self._args, self._backend, self._progress = trainer.args, trainer.state.parallel_backend, trainer.progress
        self._parameters = [p for p in trainer.transformer.parameters() if p.requires_grad]
        # The first update compiles kernels, and may take longer than others.
        self._reading_counts = False

    def run(self) -> Path:
        """Makes the updates; returns the checkpoint of the last one."""
        args, backend, progress, trainer = self._args, self._backend, self._progress, self._trainer
        clips_per_update = args.batch_size * args.gradient_accumulation_steps * trainer.data_world_size
        trainer.transformer.train()
        saved_step = progress.step or None
        progress_bar = Progress(
            args.train_steps, "Training", initial=progress.step, unit="update", disable=not backend.is_main_process
        )
        with explained_reading_errors(), progress_bar:
            while (
                trainer.stopping.number is None
                and progress.step < args.train_steps
                and progress.samples_seen < args.max_data_samples
            ):
                step, started = progress.step + 1, time.monotonic()
                learning_rate = float(trainer.optimizer.param_groups[0]["lr"])
                try:
                    loss, grad_norm = self._update(step)
                except StoppedReadingError:
                    break
                trainer.checkpointer.mark_finite()
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
                        "bad_files": self._batches.bad_files.count(),
                    }
                    self._metrics.log(step, numbers)
                    backend.log(numbers, step=step)
                if args.checkpointing_steps > 0 and step % args.checkpointing_steps == 0:
                    self._save()
                    saved_step = step
                if args.validation_steps > 0 and step % args.validation_steps == 0 and step < args.train_steps:
                    trainer.validate(step, self._metrics)
                    trainer.stopping.agreed()
        signals.end_workers()
        if saved_step == progress.step:
            return step_folder(trainer.checkpointer.root, progress.step)
        return self._save() if progress.step else trainer.checkpointer.root

    def _save(self) -> Path:
        with self._trainer.beats.at_leisure("saving"):
            return self._trainer.checkpointer.save(self._progress)

    def _update(self, step: int) -> tuple[float, float]:
        """Makes one update; returns its loss, and the norm of its gradient before clipping."""
        args, trainer = self._args, self._trainer
        loss = self._accumulate_gradients(step)
        clips = step > args.framebridge_trainer.max_grad_norm_start_step
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, args.max_grad_norm if clips else math.inf)
        grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FrameBridgeError(
                f"step {step}: the loss is {loss} and its gradient norm {grad_norm}; the update was not made. Resume "
                f"from the last checkpoint in {trainer.checkpointer.root} with a lower learning rate, or in float32"
            )
        # Replicas of a shard round alike.
        shard = trainer.data_rank % args.dp_shards
        trainer.optimizer.rounding_seed = derive_seed("rounding", args.seed, step, shard)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()
        if trainer.average is not None:
            trainer.average.update(step)
        return loss, grad_norm

    def _accumulate_gradients(self, step: int) -> float:
        """Adds up the gradients of one update; returns the mean loss over its batches and all ranks."""
        args, device, trainer = self._args, self._backend.device, self._trainer
        total = torch.zeros((), device=device)
        for micro_step in range(args.gradient_accumulation_steps):
            trainer.beats.mark(f"reading clips for update {step}", counts=self._reading_counts)
            conditions, latents = next(self._batches)
            trainer.beats.mark(f"computing update {step}", counts=self._reading_counts)
            # The places in the update of this batch's samples, as `ClipStream` hands them out.
            first = micro_step * args.batch_size
            places = [(first + i) * trainer.data_world_size + trainer.data_rank for i in range(args.batch_size)]
            draws = [torch.Generator(device).manual_seed(derive_seed("draws", args.seed, step, p)) for p in places]
            # Dropout inside a network draws for a whole batch, from torch's global generator.
            seed_global_generators(derive_seed("network", args.seed, step, places[0]), device)
            index = draw_index(trainer.scheduler, draws)
            with self._attention_providers():
                prediction, target = trainer.model_specification.loss_terms(
                    trainer.transformer, trainer.scheduler, conditions, latents, index, draws
                )
                loss = torch.nn.functional.mse_loss(prediction, target) / args.gradient_accumulation_steps
                loss.backward()
            total += loss.detach()
        return trainer.stopping.mean(total)

    def _attention_providers(self) -> contextlib.AbstractContextManager[None]:
        # finetrainers hooks every model anew each time, which takes as long as a third of a small network's update.
        if self._args.attn_provider_training:
            return self._trainer.attention_provider_ctx(training=True)
        return contextlib.nullcontext()
