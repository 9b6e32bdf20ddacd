"""The trainer: finetrainers' SFTTrainer, which prepares a run for a loop (`loop.py`) that resumes exactly.

finetrainers prepares models, parallelism, optimizer and precomputation. What is ours is what it gets wrong (see
docs/finetrainers.md): the order of the data and every random draw are computed from (seed, step, place in the update),
gradients are clipped once per update, validation uses the weights that are being trained and draws nothing from
training, and checkpoints are whole or not there. It averages the weights too, if asked to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from finetrainers import utils
from finetrainers.config import TrainingType
from finetrainers.trainer import SFTTrainer
from peft import get_peft_model_state_dict

from framebridge_plugin import signals
from framebridge_plugin.backbones.copying import link_tree, written_whole
from framebridge_plugin.backbones.placing import compile_blocks
from framebridge_plugin.data import load_bad_file_policy, load_dataset_config
from framebridge_plugin.data.folders import common_clip_shape
from framebridge_plugin.data.tables import read_json
from framebridge_plugin.errors import FinishedRunError, UsageError, say
from framebridge_plugin.processes import first_alone
from framebridge_plugin.training.batches import TrainingBatches
from framebridge_plugin.training.captions import Embedder, caption_cache, embed_ahead
from framebridge_plugin.training.checkpoints import Checkpointer, TrainingState
from framebridge_plugin.training.ema import WeightAverage
from framebridge_plugin.training.finetrainers.preparation import autocast_calls, prepared_as_said
from framebridge_plugin.training.heartbeats import heartbeats_of
from framebridge_plugin.training.heldout import HeldoutClips
from framebridge_plugin.training.hub import make_repository, upload
from framebridge_plugin.training.loop import TrainingLoop
from framebridge_plugin.training.metrics import MetricsLogger
from framebridge_plugin.training.optimizers import make_optimizer
from framebridge_plugin.training.precomputation.fingerprint import run_fingerprint
from framebridge_plugin.training.precomputation.store import LatentStore
from framebridge_plugin.training.rates import rate_schedule
from framebridge_plugin.training.refusals import refuse_unsupported
from framebridge_plugin.training.resume_settings import run_settings
from framebridge_plugin.training.run_identity import check_run, note_changes, write_run
from framebridge_plugin.training.specification import BridgeSpecification
from framebridge_plugin.training.stopping import Stopping
from framebridge_plugin.training.trackers import OptionalTracker
from framebridge_plugin.training.validation import check_heldout, check_samples, validate


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
        self.heldout: HeldoutClips | None = None
        self._validated = True
        self._embedded: dict[str, Any] = {}
        super().__init__(args, model_specification)
        world_size, backend = self.data_world_size, self.state.parallel_backend
        self.stopping = Stopping(world_size, backend.device)
        self.beats = heartbeats_of(args, backend.rank, world_size)

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
            self._store = first_alone(lambda: LatentStore(self.args.precomputed, fingerprint))
        super()._prepare_models()

    def _prepare_for_training(self) -> None:
        with prepared_as_said(self.args):
            super()._prepare_for_training()
        autocast_calls(self.transformer, self.args, self.state.parallel_backend.device)
        for scope in self.args.compile_scopes:
            compile_blocks(self.transformer) if scope == "regional" else self.transformer.compile()
        # In place of finetrainers', which is told to take torch's slowest path; it has no state yet.
        self.optimizer = make_optimizer(self.args, self.transformer)

    def _maybe_torch_compile(self) -> None:
        """Nothing, see `_prepare_for_training`: in the modules that finetrainers makes peft finds no LoRA layers."""

    def _prepare_dataset(self) -> None:
        self._validation_samples = check_samples(self.args, self.model_specification, self._datasets)
        content = read_json(Path(self.args.dataset_config))
        self._heldout_rows = check_heldout(content, self.model_specification, self._datasets)

    def _prepare_checkpointing(self) -> None:
        ours = self.args.framebridge_trainer
        settings = run_settings(self.args, self.model_specification, self._datasets)
        allowed = check_run(self._output_dir, settings, self._allowed)
        if ours.ema_decay > 0.0:
            self.average = WeightAverage(self.transformer, ours.ema_decay, ours.ema_start_step)
            share = self.average.share_of_start(self.args.train_steps)
            if share > 0.1 and self._is_main_process:
                say(
                    f"warning: framebridge.ema_decay: after {self.args.train_steps} updates the averaged weights, "
                    f"which are saved and sampled, still hold {share:.0%} of those before any: lower it, or leave the "
                    "first updates out by ema_start_step"
                )
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
            self.beats,
            MetricsLogger(
                self._output_dir, enabled=self._is_main_process, first_step=self.progress.step, settings=settings
            ) as metrics,
        ):
            batches = self._batches()
            self.model_specification.clip_rate = batches.clip_rate
            if self.heldout is not None:
                with self.beats.at_leisure("encoding held-out clips"):
                    self.heldout.encode(self)
                weights = "in training" if self.average is None else "average"
                metrics.log_text(self.progress.step, "heldout/clips", self.heldout.describe(weights))
                if self.progress.step == 0:
                    self.validate(0, metrics, samples=[])
            checkpoint = TrainingLoop(self, batches, metrics).run()
            if not self.stopping.agreed():
                self._publish(checkpoint)
                self._validated = self.validate(self.progress.step, metrics, final=True)
            with self.beats.at_leisure("waiting for the last checkpoint"):
                backend.wait_for_everyone()
        backend.destroy()
        self.stopping.raise_if_stopped(self.progress.step, checkpoint)

    def _embed_captions(self) -> None:
        """Embeds all captions, where they fit into memory, and does without what embeds them from there on."""
        specification, args = self.model_specification, self.args
        if specification.adapter.facts.condition != "text":
            return
        specification.captions = cache = caption_cache(args, specification, self.text_device)
        if args.enable_precomputation or self._stores_captions or not args.framebridge_trainer.caption_cache_gib:
            return
        clips = args.batch_size * args.gradient_accumulation_steps * self.data_world_size
        left = min((args.train_steps - self.progress.step) * clips, args.max_data_samples - self.progress.samples_seen)
        embed, wait = Embedder(specification, self.text_device, {}), self.state.parallel_backend.wait_for_everyone
        if embed_ahead(embed, cache, self._datasets, samples=left, wait=wait):
            self._embed_prompts(embed)
            embed.models = specification.condition_models = {}
            utils.free_memory()
        elif embed.models:  # else it was known what the empty caption is, and nothing has been loaded yet
            specification.condition_models = embed.models

    @property
    def _stores_captions(self) -> bool:
        return self._store is not None and "captions" in self._store.manifest.holds

    @property
    def text_device(self) -> torch.device:
        """Where the text encoder computes."""
        return torch.device(self.args.framebridge_trainer.text_encoder_device or self.state.parallel_backend.device)

    def embedded_prompts(self) -> dict[str, Any] | None:
        """The conditions of the validation's prompts and of the empty one; None for a model of classes."""
        if self.model_specification.adapter.facts.condition != "text":
            return None
        if not self._embedded:
            models = {name: getattr(self, name) for name in ("tokenizer", "text_encoder") if getattr(self, name)}
            models = models or dict(self.model_specification.condition_models or {})
            self._embed_prompts(Embedder(self.model_specification, self.text_device, models))
        return self._embedded

    def _embed_prompts(self, embed: Embedder) -> None:
        prompts = {"", *(str(sample["prompt"]) for sample in self._validation_samples)}
        prompts |= self.heldout.captions if self.heldout is not None else set()
        self._embedded = {prompt: embed(prompt) for prompt in sorted(prompts)}

    def _move_components_to_device(self, components: Any = None, device: Any = None) -> None:
        # The text encoder may have a device of its own.
        everything = [self.text_encoder, self.transformer, self.vae] if components is None else components
        others = [part for part in everything if part is not self.text_encoder]
        super()._move_components_to_device(others, device)
        if self.text_encoder is not None and len(others) < len(everything):
            super()._move_components_to_device([self.text_encoder], device or self.text_device)

    def _batches(self) -> TrainingBatches:
        if self._heldout_rows is not None:
            policy, share = load_bad_file_policy(self.args.dataset_config), (self.data_rank, self.data_world_size)
            self.heldout = HeldoutClips(*self._heldout_rows, policy, *share)
        self._embed_captions()
        # _prepare_data hands this to the specification, which draws from the seeds of the samples instead.
        self.state.generator = torch.Generator(self.state.parallel_backend.device).manual_seed(self.args.seed)
        return TrainingBatches(
            self.args,
            self.model_specification,
            self._datasets,
            self._prepare_data,
            backend=self.state.parallel_backend,
            data_rank=self.data_rank,
            data_world_size=self.data_world_size,
            samples_seen=self.progress.samples_seen,
            store=self._store,
            # All ranks read the same number of clips; those of one update are read to its end.
            stop=self.stopping.agreed if self.args.enable_precomputation else None,
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

    def validate(
        self,
        step: int,
        metrics: MetricsLogger,
        *,
        samples: list[dict[str, Any]] | None = None,
        final: bool = False,
    ) -> bool:
        """Measures the held-out loss and samples the validation set, or other `samples`.

        Returned is whether that went well, the same on every rank.
        """
        samples = self._validation_samples if samples is None else samples
        with self.beats.at_leisure("validating"):
            return not (samples or self.heldout) or validate(self, samples, step, metrics, final=final)

    # Who reads which data

    @property
    def data_world_size(self) -> int:
        """How many ranks read clips of their own."""
        return self.args.dp_degree * self.args.dp_shards

    @property
    def data_rank(self) -> int:
        """The place of this one among them."""
        return self.state.parallel_backend.rank
