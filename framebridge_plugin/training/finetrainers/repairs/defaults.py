"""Defaults of finetrainers' arguments with which it cannot run, or that it reports in place of what was given."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from framebridge_plugin.training.finetrainers.repairs import Repair


def _no_compile_scopes() -> bool:
    from finetrainers import BaseArgs

    return BaseArgs.compile_scopes is None


def _empty_compile_scopes() -> None:
    from finetrainers import BaseArgs

    BaseArgs.compile_scopes = []


def _parsed(config_class: Any, **values: Any) -> dict[str, Any]:
    """What one of finetrainers' configurations reports after it has been given these values."""
    config = config_class()
    config.map_args(argparse.Namespace(**values), argparse.Namespace())
    return config.to_dict()


def _default_rank_reported() -> bool:
    from finetrainers.trainer.sft_trainer import SFTLowRankConfig

    return _parsed(SFTLowRankConfig, rank=1, lora_alpha=1, target_modules=["x"])["rank"] != 1


def _report_the_given_rank() -> None:
    from finetrainers.trainer.control_trainer import ControlFullRankConfig, ControlLowRankConfig
    from finetrainers.trainer.sft_trainer import SFTLowRankConfig

    def repair(config_class: Any) -> None:
        original = config_class.map_args

        @functools.wraps(original)
        def map_args(self: Any, argparse_args: argparse.Namespace, mapped_args: Any) -> None:
            original(self, argparse_args, mapped_args)
            for name in self.to_dict():
                if hasattr(mapped_args, name):
                    setattr(self, name, getattr(mapped_args, name))

        config_class.map_args = map_args

    for config_class in (SFTLowRankConfig, ControlLowRankConfig, ControlFullRankConfig):
        repair(config_class)


REPAIRS = (
    Repair(
        "reported arguments",
        "gives trackers the LoRA's rank and alpha (and Control's settings), of which they are told the defaults",
        _default_rank_reported,
        _report_the_given_rank,
    ),
    Repair(
        "compile scopes",
        "makes the default of compile_scopes an empty list, because the trainer iterates over it and fails on None",
        _no_compile_scopes,
        _empty_compile_scopes,
    ),
)
