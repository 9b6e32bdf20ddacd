"""safetensors files, written and read one tensor at a time with their digest taken in the same pass.

The bytes are those that safetensors itself writes. Needs torch alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.backbones.manifest import DamagedError, FileFacts, Manifest, check_file

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""In the order of the format, whose files begin with the tensors of the last: all are aligned."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """The bytes that tensors, whole, take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def whole_tensor(tensor: Any) -> torch.Tensor:
    """A tensor, gathered from all ranks if it is sharded, which they then do together; without gradient."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def write_tensors(
    path: Path | None, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> FileFacts:
    """Writes a safetensors file; holds no more than one tensor beside the given ones.

    Args:
        path: The file; None on ranks that do not write, which take part in gathering.
        tensors: By name, on any device, sharded or whole; every rank gives the same.
        metadata: What the header says besides.

    Returns:
        What a manifest says of the file; nothing of use without a path.
    """
    names = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    if path is None:
        for name in names:
            whole_tensor(tensors[name])
        return FileFacts(0, "")
    head = _header({name: tensors[name] for name in names}, metadata)
    digest = hashlib.sha256(head)
    # The digest is taken beside the writing: neither holds the interpreter's lock.
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        file.write(head)
        for name in names:
            data = _bytes_of(whole_tensor(tensors[name]).cpu().contiguous())
            taken = beside.submit(digest.update, data)
            file.write(data)
            taken.result()
        size = file.tell()
    return FileFacts(size, digest.hexdigest())


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensors(folder: Path, name: str, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The tensors of a file in a folder, by name; a DamagedError if it is not as the manifest says.

    The digest is taken of the bytes as they are read into the tensors.
    """
    path, expected = folder / name, manifest.files.get(name)
    if expected is None:
        raise DamagedError(f"{path} is not in the manifest")
    digest, tensors = hashlib.sha256(), {}
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            check_file(path, expected._replace(size=size), expected)
            start = file.read(8)
            head = file.read(min(int.from_bytes(start, "little"), size))
            digest.update(start + head)
            end = 0
            entries = {key: entry for key, entry in json.loads(head).items() if key != "__metadata__"}
            for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                begin, dtype, shape = end, _DTYPES[entry["dtype"]], entry["shape"]
                end += math.prod(shape) * dtype.itemsize
                if entry["data_offsets"] != [begin, end] or end > size:
                    raise ValueError
                raw = torch.empty(end - begin, dtype=torch.uint8)
                file.readinto(_bytes_of(raw))
                digest.update(_bytes_of(raw))
                tensors[key] = raw.view(dtype).reshape(shape)
            digest.update(file.read())
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    except DamagedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise DamagedError(f"{path} has other bytes than were written") from None
    check_file(path, FileFacts(size, digest.hexdigest()), expected)
    return tensors
