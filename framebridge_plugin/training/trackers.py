"""A tracker without which the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from finetrainers import logging
from finetrainers.trackers import BaseTracker

from framebridge_plugin.errors import escaped, first_line

logger = logging.get_logger()

_PATIENCE = 120.0
"""Seconds that a tracker has to send what is left when the run is over."""


class OptionalTracker(BaseTracker):
    """Hands everything on to a tracker of finetrainers until that fails, once, of which it warns; then it is silent.

    What a run logs stands in metrics.jsonl in any case.
    """

    def __init__(self, start: Callable[[], BaseTracker | None]) -> None:
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
        sending.join(_PATIENCE)
        if sending.is_alive():
            logger.warning(f"the tracker has not sent everything after {_PATIENCE:.0f} s; `wandb sync` sends the rest")

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            reason = escaped(first_line(error))
            logger.warning(f"the tracker fails: {reason}; the run goes on without it; metrics.jsonl has everything")
            self._tracker = None
