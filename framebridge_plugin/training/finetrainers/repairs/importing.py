"""What `import finetrainers` needs."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.torchvision_repair import ensure_torchvision_operators
from framebridge_plugin.training.finetrainers.repairs import Repair
from framebridge_plugin.training.finetrainers.repairs.upstream_modules import MISSING_MODULES


class MissingModuleFinder:
    """Serves `MISSING_MODULES`. It stands last on the meta path, so that a real module is always found first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds a module if it is one of the missing ones."""
        if fullname not in MISSING_MODULES:
            return None
        loader: Any = self
        return importlib.machinery.ModuleSpec(fullname, loader, is_package=MISSING_MODULES[fullname] is None)

    def create_module(self, specification: importlib.machinery.ModuleSpec) -> None:
        """Leaves it to Python."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Fills a new module with its functions."""
        vars(module).update(MISSING_MODULES[module.__name__] or {})


def _modules_missing() -> bool:
    # finetrainers is only located here: importing it is what would fail.
    specification = importlib.util.find_spec("finetrainers")
    if specification is None or specification.origin is None:
        raise FrameBridgeError("finetrainers is not installed; run `pip install finetrainers==0.2.0`")
    patches = Path(specification.origin).parent / "patches"
    return not (patches / "dependencies").is_dir() or not (patches / "models").is_dir()


def _video_reader_missing() -> bool:
    import torchvision.io

    return not hasattr(torchvision.io, "video_reader")


def _supply_video_reader() -> None:
    io: Any = importlib.import_module("torchvision.io")
    reader: Any = types.ModuleType(
        "torchvision.io.video_reader", "Stand-in for a module that torchvision has removed."
    )
    # finetrainers only asks whether a video is an instance of this class before it reads it.
    reader.VideoReader = type("VideoReader", (), {})
    io.video_reader = sys.modules[reader.__name__] = reader


REPAIRS = (
    Repair(
        "torchvision operators",
        "declares torchvision::nms, because a CUDA build of torchvision does not load beside a CPU torch",
        ensure_torchvision_operators,
        ensure_torchvision_operators,
    ),
    Repair(
        "torchvision video reader",
        "a stand-in for torchvision.io.video_reader, which finetrainers names and torchvision 0.28 has removed",
        _video_reader_missing,
        _supply_video_reader,
    ),
    Repair(
        "missing modules",
        "supplies finetrainers.patches.dependencies and .models, which the wheel imports and does not contain",
        _modules_missing,
        lambda: sys.meta_path.append(MissingModuleFinder()),
    ),
)
