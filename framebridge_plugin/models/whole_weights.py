"""Refusing weights that lack a tensor, which diffusers and transformers make up from chance with a warning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import ModelMixin
from transformers import PreTrainedModel

from framebridge_plugin.errors import FrameBridgeError


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Makes every `from_pretrained` of both libraries refuse weights that lack a tensor, also of a pipeline."""
    libraries: tuple[Any, ...] = (ModelMixin, PreTrainedModel)
    originals = [library.__dict__["from_pretrained"] for library in libraries]
    for library, original in zip(libraries, originals, strict=True):
        library.from_pretrained = _refusing(original.__func__)
    try:
        yield
    finally:
        for library, original in zip(libraries, originals, strict=True):
            library.from_pretrained = original


def missing_tensors(model: Any, loading_info: Mapping[str, Any]) -> set[str]:
    """The tensors that a model's weights did not have, by `output_loading_info` of a `from_pretrained`."""
    # Of several files diffusers compares their index alone; accelerate says where it keeps what it moved to the disk.
    is_offloaded = "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    unread = () if is_offloaded else (name for name, tensor in model.state_dict().items() if tensor.is_meta)
    return {*loading_info["missing_keys"], *unread}


def _refusing(original: Any) -> Any:
    def from_pretrained(cls: type, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = original(cls, source, *args, output_loading_info=True, **kwargs)
        if missing := missing_tensors(model, info):
            raise FrameBridgeError(
                f"the weights in {source} lack {len(missing)} tensors of a {cls.__name__}, first {min(missing)}; "
                "download them again"
            )
        return (model, info) if output_loading_info else model

    return classmethod(from_pretrained)
