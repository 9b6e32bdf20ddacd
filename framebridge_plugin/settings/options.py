"""Options of a command line out of settings: type, choices and help are those of the setting."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal

from pydantic.fields import FieldInfo

from framebridge_plugin.settings.base import Section


def add_options(
    parser: argparse._ActionsContainer,
    settings: type[Section],
    names: Mapping[str, str] | None = None,
    *,
    dashes: bool = False,
) -> None:
    """Adds an option for each setting; what is not given is None.

    Args:
        parser: Where to.
        settings: The settings.
        names: Options that have another name than their setting.
        dashes: Name them as this package's command does, `--num-frames`; else as finetrainers does, `--num_frames`,
            and each switch with `--no_` in front, too.
    """
    for name, field in settings.model_fields.items():
        option = (names or {}).get(name, name)
        option = option.replace("_", "-") if dashes else option
        kind, choices = _kind(field)
        if kind is bool:
            parser.add_argument(f"--{option}", dest=name, action="store_true", default=None, help=_help(field))
            if not dashes:
                parser.add_argument(f"--no_{option}", dest=name, action="store_false", default=None)
        else:
            parser.add_argument(f"--{option}", dest=name, type=kind, choices=choices, help=_help(field))


def _help(field: FieldInfo) -> str:
    return str(field.description).replace("%", "%%")


def _kind(field: FieldInfo) -> tuple[type, tuple[Any, ...] | None]:
    """The type of a setting, None being left out, and its choices if there are some alone."""
    annotation: Any = field.annotation
    while not isinstance(annotation, type):
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Literal:
            return type(arguments[0]), arguments
        is_union = origin in (UnionType, typing.Union)
        annotation = next(part for part in arguments if part is not type(None)) if is_union else arguments[0]
    return annotation, None
