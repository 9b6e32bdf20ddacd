"""Reading the files of a model that may come from a stranger: which belong to it, where they lead, how large they are.

Needs the standard library alone.
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import check_depth, leads_out, whole_number

Reader = Callable[[Path], dict[str, Any]]
"""`read_json`, or one that remembers what it has read."""

_JSON_BYTES = 64 * 2**20  # the largest that is needed, a tokenizer of 256,000 pieces, has 17 MiB
_HEADER_BYTES = 16 * 2**20  # safetensors allows 100 MB; 100 bytes for each of 10,000 tensors make one
_LARGEST_NUMBER = 10**7
_QUANTIZERS = ("bitsandbytes", "torchao", "quanto")  # others fetch kernels from the hub
COMPONENT_FILES = (
    *("config.json", "generation_config.json", "scheduler_config.json", "tokenizer_config.json"),
    "*.safetensors.index.json",
    *("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "vocab.txt", "merges.txt"),
    "*.safetensors",
)
"""What diffusers and transformers write into the folder of a component, and read from it; no pickles, no adapters."""
_ADAPTER = "adapter_config.json"  # transformers takes it for layers to add, where a stranger's pattern matches
_EXTRA_TOKENS = 10_000  # T5's tokenizers have 100 to 300


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
    names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPONENT_FILES)]
    return [(name, (folder / name).resolve()) for name in names]


def links_problem(folder: Path) -> str | None:
    """What in a component's folder is no file of its own.

    A link may lead to a file within the folder, or among the blobs of the hub's cache that the folder lies in; the
    folder itself may be one.
    """
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            if (problem := entry_problem(path, folder)) is not None:
                return problem
    return None


def entry_problem(path: Path, folder: Path) -> str | None:
    """Why something in a folder, which need not exist, is no file or folder of its own; see `links_problem`."""
    if path.is_symlink() and (path.is_dir() or leads_out(path, folder)):
        return f"{path} is a link to {os.path.realpath(path)}, outside its folder; put what it leads to in its place"
    if path.exists() and not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
        return f"{path} is neither a file nor a folder; remove it"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError that names the file for anything else, or one that is absurdly large."""
    if not path.is_file():  # a named pipe would be waited for
        raise ValueError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"it has more than {_JSON_BYTES // 2**20} MiB")
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return content


def read_if_whole(path: Path, read: Reader = read_json) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file is missing or damaged, which is said elsewhere."""
    try:
        return read(path)
    except ValueError:
        return {}


def parse_json(text: str | bytes) -> Any:
    """What JSON says; a ValueError for what is nested so deeply that nobody could walk through it."""
    try:
        content = json.loads(text, parse_int=whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(content)
    return content


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """Type, shape and place of each tensor by name, and `__metadata__`; None for another or a cut off file."""
    # 8 bytes with the header's length, the header in JSON, and the tensors' bytes.
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_HEADER_BYTES, path.stat().st_size - 8):
                return None
            header = parse_json(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        numbers = [number for entry in tensors for number in (*entry["shape"], *entry["data_offsets"])]
        pairs = all(len(entry["data_offsets"]) == 2 for entry in tensors)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return header if pairs and all(type(number) is int and number >= 0 for number in numbers) else None


def weights_problem(path: Path) -> str | None:
    """What is wrong with a file of weights."""
    if not path.is_file():
        return f"{path} is missing; copy the folder again"
    size = path.stat().st_size
    if size == 0:
        return f"{path} is empty; download it again"
    header = safetensors_header(path)
    if header is None:
        return f"{path} is no safetensors file, or cut off in its header; download it again"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    with path.open("rb") as file:
        expected = 8 + int.from_bytes(file.read(8), "little") + max(ends, default=0)
    if size != expected:
        return f"{path} has {size} bytes, its header announces {expected}; download it again"
    return None


def folder_weights_problem(folder: Path, config: Mapping[str, Any], read: Reader = read_json) -> str | None:
    """What is wrong with the weights in a component's folder, and with a config that they cannot be of."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = {str(name) for name in read(index)["weight_map"].values()}
        except (ValueError, KeyError, AttributeError) as error:
            return f"{index} lists no files ({error}); download the model again"
        for name in sorted(names):
            if Path(name).name != name or not (folder / name).is_file():
                return f"{folder / name} is missing, although {index.name} lists it; download the model again"
    if os.path.lexists(folder / _ADAPTER):
        return f"{folder / _ADAPTER} would add layers to the weights; merge them into these, or remove that file"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        what = "weights as a pickle alone, which could run code" if any(folder.glob("*.bin")) else "no weights"
        return f"{folder} holds {what} (*.safetensors are needed); download the model again"
    if (problem := next(filter(None, map(weights_problem, weights)), None)) is not None:
        return problem
    if problem := _foreign_code(config):
        return f"{folder}: its config {problem}; give the component as it was released"
    tensors = sum(len(safetensors_header(file) or ()) for file in weights)
    for name, value in config.items():
        # Modules without end are made before the weights are looked at.
        if type(value) is int and (value > _LARGEST_NUMBER or ("layers" in name and value > tensors)):
            return f"{folder}: its config says {name} {value}, for which its weights are too few; download it again"
    return None


def tokenizer_problem(folder: Path, read: Reader = read_json) -> str | None:
    """What is wrong with a tokenizer's folder."""
    if not any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        # transformers would make up a vocabulary without a word.
        return f"{folder} has no vocabulary (spiece.model); download the model again"
    config = read_if_whole(file := folder / "tokenizer_config.json", read)
    inputs = config.get("init_inputs")
    # Tokens without end are made by it, or by what its class is called with.
    for value in (config.get("extra_ids"), *(inputs if isinstance(inputs, list) else ())):
        if isinstance(value, int | float) and value > _EXTRA_TOKENS:
            return f"{file} asks for {value} extra tokens (extra_ids), more than {_EXTRA_TOKENS}; download it again"
    return None


def _foreign_code(config: Mapping[str, Any]) -> str | None:
    """What a config says that makes transformers or diffusers run code from somewhere else."""
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if "/" in str(config.get(name)):
            return f"has its attention from {config[name]}, code on the hub"
    quantized = config.get("quantization_config") or {}
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    return f"is quantized by {method}" if quantized and method not in _QUANTIZERS else None
