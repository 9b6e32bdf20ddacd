"""Text columns of CSV files, read in blocks, with ids kept as text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from framebridge_plugin.errors import FrameBridgeError

_BLOCK_BYTES = 64 * 2**20


def csv_header(path: Path) -> list[str]:
    """Read the names of a table's columns.

    Args:
        path: A CSV file in UTF-8.

    Returns:
        The names, none for an empty file.

    Raises:
        FrameBridgeError: It is no such file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def read_text_columns(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Read columns of a table as text; quoted cells may hold commas, quotes and line breaks.

    Args:
        path: A CSV file in UTF-8.
        columns: Names of columns that it has.

    Yields:
        Blocks of rows with these columns, in this order.

    Raises:
        FrameBridgeError: The file is damaged.
    """
    try:
        reader = pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            # Left to itself, Arrow would take ids for numbers and drop their leading zeros.
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.string())
            ),
        )
        yield from reader
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FrameBridgeError:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return FrameBridgeError(f"{path} is no readable CSV table in UTF-8: {line}")
