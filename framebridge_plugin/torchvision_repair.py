"""One repair that diffusers' pipelines and transformers' T5 need where torchvision does not fit torch.

The package registry's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators do not load,
and its import stops at the first operator that it cannot find ("operator torchvision::nms does not exist"). Nothing
here ever calls these operators; they only have to be declared for the import to go through.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A torch library is withdrawn when its object is garbage-collected, so it has to stay referenced.
_declared: list[Any] = []
_lock = threading.RLock()  # the repair itself asks where torchvision is


def repair_on_import() -> None:
    """Repairs torchvision when somebody imports it, from here on; torch is not loaded before."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


class _BeforeTorchvision:
    """Finds nothing, but is asked first."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            ensure_torchvision_operators()


def ensure_torchvision_operators() -> bool:
    """Declares torchvision's non-maximum suppression where torchvision cannot find its own."""
    with _lock:
        if _declared or not _torchvision_operators_missing():
            return bool(_declared)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not _operator_exists(name):
                library.define(schema)
        _declared.append(library)
        return True


def _torchvision_operators_missing() -> bool:
    specification = importlib.util.find_spec("torchvision")
    if specification is None or _operator_exists("nms"):
        return False
    # torchvision registers its operators from a compiled library. Loading that file here asks the question without
    # importing the package, whose import would fail half-way.
    import torch

    for folder in specification.submodule_search_locations or ():
        for compiled in Path(folder).glob("_C.*"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(compiled))
    return not _operator_exists("nms")


def _operator_exists(name: str) -> bool:
    import torch

    return hasattr(torch.ops.torchvision, name)
