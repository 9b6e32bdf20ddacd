"""Reading the files of a model that may come from a stranger: which belong to it, where they lead, how large they are.

Needs the standard library alone.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from pathlib import Path

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import hub_blobs

_COMPONENT_FILES = (
    *("config.json", "*_config.json", "*.safetensors.index.json"),
    *("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "vocab.txt", "merges.txt"),
    "*.safetensors",
)
"""What diffusers and transformers write into the folder of a component, and read from it; no pickles."""


def component_files(folder: Path) -> list[tuple[str, Path]]:
    """The files of a component: what of its folder is loaded, compared, and saved with another model.

    Args:
        folder: The component's folder in diffusers' or transformers' format.

    Returns:
        Name and real place of each, by name. Whatever else lies in the folder is left out, pickles among it.

    Raises:
        FrameBridgeError: If something in the folder leads out of it, or is neither a file nor a folder.
    """
    if (problem := links_problem(folder)) is not None:
        raise FrameBridgeError(problem)
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as error:
        raise FrameBridgeError(f"cannot read {folder}: {error}; check that it is a whole model") from error
    names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _COMPONENT_FILES)]
    return [(name, (folder / name).resolve()) for name in names]


def links_problem(folder: Path) -> str | None:
    """What in a component's folder is no file of its own.

    A link may lead to a file within the folder, or among the blobs of the hub's cache that the folder lies in; the
    folder itself may be one.
    """
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            if (problem := file_place_problem(path, folder)) is not None:
                return problem
    return None


def file_place_problem(path: Path, folder: Path) -> str | None:
    """Why something in a folder, which need not exist, is no file or folder of its own; see `links_problem`."""
    if path.is_symlink():
        real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        if path.is_dir() or not (real.is_relative_to(home) or real.parent == hub_blobs(home)):
            return f"{path} is a link to {real}, outside its folder; put what it leads to in its place"
    if path.exists() and not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
        return f"{path} is neither a file nor a folder; remove it"
    return None
