"""Arguments are checked against the types that their signature names, in one line; the standard library alone.

Sampling needs no pydantic by it. A number is never a boolean, a whole number never a float, and none is infinite or
not a number; scalars of numpy and torch become Python's own.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.settings.choices import Range

CallT = TypeVar("CallT", bound=Callable[..., Any])

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    dict: "a dictionary",
    Callable: "a function",
}


def plain(value: Any) -> Any:
    """A value whose scalars of numpy and torch, in lists and tuples too, are Python's own."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def check_values(where: str, kinds: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with plain scalars; refuses the first that is not of its kind, an annotation."""
    checked = {}
    for name, value in values.items():
        checked[name] = plain(value)
        if name in kinds and not _fits(kinds[name], checked[name]):
            raise FrameBridgeError(f"{where}: {name} is {_short(value)}; it should be {_words(kinds[name])}")
    return checked


def checked(function: CallT) -> CallT:
    """Decorates a method: its arguments are bound, checked and made plain before it runs."""
    signature = inspect.signature(function)
    rest = next((name for name, taken in signature.parameters.items() if taken.kind is taken.VAR_KEYWORD), None)

    @functools.cache
    def kinds() -> dict[str, Any]:
        return typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        where = type(self).__name__
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            problem = unknown_name(kwargs, signature.parameters) or str(error)
            raise FrameBridgeError(f"{where}: {problem}") from None
        _, *names = bound.arguments
        values = check_values(where, kinds(), {name: bound.arguments[name] for name in names})
        # By name: diffusers takes what is given by its place for a default, which a config leaves out.
        further = {} if rest is None else values.pop(rest, {})
        return function(self, **values, **further)

    return typing.cast(CallT, call)


def unknown_name(given: Iterable[str], known: Collection[str], what: str = "argument") -> str | None:
    """What is wrong with the first of some names that is none of the known ones, with the nearest."""
    name = next((name for name in given if name not in known), None)
    if name is None:
        return None
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted({*known} - {'self'}))}"
    return f"unknown {what} {name!r}; {hint}"


def _fits(kind: Any, value: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is Annotated:
        return not isinstance(parts[1], Range) or (_fits(parts[0], value) and value in parts[1])
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is int:
        return type(value) is int
    if not isinstance(value, origin or kind) or (isinstance(value, str) and kind is not str):
        return False
    if origin is dict:
        return all(_fits(parts[1], item) for item in value.values())
    return origin not in (list, Sequence) or all(_fits(parts[0], item) for item in value)


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType, Literal):
        words = [repr(part) if origin is Literal else _words(part) for part in parts if part is not NoneType]
        return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    if origin is Annotated:
        return f"{_words(parts[0])}, {parts[1]}"
    if origin in (list, Sequence):
        return f"a list of {_words(parts[0]).removeprefix('a ')}s"
    found = origin or kind
    return _WORDS.get(found, f"a {found.__module__}.{found.__name__}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
