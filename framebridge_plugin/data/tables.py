"""Every text that a user writes, one reader for each kind: tables, lists, captions, JSON; standard library alone.

Checks and loaders call the same functions, so that what the one takes the other does not refuse. All is UTF-8, with or
without a byte order mark; a line ends at LF, CRLF or CR and nowhere else.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import check_depth, check_within, open_regular, whole_number

WEBVID_COLUMNS = ("videoid", "contentUrl", "duration", "page_dir", "name")
OPTIONAL_WEBVID_COLUMNS = ("contentUrl", "duration", "page_dir")

MAX_FILE_BYTES, MAX_TEXT, MAX_LINE = 2**32, 2**28, 2**20
"""Bytes of a table or list, which is read line by line; characters of a text that is read whole, and of a line."""

_BLOCK_ROWS = 16_384
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_LINE_END = re.compile(rb"\r\n|\r|\n")


class TextError(FrameBridgeError):
    """A text file that cannot be read as what it should be; the message has the file, the line and the remedy."""


def csv_files(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The CSV files of a table, absolute, out of a file, a folder of them, a pattern, or several; at least one."""
    files: list[Path] = []
    for item in [given] if isinstance(given, str | os.PathLike) else given:
        path = Path(item).expanduser().absolute()
        if path.is_file():
            files.append(path)
            continue
        if path.is_dir():
            folder, names = path, sorted(name for name in os.listdir(path) if name.lower().endswith(".csv"))
            found = [path / name for name in names if not name.startswith(".")]
        else:
            folder = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
            found = sorted(map(Path, glob.glob(str(path))))
        if not found:
            raise FrameBridgeError(f"no such file: {path}; give a .csv file, a folder of them, or a pattern")
        for file in found:
            check_within(file, folder)
        files += found
    return files


def read_table(
    path: Path, columns: Sequence[str | Sequence[str]], optional: Collection[str] = ()
) -> Iterator[list[list[str]]]:
    """Read columns of a CSV file as text, in blocks: for each wanted column the list of its cells.

    A column may have several names, of which the first that the table has counts; one in `optional` need not be there,
    and has "" in its cells then. `TextError` if it is no such table.
    """
    rows = table_rows(path)
    _, header = next(rows, (1, []))
    choices = [(names,) if isinstance(names, str) else names for names in columns]
    places = _find_columns(path, header, choices, optional)
    cells: list[list[str]] = [[] for _ in places]
    # Few at a time: of many lists alive at once the garbage collector would make half of the work.
    while block := [row for _, row in islice(rows, 256)]:
        columns = list(zip(*block, strict=True))
        for column, place in zip(cells, places, strict=True):
            column += [""] * len(block) if place is None else columns[place]
        if len(cells[0]) >= _BLOCK_ROWS:
            yield cells
            cells = [[] for _ in places]
    if cells[0]:
        yield cells


def table_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file that have any text, the header first: the line of each, and as many cells as it has."""
    line, width = 1, 0
    try:
        with _opened(path, "CSV table", newline="") as file:
            reader = csv.reader(_checked(path, file), strict=True)
            for row in reader:
                if row and (row[0].strip() or "".join(row).strip()):
                    width = width or len(row)
                    if len(row) != width:
                        problem = f"it has {len(row)} cells, the first row {width}"
                        raise _unreadable(path, line, f"{problem}; put a cell that holds a comma in quotes")
                    yield line, row
                line = reader.line_num + 1
    except csv.Error as error:
        # "unexpected end of data", "',' expected after '\"'", "field larger than field limit": of one cause.
        problem = "a quote opens a cell and does not close it where the cell ends; close it, or double it"
        raise _unreadable(path, line, problem) from error


@contextlib.contextmanager
def _opened(path: Path, what: str = "text file", newline: str | None = None) -> Iterator[TextIO]:
    """A text file to be read within the block, whose errors become those of `FrameBridgeError`."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline=newline) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise TextError(f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB; divide it")
            yield file
    except UnicodeDecodeError as error:
        raise _unreadable(path, *_not_utf8(path), what) from error
    except OSError as error:
        raise FrameBridgeError(f"{path} cannot be read: {error.strerror}") from error


def _blocks(path: Path, file: TextIO, what: str = "text file") -> Iterator[tuple[int, list[str]]]:
    """Passes lines on, many at a time, with the number of the first; none is too long or holds a NUL."""
    number = 1
    while block := file.read(1 << 16):
        block += file.readline(MAX_LINE)
        lines = io.StringIO(block, newline="").readlines()
        for line, text in enumerate(lines, number) if "\0" in block or len(block) >= MAX_LINE else ():
            if "\0" in text:
                raise _unreadable(path, line, _NUL, what)
            if len(text) >= MAX_LINE:
                raise _unreadable(path, line, f"it has more than {MAX_LINE} characters", what)
        yield number, lines
        number += len(lines)


