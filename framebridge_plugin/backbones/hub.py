"""A name becomes a folder: as it is, or by a download from the Hugging Face Hub, which is announced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.files import COMPONENT_FILES
from framebridge_plugin.backbones.folders import EXTRA_WEIGHTS_FILE, LORA_FILE, LORA_INFO_FILE, file_problem
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import download, local_path

_INDICES = ("model_index.json", LORA_INFO_FILE)
_MODEL_FILES = (
    *_INDICES,
    *(f"*/{name}" for name in (*_INDICES, *COMPONENT_FILES)),
    *(LORA_FILE, EXTRA_WEIGHTS_FILE, "config.json", "*model*.safetensors", "*.safetensors.index.json"),
)
"""What is read of a repository with a whole model, a LoRA, or a component alone."""


def local_folder(name_or_path: str, *, patterns: Sequence[str] = _MODEL_FILES, **hub_settings: Any) -> Path:
    """The folder of a model: a path as it is, a hub id downloaded (or found in the cache).

    Args:
        name_or_path: A folder, or an id: `owner/name`, where no folder `owner` is here.
        patterns: What is downloaded.
        **hub_settings: `revision`, `cache_dir`, `token`, ... as in `huggingface_hub`.

    Returns:
        The folder; of an id that of one commit, by which it is called.

    Raises:
        FrameBridgeError: If there is no such folder, or the hub does not have it.
    """
    if (path := local_path(name_or_path)) is not None:
        if path.is_dir():
            return path
        raise FrameBridgeError(
            file_problem(path) if path.is_file() else f"no such folder: {name_or_path!r}; check the name"
        )
    return download(name_or_path, "model", allow_patterns=list(patterns), **hub_settings)
