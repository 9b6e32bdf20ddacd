"""Finding the parts of a table; needs the standard library alone."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from framebridge_plugin.errors import FrameBridgeError


def csv_files(csv: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Find the CSV files of a table.

    Args:
        csv: A file, a folder of .csv files, a pattern such as "results_2M_train_*.csv", or several of these.

    Returns:
        The files, absolute, those of a folder or pattern in order of their names.

    Raises:
        FrameBridgeError: There is none.
    """
    given = [csv] if isinstance(csv, str | os.PathLike) else list(csv)
    files: list[Path] = []
    for item in given:
        path = Path(item).expanduser().absolute()
        if path.is_dir():
            found = sorted(path.glob("*.csv"))
        else:
            found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
        if not found:
            raise FrameBridgeError(f"no such file: {path}; give a .csv file, a folder of them, or a pattern")
        files += found
    return files
