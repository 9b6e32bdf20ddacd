"""The file of samples that a run validates with, read alike by the recipe's checks and by the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from framebridge_plugin.data.tables import MAX_TEXT, TextError, check_header, read_json, table_rows
from framebridge_plugin.errors import in_one_line
from framebridge_plugin.files import open_regular

VALIDATION_SUFFIXES = (".csv", ".json", ".parquet", ".arrow")
NUMBERS = ("num_frames", "height", "width", "num_inference_steps", "export_fps", "guidance_scale")
_MAX_ROWS = 10_000
_COLUMNS = ("caption", "image_path", "video_path", *NUMBERS)


def read_validation_rows(path: Path) -> list[dict[str, Any]]:
    """Read a validation file's rows without empty cells; in CSV, only what `NUMBERS` names is a number."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        rows = table_rows(path)
        _, header = next(rows, (1, []))
        check_header(f"{path}:1", header, [(name,) for name in _COLUMNS])
        return [
            {name: _number(cell) if name in NUMBERS else cell for name, cell in zip(header, row, strict=True) if cell}
            for _, row in rows
        ]
    if suffix == ".json":
        content = read_json(path)
        rows_of_json = content.get("data") if isinstance(content, dict) else None
        if not isinstance(rows_of_json, list) or not all(isinstance(row, dict) for row in rows_of_json):
            raise TextError(f"{path} should hold an object with a list 'data' of objects")
        return _without_nulls(path, rows_of_json)
    import pyarrow as pa
    import pyarrow.parquet

    rows_of_arrow: list[dict[str, Any]] = []
    size = 0
    try:
        with open_regular(path) as file:
            for batch in _batches(file, suffix):
                size += batch.nbytes
                if size > MAX_TEXT or len(rows_of_arrow) + len(batch) > _MAX_ROWS:
                    raise TextError(f"{path} holds more than {_MAX_ROWS} rows, or more than {MAX_TEXT >> 20} MiB")
                rows_of_arrow += batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        what = getattr(error, "strerror", None) or in_one_line(error)
        raise TextError(f"{path} is no readable {suffix[1:]} file: {what}") from error
    return _without_nulls(path, rows_of_arrow)


def _batches(file: BinaryIO, suffix: str) -> Iterator[Any]:
    """The rows of a table, one by one in Parquet, of which a small file can hold endlessly many."""
    import pyarrow as pa
    import pyarrow.parquet

    if suffix == ".parquet":
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1)
        return
    try:
        yield from pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        reader = pa.ipc.open_file(file)
        yield from map(reader.get_batch, range(reader.num_record_batches))


def _without_nulls(path: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    check_header(str(path), list({name: None for row in rows for name in row}), [(name,) for name in _COLUMNS])
    return rows


def _number(text: str) -> int | float | str:
    """The number that a text says, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
