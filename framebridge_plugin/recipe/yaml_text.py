"""YAML for recipes: duplicate keys and line numbers are kept, and `1e-5` is a number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from framebridge_plugin.errors import UsageError, escaped, in_one_line
from framebridge_plugin.files import whole_number

# YAML 1.1, which PyYAML reads, takes 1e-5 for a string; YAML 1.2 and every user take it for a number.
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
# It also takes 010 for eight, and 1:30 for ninety.
_DECIMAL = re.compile(r"[-+]?[0-9][0-9_]*$")


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # An alias can make a document endless, and a recipe has no use for one.
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not used in recipes", event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if _DECIMAL.match(node.value):
            return whole_number(node.value)
        if ":" in node.value:
            problem = f"{node.value} is no number: write it in decimals, or text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)  # 0x10, 0b10


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _DECIMAL, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


@dataclass(frozen=True)
class Document:
    """Plain data out of YAML, with the line of every key."""

    data: Any
    lines: dict[str, int]
    """Of every dotted path, from 1; list items included: `lora.target_modules.0`."""
    duplicates: list[tuple[str, int, int]]
    """Of every key that stands there twice: dotted path, second line, first line."""


def read_yaml(text: str) -> Document:
    """Reads one YAML document, an empty one as None; what is no YAML is a `UsageError` with the line."""
    lines: dict[str, int] = {}
    duplicates: list[tuple[str, int, int]] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else _read(loader, node, "", lines, duplicates)
    except yaml.MarkedYAMLError as error:
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"line {error.problem_mark.line + 1}: {what}" if error.problem_mark else what) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(in_one_line(error)) from None
    except RecursionError:
        raise UsageError("nested too deeply") from None
    return Document(data, lines, duplicates)


def _read(
    loader: _Loader, node: yaml.Node, path: str, lines: dict[str, int], duplicates: list[tuple[str, int, int]]
) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_read(loader, item, f"{path}.{i}", lines, duplicates) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"line {line}: a key must be a word")
        key = key_node.value
        key_path = f"{path}.{key}" if path else key
        if key in mapping:
            duplicates.append((key_path, line, lines[key_path]))
        lines.setdefault(key_path, line)
        mapping[key] = _read(loader, value_node, key_path, lines, duplicates)
    return mapping


def parse_value(text: str) -> Any:
    """The value of a command-line override, typed as in a recipe: `2e-5`, `true`, `[a, b]`, `null`."""
    return read_yaml(text).data


def dump_yaml(data: dict[str, Any]) -> str:
    """YAML in the order of `data`, which `read_yaml` reads back to the same values."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    if any(escaped(line) != line for line in text.split("\n")):  # then all but ASCII is escaped, in YAML's way
        text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110)
    return text
