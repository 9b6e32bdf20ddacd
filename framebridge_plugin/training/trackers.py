"""A tracker without which the run goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import wandb
from finetrainers import logging
from finetrainers.trackers import BaseTracker

from framebridge_plugin.errors import escaped, first_line

logger = logging.get_logger()


class OptionalTracker(BaseTracker):
    """Hands everything on to a tracker of finetrainers until that fails, once, of which it warns; then it is silent.

    What a run logs stands in metrics.jsonl in any case.

    Args:
        start: Makes the tracker, or None.
        patience: Seconds that it has to send what is left when the run is over.
    """

    def __init__(self, start: Callable[[], BaseTracker | None], patience: float = 120.0) -> None:
        self._patience = patience
        self._tracker: BaseTracker | None = None
        self._tracker = self._try(start)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Hands on the numbers of one step."""
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.log(metrics, step))

    def finish(self) -> None:
        """Has the tracker send what is left, as long as there is patience."""
        if (tracker := self._tracker) is None:
            return
        sending = threading.Thread(target=self._try, args=(tracker.finish,), daemon=True)
        sending.start()
        sending.join(self._patience)
        if sending.is_alive():
            logger.warning(f"the tracker has not sent everything in {self._patience:g} s; `wandb sync` sends the rest")
            # Else wandb waits for its process when this one ends, for ever.
            for process in _service_processes():
                os.kill(process, signal.SIGKILL)
            with contextlib.suppress(Exception, SystemExit):  # which it raises if its process had to be ended
                wandb.teardown()

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            reason = escaped(first_line(error))
            logger.warning(f"the tracker fails: {reason}; the run goes on without it; metrics.jsonl has everything")
            self._tracker = None


def _service_processes() -> Iterator[int]:
    """wandb's own among the children of this process."""
    for task in Path("/proc/self/task").glob("*/children"):
        for child in task.read_text().split():
            if Path(f"/proc/{child}/comm").read_text().startswith("wandb-core"):
                yield int(child)
