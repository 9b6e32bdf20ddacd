"""Makes finetrainers importable and enters our models, objective and optimiser into its own tables."""

from __future__ import annotations

import argparse
import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from framebridge_plugin.backbones.facts import backbone_names
from framebridge_plugin.errors import UsageError, in_one_line
from framebridge_plugin.imports import without_collection
from framebridge_plugin.processes import process_count
from framebridge_plugin.settings.bridge import ObjectiveSettings
from framebridge_plugin.settings.finetrainers import OptimizationSection, PrecisionSection, TrainingSection
from framebridge_plugin.training.finetrainers.arguments import FrameBridgeArgs, backbone_defaults, fill_arguments
from framebridge_plugin.training.finetrainers.compat import apply_repairs
from framebridge_plugin.training.finetrainers.repairs.processes import change_arguments
from framebridge_plugin.training.optimizers import TORCHAO_OPTIMIZERS, optimizer_class

if TYPE_CHECKING:
    from finetrainers import BaseArgs

    from framebridge_plugin.recipe import Recipe

TRAINING_TYPES = ("lora", "full-finetune")
_SETTINGS_OF_RECIPES = (
    (PrecisionSection, "autocast"),
    (TrainingSection, "gradient_checkpointing_every"),
    (OptimizationSection, "stochastic_rounding"),
    (OptimizationSection, "offload_optimizer"),
)
"""Ours in finetrainers' sections; its parser has no options for them."""

_lock = threading.RLock()
_registered = False
_framebridge_args: FrameBridgeArgs | None = None


def register() -> None:
    """Makes `import finetrainers` work in this process and registers what this package adds to it.

    After it, finetrainers' tables and its argument parser know the names of all backbones (`cogvideox_bridge`, ...),
    our arguments and torchao's optimisers, and its training loop knows `FrameBridgeScheduler`. Programs
    that use finetrainers alone work as well. Calling it again does nothing.

    Raises:
        FrameBridgeError: If finetrainers cannot be imported.
    """
    global _registered
    with _lock:
        if _registered:
            return
        with without_collection():
            apply_repairs()
            # Set before the rest: what is imported below may itself call this function.
            _registered = True
            _register_specifications()
            _register_arguments()
            _register_optimizer()
            _register_scheduler()
            _register_trainable_parameters()
            _register_network_name()


# --- Model names and arguments ---


