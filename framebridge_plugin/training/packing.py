"""An optimizer's state as JSON and tensors: no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Turns an optimizer's state into what JSON can say; its tensors go into `tensors` under their paths.

    Quantised states (torchao's 8-bit AdamW) are tensor subclasses made of plain tensors, stored one by one.
    """
    if isinstance(value, dict):
        return {"dict": {key: pack(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
        parts, _ = value.__tensor_flatten__()
        tensors.update({f"{name}/{part}": getattr(value, part) for part in parts})
        return {"quantised": parts}
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    return value


def unpack(packed: Any, name: str, tensors: Mapping[str, torch.Tensor], live: Any) -> Any:
    """The inverse of `pack`; `live` is the present state, which knows the classes of quantised tensors."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "dict":
        present = live if isinstance(live, dict) else {}
        return {key: unpack(item, f"{name}/{key}", tensors, present.get(key)) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [unpack(item, f"{name}/{i}", tensors, None) for i, item in enumerate(content)]
        return items if kind == "list" else tuple(items)
    if kind == "quantised":
        _, context = live.__tensor_flatten__()
        inner = {part: tensors[f"{name}/{part}"] for part in content}
        return type(live).__tensor_unflatten__(inner, context, live.size(), live.stride())
    return tensors[content]