def _checked(path: Path, file: TextIO) -> Iterator[str]:
    """Passes lines on, of which none holds what a CSV reader takes without a word and reads wrongly."""
    for number, lines in _blocks(path, file, "CSV table"):
        if _SPACE_BEFORE_QUOTE.search("".join(lines)):
            for line, text in enumerate(lines, number):
                if _SPACE_BEFORE_QUOTE.search(text):
                    raise _unreadable(path, line, "a space stands between a comma and a quote; remove it")
        yield from lines


# Within quotes a quote is doubled, or the last of its cell.
_SPACE_BEFORE_QUOTE = re.compile(r', "(?!["\r\n,]|\Z)')
_NUL = "it holds a NUL byte (UTF-16, or a damaged file); save it as UTF-8"


def _unreadable(path: Path, line: int, problem: str, what: str = "CSV table") -> TextError:
    return TextError(f"{path}:{line} is no readable {what} in UTF-8: {problem}")


def _find_columns(
    path: Path, header: Sequence[str], columns: Sequence[Sequence[str]], optional: Collection[str]
) -> list[int | None]:
    check_header(f"{path}:1", header, columns)
    names = [next((name for name in choices if name in header), None) for choices in columns]
    missing = [
        " or ".join(choices)
        for name, choices in zip(names, columns, strict=True)
        if name is None and not set(choices) & set(optional)
    ]
    if missing:
        raise TextError(
            f"{path} has no column {' and no '.join(missing)}; its columns are {', '.join(header)[:200] or 'none'}"
        )
    return [None if name is None else header.index(name) for name in names]


def check_header(where: str, header: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    """Refuse columns that are there twice, or only in another case or with spaces, and separators but commas."""
    for names in columns:
        if doubled := next((name for name in names if header.count(name) > 1), None):
            raise TextError(f"{where} has the column {doubled} {header.count(doubled)} times; keep one of them")
        wanted = {_plain(name): name for name in names}
        near = next((cell for cell in header if _plain(cell) in wanted), None)
        if near is not None and not set(names) & set(header):
            raise TextError(f"{where} calls a column {near!r}; rename it to {wanted[_plain(near)]}")
    if {name for names in columns for name in names} & set(header):
        return
    for mark, word in _SEPARATORS.items():
        if mark in "".join(header):
            raise TextError(f"{where} has {word} between its cells; save it with commas")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Read a text file in UTF-8, with every line end as LF; `TextError` where it has more characters."""
    with _opened(path) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise TextError(f"{path} has more than {limit} characters; is it what it should be?")
    if "\0" in text:
        raise _unreadable(path, text[: text.index("\0")].count("\n") + 1, _NUL, "text file")
    return text


def _not_utf8(path: Path) -> tuple[int, str]:
    """The first line that is not UTF-8, and what is wrong with it."""
    line = 1
    with open_regular(path) as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return 1, "it is in UTF-16; save it as UTF-8"
        file.seek(0)
        for text in file:
            try:
                text.decode()
            except UnicodeDecodeError as error:
                line += len(_LINE_END.findall(text[: error.start]))
                byte = f"byte 0x{text[error.start]:02x}"
                return line, f"{byte} is of another encoding, such as Latin-1; save it as UTF-8"
            line += len(_LINE_END.findall(text))
    return line, "it ends within a character; get it again"


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, without white space around them."""
    with _opened(path) as file:
        for number, lines in _blocks(path, file):
            yield from enumerate(map(str.strip, lines), number)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without white space around them; empty ones count, but not at the end."""
    lines = [line for _, line in text_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


_ESCAPES = re.compile(r"\\(?:ud[89ab]..\\ud[c-f]..|(?P<half>ud[89a-f]..)|.)", re.IGNORECASE)


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; `UsageError`, with where it stands, if it is none, or holds text that is not Unicode."""
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_int=whole_number)
        check_depth(value)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no valid JSON: {error}") from error
    for escape in _ESCAPES.finditer(text) if r"\ud" in text.lower() else ():
        if escape["half"]:
            line = f" in line {text.count(chr(10), 0, escape.start()) + 1}" if "\n" in text.strip() else ""
            raise UsageError(f"{where} holds half a surrogate pair, {escape[0]}{line}; write the character itself")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} stands twice in one object")
        found[name] = value
    return found


def read_json(path: Path) -> Any:
    """Read a file that is one JSON value, as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a file with one JSON value a line: where each stands, as `file:line`, and the value."""
    for number, line in text_lines(path):
        if line:
            where = f"{path}:{number}"
            yield where, parse_json(line, where)
