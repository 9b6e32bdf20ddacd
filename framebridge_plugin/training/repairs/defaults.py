"""Defaults of finetrainers' arguments with which it cannot run, where a program parses no command line."""

from __future__ import annotations

from framebridge_plugin.training.repairs import Repair


def _no_compile_scopes() -> bool:
    from finetrainers import BaseArgs

    return BaseArgs.compile_scopes is None


def _empty_compile_scopes() -> None:
    from finetrainers import BaseArgs

    BaseArgs.compile_scopes = []


REPAIRS = (
    Repair(
        "compile scopes",
        "makes the default of compile_scopes an empty list, because the trainer iterates over it and fails on None",
        _no_compile_scopes,
        _empty_compile_scopes,
    ),
)
