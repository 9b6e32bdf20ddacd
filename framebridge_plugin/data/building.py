"""What the packaged data sets share: building an Arrow table once, and opening it from the cache ever after."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from framebridge_plugin.errors import FrameBridgeError

_FORMAT = 1  # Counts up when the same sources would give another table.


def build_or_open(
    name: str,
    features: datasets.Features,
    generate: Callable[[datasets.DatasetInfo], Iterator[pa.Table]],
    *,
    cache_dir: str | None,
    refresh: bool = False,
    **sources: Any,
) -> datasets.Dataset:
    """Builds a data set's table, or opens the one that was built before from the same sources.

    The table lies in the cache of `datasets` (`HF_DATASETS_CACHE`), is memory-mapped, and handed to other processes
    by its path. Processes that build the same table wait for each other; opening a complete one takes no lock and
    writes nothing. `generate` makes the rows, and may set the description of the information that it is given.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, sources], sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "framebridge" / f"{name}-{digest}"
    rows, description = folder / "rows.arrow", folder / "description.txt"
    try:
        if refresh or not description.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".lock", "a") as lock:
                with contextlib.suppress(OSError):  # some network file systems have none
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if refresh or not description.is_file():
                    _build(rows, description, features, generate)
        info = datasets.DatasetInfo(description=description.read_text(encoding="utf-8"), features=features)
        return datasets.Dataset.from_file(str(rows), info=info, split=datasets.Split.TRAIN)
    except OSError as error:
        raise FrameBridgeError(
            f"cannot build or open the index of the data set: {error}; it needs a folder with room, which "
            "HF_DATASETS_CACHE can name"
        ) from error


def _build(
    rows: Path,
    description: Path,
    features: datasets.Features,
    generate: Callable[[datasets.DatasetInfo], Iterator[pa.Table]],
) -> None:
    info = datasets.DatasetInfo()
    partial = [path.with_name(f".{path.name}.{os.getpid()}") for path in (rows, description)]
    try:
        with pa.OSFile(str(partial[0]), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as writer:
            for table in generate(info):
                writer.write_table(table.cast(features.arrow_schema))
        partial[1].write_text(info.description, encoding="utf-8")
        partial[0].replace(rows)
        partial[1].replace(description)  # last, since it says that the table is complete
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
        # Arrow keeps what building took, and every loader worker would inherit it.
        pa.default_memory_pool().release_unused()


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Which state of a file or folder this is, told without reading it: absolute path, size and time of change."""
    status = os.stat(path)
    return f"{Path(path).absolute()} {status.st_size} {status.st_mtime_ns}"
