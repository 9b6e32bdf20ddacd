"""The arguments that this package adds to finetrainers' parser, and the strictness that it lacks."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from framebridge_plugin.backbones.starting import find_start
from framebridge_plugin.errors import UsageError
from framebridge_plugin.training.objective import ObjectiveSettings

if TYPE_CHECKING:
    from finetrainers import BaseArgs

_SWITCHES = {"snr_aligned": "snr_alignment", "image_noise": "image_noise", "prior_noise": "prior_noise"}
"""Field of `ObjectiveSettings` -> its flag, which has a form with `no_` in front."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What our trainer does and finetrainers' has no argument for; the recipe's section `framebridge` says it.

    Args:
        ema_decay: Decay d of the exponential moving average of the trained weights, in [0, 1); 0 for none.
        ema_start_step: Updates before the average starts; until then it equals the weights.
        max_grad_norm_start_step: Updates before gradients are clipped to `max_grad_norm`.
        dataloader_prefetch_factor: Clips that each reading process holds ready, at least 1.
        dataloader_timeout: Seconds to wait for a clip of a reading process before the run ends; 0 for ever.

    Raises:
        UsageError: If a value is out of range.
    """

    ema_decay: float = 0.0
    ema_start_step: int = 0
    max_grad_norm_start_step: int = 0
    dataloader_prefetch_factor: int = 2
    dataloader_timeout: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ema_decay < 1.0:
            raise UsageError(f"ema_decay={self.ema_decay}; use a number in [0, 1), 0 for no average")
        for name in ("ema_start_step", "max_grad_norm_start_step"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)}; use a number of updates, 0 or more")
        if self.dataloader_prefetch_factor < 1:
            raise UsageError(f"dataloader_prefetch_factor={self.dataloader_prefetch_factor}; use 1 or more")
        if self.dataloader_timeout < 0:
            raise UsageError(f"dataloader_timeout={self.dataloader_timeout}; use seconds, 0 for no limit")


class FrameBridgeArgs:
    """Our arguments, in the form of finetrainers' `ArgsConfigMixin`.

    They arrive as `args.framebridge_objective` (an `ObjectiveSettings`), `args.framebridge_trainer` (a
    `TrainerSettings`), `args.latte_size`, `args.neural_prior`, `args.start_from` and `args.precomputed`. What is not
    given takes the default of the model that `--model_name` names: `default_objective` and
    `default_trainer_settings` of its specification.
    """

    latte_size = "S/2"
    neural_prior: str | None = None
    precomputed: str | None = None
    start_from: str | None = None

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        """The settings that the command line parsed last does name."""
        self.objective = ObjectiveSettings()
        self.trainer = TrainerSettings()

    def add_args(self, parser: argparse.ArgumentParser) -> None:
        """Adds one argument for each field of `ObjectiveSettings` and `TrainerSettings`, and those of Latte.

        Args:
            parser: finetrainers' parser.
        """
        group = parser.add_argument_group("framebridge", "models *_bridge and *_neural_prior")
        for name, default in {**dataclasses.asdict(self.objective), **dataclasses.asdict(self.trainer)}.items():
            if name in _SWITCHES:
                group.add_argument(f"--{_SWITCHES[name]}", dest=name, action="store_true", default=None)
                group.add_argument(f"--no_{_SWITCHES[name]}", dest=name, action="store_false", default=None)
            else:
                group.add_argument(f"--{name}", type=type(default))
        group.add_argument("--latte_size", default=FrameBridgeArgs.latte_size, help="size and patch from scratch")
        group.add_argument("--neural_prior", help="folder of a latte_neural_prior run, or of its model")
        group.add_argument("--start_from", help="earlier run, model or LoRA whose weights this run begins with")
        group.add_argument("--precomputed", help="folder that `finetrainers precompute` wrote")

    def map_args(self, argparse_args: argparse.Namespace, mapped_args: BaseArgs) -> None:
        """Hands the parsed values over.

        Args:
            argparse_args: What the parser returned.
            mapped_args: finetrainers' arguments.

        Raises:
            UsageError: If a value is out of range.
        """
        self.given = {name: value for name, value in vars(argparse_args).items() if value is not None}
        specification = _specification_class(argparse_args.model_name, argparse_args.training_type)
        self.objective = self.over(getattr(specification, "default_objective", ObjectiveSettings()))
        self.trainer = self.over(getattr(specification, "default_trainer_settings", TrainerSettings()))
        self.latte_size, self.neural_prior = argparse_args.latte_size, argparse_args.neural_prior
        mapped_args.framebridge_objective = self.objective
        mapped_args.framebridge_trainer = self.trainer
        mapped_args.latte_size, mapped_args.neural_prior = self.latte_size, self.neural_prior
        self._map_start(argparse_args, mapped_args)
        mapped_args.precomputed = self.precomputed = argparse_args.precomputed

    def _map_start(self, argparse_args: argparse.Namespace, mapped_args: BaseArgs) -> None:
        """A whole model takes the place of `transformer_id`; a LoRA is left to the trainer, which loads its layers."""
        mapped_args.start_from = self.start_from = name = argparse_args.start_from
        if name is None:
            return
        from framebridge_plugin.backbones.saving import local_folder

        is_lora_run = argparse_args.training_type == "lora"
        if argparse_args.resume_from_checkpoint is not None and not is_lora_run and not os.path.isdir(name):
            return  # gone, and the checkpoint has all weights
        start = find_start(str(local_folder(name)))
        if start is None:
            raise UsageError(f"start_from: {name} holds no saved model or LoRA; give a run that has saved one")
        problem = start.kind_problem(argparse_args.model_name, argparse_args.training_type)
        if problem is None and not start.is_lora and argparse_args.transformer_id is not None:
            problem = "excludes transformer_id, which replaces the same weights; leave one of them out"
        if problem is not None:
            raise UsageError(f"start_from: {problem}")
        if start.is_lora:
            mapped_args.start_from = str(start.folder)
        else:
            mapped_args.transformer_id = str(start.network)

    def over(self, default: Any) -> Any:
        """Returns `default`, a dataclass of settings, with what the command line names in place of its values."""
        names = {field.name for field in dataclasses.fields(default)}
        return dataclasses.replace(default, **{name: self.given[name] for name in names & self.given.keys()})

    def validate_args(self, args: BaseArgs) -> None:
        """Does nothing: the settings check their values themselves."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the values that were parsed last, for finetrainers' trackers."""
        names = ("latte_size", "neural_prior", "precomputed", "start_from")
        others = {name: getattr(self, name) for name in names}
        return {**dataclasses.asdict(self.objective), **dataclasses.asdict(self.trainer), **others}


