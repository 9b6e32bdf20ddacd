"""What makes finetrainers 0.2.0 from the package index work with today's dependencies, on GPU and CPU.

Every repair stands behind the very condition that it repairs and says in one line what it does and why; where
upstream is healthy, nothing is touched. `finetrainers doctor` lists them.
"""

from __future__ import annotations

import importlib
import threading

from framebridge_plugin.errors import FrameBridgeError, in_one_line
from framebridge_plugin.training.finetrainers.repairs import (
    Repair,
    defaults,
    devices,
    importing,
    processes,
    saving,
    videos,
)

REPAIRS_BEFORE_IMPORT = importing.REPAIRS
REPAIRS_AFTER_IMPORT = defaults.REPAIRS + videos.REPAIRS + devices.REPAIRS + processes.REPAIRS + saving.REPAIRS

_was_needed: dict[str, bool] = {}
_lock = threading.RLock()


def apply_repairs() -> None:
    """Applies the repairs that are needed and imports finetrainers; does nothing when called again."""
    with _lock:
        for repair in REPAIRS_BEFORE_IMPORT:
            _apply_once(repair)
        try:
            # Before decord, which finetrainers imports: its libvpx would take the place of PyAV's, and not fit.
            importlib.import_module("av")
            importlib.import_module("finetrainers")
        except Exception as error:
            raise FrameBridgeError(
                f"finetrainers cannot be imported ({type(error).__name__}: {in_one_line(error)}); run "
                "`finetrainers doctor` and install the versions that it names"
            ) from error
        for repair in REPAIRS_AFTER_IMPORT:
            _apply_once(repair)


def repair_status() -> list[tuple[Repair, bool | None]]:
    """Lists every repair."""
    return [(repair, _was_needed.get(repair.name)) for repair in REPAIRS_BEFORE_IMPORT + REPAIRS_AFTER_IMPORT]


def _apply_once(repair: Repair) -> None:
    if repair.name in _was_needed:
        return
    needed = repair.needed()
    if needed:
        repair.apply()
    _was_needed[repair.name] = needed
