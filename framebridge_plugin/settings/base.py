"""What all groups of settings share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os.path import expanduser
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from framebridge_plugin.errors import UsageError
from framebridge_plugin.settings.checking import plain, unknown_name

PathText = Annotated[str, Field(min_length=1), AfterValidator(expanduser)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, types are strict, values are fixed once checked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    on_resume: ClassVar[tuple[str, Mapping[str, str]]]
    """The `resume_kind` of the settings that a section adds, and of those among them that have another."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others ("" for the section), and what is wrong with it."""
        yield from ()

    @classmethod
    def resume_kind(cls, name: str) -> str:
        """What a resumed run does with another value than its checkpoint has: ANEW if it takes it, REFUSED if it never
        does, or the name in ALLOWABLE by which a user asks for it.
        """
        sections = [part for part in cls.__mro__ if issubclass(part, Section)]
        others, own = next(part for part in sections if name in part.__dict__.get("__annotations__", ())).on_resume
        return own.get(name, others)


class CheckedSettings(Section):
    """Settings outside of a recipe, by name or in their order: the first that is wrong is a `UsageError` at once."""

    called: ClassVar[str] = ""
    """What an error calls them."""

    def __init__(self, *values: Any, **named: Any) -> None:
        where, known = f"{self.called}: " if self.called else "", list(type(self).model_fields)
        in_order = dict(zip(known, values, strict=False))
        if problem := unknown_name(named, known, "key"):
            raise UsageError(where + problem)
        if len(values) > len(known):
            raise UsageError(f"{where}{len(values)} values for {len(known)} settings; name them")
        if twice := in_order.keys() & named.keys():
            raise UsageError(f"{where}{min(twice)} is given twice, in its place and by its name; give it once")
        try:
            super().__init__(**{name: plain(value) for name, value in (in_order | named).items()})
        except ValidationError as failure:
            raise UsageError(where + self._problem(dict(failure.errors(include_url=False)[0]))) from failure
        for name, message in self.conflicts():
            raise UsageError(f"{where}{name}{': ' if name else ''}{message}")

    @staticmethod
    def _problem(error: dict[str, Any]) -> str:
        name = error["loc"][0]
        if error["type"] == "missing":
            return f"{name} is missing"
        return f"{name} is {error['input']!r}; it {error['msg'].removeprefix('Input ')}"