def _specification_class(model_name: str, training_type: str) -> type | None:
    from finetrainers.config import SUPPORTED_MODEL_CONFIGS

    return SUPPORTED_MODEL_CONFIGS.get(model_name, {}).get(training_type)


class StrictParsing:
    """Makes one parser of finetrainers' read `argv`, and raise where it would exit or put up with unknown flags.

    It is registered like a group of arguments, because `BaseArgs.parse_args` builds its parser itself and shows it
    to nobody else. It comes last, so that the parser is complete when it arrives here.

    Args:
        argv: Arguments without the program's name.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)

    def add_args(self, parser: argparse.ArgumentParser) -> None:
        """Changes how the parser reads and fails.

        Args:
            parser: finetrainers' parser.
        """
        parse_known_args = parser.parse_known_args

        def parse_strictly() -> tuple[argparse.Namespace, list[str]]:
            namespace, unknown = parse_known_args(self.argv)
            if unknown:
                flag = unknown[0].split("=")[0]
                nearest = difflib.get_close_matches(flag, list(parser._option_string_actions), n=1)
                _refuse(f"unknown argument {flag}" + (f"; the nearest is {nearest[0]}" if nearest else ""))
            return namespace, []

        parser.allow_abbrev = False
        parser.error = _refuse  # type: ignore[method-assign]
        parser.parse_known_args = parse_strictly  # type: ignore[method-assign,assignment]

    def map_args(self, argparse_args: argparse.Namespace, mapped_args: BaseArgs) -> None:
        """Does nothing."""

    def validate_args(self, args: BaseArgs) -> None:
        """Does nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}


def read_training_type(argv: Sequence[str], choices: Sequence[str]) -> str | None:
    """Finds the training type on a command line, which decides what other arguments there are.

    Args:
        argv: Arguments without the program's name.
        choices: Training types that there are.

    Returns:
        The training type, or None if the command line has none.

    Raises:
        UsageError: If it is another.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--training_type")
    parser.error = _refuse  # type: ignore[method-assign]
    training_type = parser.parse_known_args(list(argv))[0].training_type
    if training_type is not None and training_type not in choices:
        _refuse(f"--training_type {training_type}; use one of {', '.join(choices)}")
    return training_type


def _refuse(message: str) -> NoReturn:
    raise UsageError(" ".join(message.split()))
