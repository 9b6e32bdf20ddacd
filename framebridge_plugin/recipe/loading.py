"""Recipes: one YAML file is a whole run. Finding, reading, overriding and checking them.

Nothing here imports torch: a wrong recipe is refused in a second, with all of its errors at once.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from framebridge_plugin.errors import UsageError, masked
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.rules import launch_problems, recipe_problems
from framebridge_plugin.recipe.schema import Recipe
from framebridge_plugin.recipe.synonyms import synonym_of
from framebridge_plugin.recipe.yaml_text import Document, parse_value, read_yaml
from framebridge_plugin.settings.finetrainers import WITHOUT_EFFECT, has_no_effect

_LARGEST_RECIPE = 200_000  # bytes; more is some other file
_SHOWN = 20  # errors; more have one cause

# Stand-ins for required values that are missing, so that the other rules can still be checked and all errors
# come at once; whatever is said about a stand-in is not reported.
_STAND_INS: dict[str, Any] = {
    "model.pretrained_model_name_or_path": "owner/name",
    "training.training_type": "lora",
    "checkpoints.output_dir": "runs",
    "framebridge.data.num_frames": 1,
    "framebridge.data.height": 16,
    "framebridge.data.width": 16,
}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package."""
    package = Path(__file__).resolve().parents[1]
    # In the wheel they lie inside the package, in a checkout at the top of the repository.
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """The first comment line of a recipe."""
    first = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def find_recipe(name_or_path: str | Path) -> Path:
    """Find a recipe by its path, or by the name of one that is shipped.

    Args:
        name_or_path: A file, or a name such as `cogvideox_bridge`.

    Returns:
        The file.

    Raises:
        UsageError: If there is none.
    """
    path, shipped = Path(name_or_path).expanduser(), shipped_recipes()
    if path.is_file():
        return path
    name = str(name_or_path).removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    if path.exists():
        raise UsageError(f"--recipe {path}: is not a file")
    nearest = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"shipped are {', '.join(shipped)}"
    raise UsageError(f"--recipe {name_or_path}: no such file, nor a shipped recipe; {hint}")


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    *,
    needed: Callable[[str], bool] = lambda where: True,
) -> Recipe:
    """Read a recipe, apply overrides, and check the whole.

    Args:
        name_or_path: See `find_recipe`.
        overrides: `dotted.path=value` each, the value in YAML; a later one replaces an earlier one, and an empty
            value or `null` takes a key (or a whole section) away.
        environment: Environment variables of a launch (`os.environ`) to check the number of processes against;
            None leaves that out.
        needed: Whether the file or folder at a dotted path has to be there; all of them by default.

    Returns:
        The checked recipe.

    Raises:
        UsageError: With every error on a line of its own: file and line, dotted path, what is wrong, what to do.
    """
    recipe, problems = _examine(name_or_path, overrides, environment)
    problems = [problem for problem in problems if not problem.on_disk or needed(problem.where)]
    if recipe is None or problems:
        raise UsageError(*_first(problems))
    return recipe


def resolve_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[Recipe, list[str]]:
    """Read a recipe as `load_recipe` does, whether or not the files that it names and its processes are there yet.

    Args:
        name_or_path: See `find_recipe`.
        overrides: See `load_recipe`.
        environment: See `load_recipe`.

    Returns:
        The recipe, and a line for each file or folder that is missing, damaged or not writable, and for a number of
        processes that it is not for.

    Raises:
        UsageError: As `load_recipe`, if anything else is wrong.
    """
    recipe, problems = _examine(name_or_path, overrides, environment)
    lines = _first(problems)
    if recipe is None or not all(problem.on_disk for problem in problems):
        raise UsageError(*lines)
    return recipe, lines


def _first(problems: Sequence[Problem]) -> list[str]:
    lines, more = [problem.message for problem in problems[:_SHOWN]], len(problems) - _SHOWN
    return [*lines, f"and {more} more errors"] if more > 0 else lines


def _examine(
    name_or_path: str | Path, overrides: Sequence[str], environment: Mapping[str, str] | None
) -> tuple[Recipe | None, list[Problem]]:
    """The recipe as far as it can be read, and what is wrong with it, in the order of its lines; messages are whole
    lines.
    """
    path = find_recipe(name_or_path)
    document = _read(path)
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections")
    overridden = _apply(overrides, data)
    # A section whose keys are all commented out reads as null; one that is left out lacks its required keys.
    required = {name: None for name, field in Recipe.model_fields.items() if field.is_required()}
    data = {key: {} if value is None else value for key, value in (required | data).items()}
    _drop_defaults_without_effect(data)

    recipe, problems = _validate(data, lambda where: _line_of(document, overridden, where))
    problems += _secret_problems(data)
    reported = {problem.where for problem in problems} | {where for where, _, _ in document.duplicates}
    # Without the model's name, which most of the rules depend on, they would be those of another model.
    if recipe is not None and not reported & {"model", "model.model_name"}:
        launched = launch_problems(recipe, environment) if environment is not None else ()
        rules = [*recipe_problems(recipe), *(problem._replace(on_disk=True) for problem in launched)]
        problems += [problem for problem in rules if not _is_within(problem.where, reported)]
    found = [(_line_of(document, overridden, problem.where), *problem) for problem in problems]
    found += [
        (line, where, f"stands here again, after line {first}", False) for where, line, first in document.duplicates
    ]
    return recipe, [
        Problem(where, f"{f'{path}:{line}' if line else 'command line'}: {where}: {message}", on_disk)
        for line, where, message, on_disk in sorted(set(found))
    ]