class LazySpecifications(Mapping[str, Any]):
    """Training type -> specification class of a backbone, imported when it is looked up: it imports finetrainers."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def __getitem__(self, training_type: str) -> Any:
        if training_type not in TRAINING_TYPES:
            raise KeyError(training_type)
        from framebridge_plugin.training.specifications import specification_of

        return specification_of(self._model_name)

    def __iter__(self) -> Iterator[str]:
        return iter(TRAINING_TYPES)

    def __len__(self) -> int:
        return len(TRAINING_TYPES)


def _register_specifications() -> None:
    from finetrainers.config import SUPPORTED_MODEL_CONFIGS

    for model_name in backbone_names():
        SUPPORTED_MODEL_CONFIGS[model_name] = LazySpecifications(model_name)


def _register_arguments() -> None:
    global _framebridge_args
    from finetrainers.args import BaseArgs

    ours = _framebridge_args = FrameBridgeArgs()
    original = BaseArgs.__init__

    @functools.wraps(original)
    def __init__(self: BaseArgs) -> None:
        original(self)
        self.register_args(ours)

    BaseArgs.__init__ = __init__
    ours.hand_over(BaseArgs, {})  # for arguments that neither a parser nor a recipe made
    for section, name in _SETTINGS_OF_RECIPES:
        setattr(BaseArgs, name, section.model_fields[name].default)
    change_arguments("_add_model_arguments", lambda parser: _add_choices(parser, "model_name", backbone_names()))
    change_arguments("_add_optimizer_arguments", lambda parser: _add_choices(parser, "optimizer", TORCHAO_OPTIMIZERS))


def parsed_objective(model_name: str) -> ObjectiveSettings:
    """The objective that the last command line asked for, else the backbone's default.

    A program such as finetrainers' own train.py hands none to the specification that it builds.
    """
    return parsed_arguments().over(ObjectiveSettings, backbone_defaults(model_name))


def parsed_arguments() -> FrameBridgeArgs:
    """Our arguments as the last parsed command line gave them; their defaults if none was parsed."""
    register()
    assert _framebridge_args is not None
    return _framebridge_args


def recipe_arguments(recipe: Recipe, dataset_config: str | Path, processes: int | None = None) -> Any:
    """Makes finetrainers' arguments of a checked recipe and the path of a dataset JSON, without its parser.

    The number of processes is that of those that were started, unless it is given.
    """
    register()
    from finetrainers import BaseArgs

    args: Any = BaseArgs()
    fill_arguments(args, recipe, str(dataset_config), processes or process_count())
    parsed_arguments().take(recipe.framebridge.model_dump(exclude={"data", "bad_files"}, exclude_none=True), args)
    return args


def _add_choices(parser: argparse.ArgumentParser, name: str, choices: Iterable[str]) -> None:
    for action in parser._actions:
        if action.dest == name:
            action.choices = [*(action.choices or ()), *choices]


# --- Optimiser ---


def _register_optimizer() -> None:
    module: Any = importlib.import_module("finetrainers.optimizer")
    original = module.get_optimizer

    @functools.wraps(original)
    def get_optimizer(parallel_backend: str, name: str, model_parts: list[torch.nn.Module], **settings: Any) -> Any:
        if name.lower() not in TORCHAO_OPTIMIZERS:
            return original(parallel_backend=parallel_backend, name=name, model_parts=model_parts, **settings)
        build = module.get_optimizer_ptd if parallel_backend == "ptd" else module.get_optimizer_accelerate
        return build(
            model_parts,
            optimizer_class(name.lower()),
            {
                "lr": settings["learning_rate"],
                "betas": (settings["beta1"], settings["beta2"]),
                "eps": settings["epsilon"],
                "weight_decay": settings["weight_decay"],
            },
        )

    module.get_optimizer = get_optimizer


# --- Scheduler ---


def get_scheduler_sigmas(scheduler: Any) -> torch.Tensor:
    """Returns index / N for every index of a `FrameBridgeScheduler`, float32 [N]."""
    count = scheduler.config.num_train_timesteps
    return torch.arange(count, dtype=torch.float32) / count


def get_scheduler_alphas(scheduler: Any) -> None:
    """Returns None: finetrainers uses these only to weight its own loss."""


def prepare_sigmas(
    scheduler: Any,
    sigmas: torch.Tensor,
    batch_size: int,
    num_train_timesteps: int,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    **flow_settings: Any,
) -> torch.Tensor:
    """Draws uniform indices of a `FrameBridgeScheduler`, over N: float32 [B]."""
    index_B = torch.randint(num_train_timesteps, (batch_size,), device=device, generator=generator)
    return sigmas[index_B]


def prepare_loss_weights(
    scheduler: Any, alphas: torch.Tensor | None = None, sigmas: torch.Tensor | None = None, **flow_settings: Any
) -> torch.Tensor:
    """Returns ones, float32 [B]: the bridge loss is not weighted."""
    assert sigmas is not None
    return torch.ones(len(sigmas), device=sigmas.device)


def _register_scheduler() -> None:
    from framebridge_plugin.schedulers import FrameBridgeScheduler

    for ours in (get_scheduler_sigmas, get_scheduler_alphas, prepare_sigmas, prepare_loss_weights):
        # The training loop looks these functions up in `finetrainers.utils`, which copies them from `.diffusion`.
        for name in ("finetrainers.utils", "finetrainers.utils.diffusion"):
            module = importlib.import_module(name)
            setattr(module, ours.__name__, _dispatch(FrameBridgeScheduler, ours, getattr(module, ours.__name__)))


def _dispatch(scheduler_class: type, ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def by_scheduler(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        return (ours if isinstance(scheduler, scheduler_class) else original)(scheduler, *args, **kwargs)

    return by_scheduler


# --- Trainable parameters ---


def add_lora_layers(specification: Any, network: Any, config: Any) -> None:
    """Adds LoRA layers to a network, as its specification completes them (`complete_lora_config`) if it does.

    UsageError if the network has no such layers.
    """
    complete = getattr(specification, "complete_lora_config", None)
    try:
        if complete is not None:
            complete(network, config)
        type(network).add_adapter(network, config)
    except ValueError as error:
        raise UsageError(f"lora.target_modules: {in_one_line(error)}") from error


def _register_trainable_parameters() -> None:
    """Asks a specification what it trains besides the LoRA layers named, and loads those of `start_from`."""
    from finetrainers.trainer import SFTTrainer

    from framebridge_plugin.training.starting import load_start

    original = SFTTrainer._prepare_trainable_parameters

    @functools.wraps(original)
    def prepare(self: SFTTrainer) -> None:
        specification = self.model_specification
        self.transformer.add_adapter = functools.partial(add_lora_layers, specification, self.transformer)
        try:
            original(self)
        finally:
            del self.transformer.add_adapter
        choose = getattr(specification, "prepare_trainable_parameters", None)
        if choose is not None:
            choose(self.transformer, self.args.training_type)
        load_start(self.args, specification, self.transformer)

    SFTTrainer._prepare_trainable_parameters = prepare


def _register_network_name() -> None:
    """Shows the stock trainer the trained network of a pipeline that has it under another name (`network_name`)."""
    from finetrainers.trainer import SFTTrainer

    original = SFTTrainer._init_pipeline

    @functools.wraps(original)
    def init_pipeline(self: SFTTrainer, final_validation: bool = False) -> Any:
        pipeline = original(self, final_validation)
        if self.transformer is None:
            # finetrainers knows only `transformer`; it puts the network in evaluation mode next.
            self.transformer = getattr(pipeline, self.model_specification.network_name)
        return pipeline

    SFTTrainer._init_pipeline = init_pipeline
