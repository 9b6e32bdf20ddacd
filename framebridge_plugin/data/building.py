"""What the packaged data sets share: building an Arrow table once, and opening it from the cache ever after."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from framebridge_plugin.errors import FrameBridgeError


def build_or_open(builder_class: type[datasets.DatasetBuilder], *, refresh: bool, **settings: Any) -> datasets.Dataset:
    """Builds a data set's table, or opens the one that was built before from the same settings.

    The table lies in the cache of `datasets` (`HF_DATASETS_CACHE`), is memory-mapped, and handed to other processes
    by its path. Processes that build the same table wait for each other.

    Args:
        builder_class: A builder with one split, "train".
        refresh: Whether to build it again.
        **settings: `cache_dir`, and the fields of the builder's config.

    Returns:
        The rows.

    Raises:
        FrameBridgeError: The source is wrong, or the cache cannot be written.
    """
    mode = datasets.DownloadMode.FORCE_REDOWNLOAD if refresh else datasets.DownloadMode.REUSE_DATASET_IF_EXISTS
    try:
        builder = builder_class(**settings)
        builder.download_and_prepare(download_mode=mode, verification_mode="no_checks")
        # Arrow keeps what building took, and every loader worker would inherit it.
        pa.default_memory_pool().release_unused()
        return builder.as_dataset(split="train")
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, FrameBridgeError):
            raise error.__cause__ from error
        reason = error.__cause__ or error
        raise FrameBridgeError(f"cannot build the index of the data set: {' '.join(str(reason).split())}") from error
    except OSError as error:
        raise FrameBridgeError(
            f"cannot write the index of the data set: {error}; set HF_DATASETS_CACHE to a folder with room"
        ) from error


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Says which state of a file or folder this is, without reading it.

    Args:
        path: An existing file or folder.

    Returns:
        Its absolute path, size and time of change.
    """
    status = os.stat(path)
    return f"{Path(path).absolute()} {status.st_size} {status.st_mtime_ns}"