def _secret_problems(data: Any, where: str = "") -> Iterator[Problem]:
    """Finds tokens and passwords, which a recipe would carry into the run's folder and to its trackers."""
    if isinstance(data, dict | list):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _secret_problems(value, f"{where}.{name}" if where else str(name))
    elif isinstance(data, str) and masked(data) != data:
        remedy = "log in by `hf auth login` or `wandb login`, or set HF_TOKEN or WANDB_API_KEY"
        yield Problem(where, f"holds a token or a password: remove it; {remedy}")


def _is_within(where: str, paths: Iterable[str]) -> bool:
    return any(where == path or where.startswith(f"{path}.") for path in paths)


def _read(path: Path) -> Document:
    if path.stat().st_size > _LARGEST_RECIPE:
        raise UsageError(f"{path}: too large for a recipe")
    try:
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not a text file") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _apply(overrides: Sequence[str], data: dict[str, Any]) -> set[str]:
    """Put overrides into `data`; return their dotted paths."""
    paths = set()
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", path):
            raise UsageError(f"{override!r}: an override is dotted.path=value, such as optimization.lr=2e-5")
        try:
            value = parse_value(text)
        except UsageError as error:
            raise UsageError(f"command line: {path}: {text!r} cannot be read ({error})") from None
        *parents, last = path.split(".")
        section = data
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UsageError(f"command line: {path}: {parent} is {section!r}, not a section with keys of its own")
        section[last] = value
        paths.add(path)
    return paths


def _drop_defaults_without_effect(data: dict[str, Any]) -> None:
    """Takes away what the recipe of an older run says of finetrainers, and which changes nothing."""
    for section in (*data.values(), data):
        for name in list(section) if isinstance(section, dict) else ():
            if has_no_effect(name, section[name]):
                del section[name]


def _validate(data: dict[str, Any], line_of: Callable[[str], int]) -> tuple[Recipe | None, list[Problem]]:
    """Check the single values; the recipe that comes back with problems lacks the wrong ones."""
    try:
        return Recipe.model_validate(data), []
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
    errors.sort(key=lambda error: (line_of(_dotted(error["loc"])), _dotted(error["loc"])))
    # What is meant by a key takes a while to find, and is shown for the first ones.
    problems = [Problem(_dotted(e["loc"]), _message(dict(e), hint=n < _SHOWN)) for n, e in enumerate(errors)]
    repaired = copy.deepcopy(data)
    for error in errors:
        _take_away(repaired, error["loc"])
    for path, value in _STAND_INS.items():
        if _is_within(path, [problem.where for problem in problems]):
            _insert(repaired, path, value)
    try:
        return Recipe.model_validate(repaired), problems
    except ValidationError:
        return None, problems


def _take_away(data: Any, location: tuple[int | str, ...]) -> None:
    # A wrong list item takes the whole list away.
    keys = list(itertools.takewhile(lambda key: isinstance(key, str), location))
    for key in keys[:-1]:
        data = data.get(key) if isinstance(data, dict) else None
    if isinstance(data, dict) and keys:
        data.pop(keys[-1], None)


def _insert(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
    data.setdefault(last, value)


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))


def _message(error: dict[str, Any], *, hint: bool) -> str:
    path, kind, value = _dotted(error["loc"]), error["type"], error.get("input")
    if kind == "extra_forbidden":
        if (found := WITHOUT_EFFECT.get(path.rpartition(".")[2])) is not None:
            return f"finetrainers has it, and here it has no effect: {found[1]}; remove it"
        return f"unknown key; {_hint(path)}" if hint else "unknown key"
    if kind == "missing":
        return "is required"
    if kind in ("model_type", "model_attributes_type"):
        return f"should be a section with keys of its own, not {value!r}"
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    text = f"{text}, not {value!r}" if len(repr(value)) < 100 and repr(value) not in text else text
    if kind == "literal_error" and isinstance(value, str):
        nearest = difflib.get_close_matches(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]), n=1, cutoff=0.4)
        text += f"; did you mean {nearest[0]}?" if nearest else ""
    if isinstance(value, str) and kind in ("int_type", "float_type", "bool_type"):
        text += " (without quotes)" if _parses_as(value, kind) else ""
    if kind == "string_type" and isinstance(value, int | float):
        text += " (put it in quotes)"
    return text


def _parses_as(text: str, kind: str) -> bool:
    try:
        return type(parse_value(text)).__name__ in (kind.removesuffix("_type"), "int")
    except UsageError:
        return False


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted path that a recipe knows, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from _keys(option, f"{prefix}{name}.")


def _hint(path: str) -> str:
    """The key that is meant by one that there is not, else those of its section."""
    known = list(_keys(Recipe))
    parent, _, name = path.rpartition(".")
    same_name = [key for key in known if key.rpartition(".")[2] == name.lower()]  # in the wrong section
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    meant = [*same_name, *filter(None, [synonym_of(name)])]
    for keys, cutoff in ((siblings, 0.6), ({key.rpartition(".")[2]: key for key in reversed(known)}, 0.75)):
        meant += [keys[match] for match in difflib.get_close_matches(name, keys, n=1, cutoff=cutoff)]
    return f"the nearest is {meant[0]}" if meant else f"{parent or 'a recipe'} has {', '.join(siblings)}"


def _line_of(document: Document, overridden: set[str], where: str) -> int:
    """The line of a dotted path, 0 for the command line."""
    if _is_within(where, overridden) or any(_is_within(key, [where]) for key in overridden):
        return 0
    # What is missing has no line of its own: take its section's.
    parts = where.split(".")
    candidates = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((document.lines[key] for key in candidates if key in document.lines), 1)
