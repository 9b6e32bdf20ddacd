"""How far something has come: a bar in a terminal or a notebook, elsewhere a line every 30 seconds.

One is shown at a time: a bar that is opened while another is open takes its place until it is closed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from framebridge_plugin.errors import say
from framebridge_plugin.processes import is_first

SECONDS_BETWEEN_LINES = 30.0

_LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

_open: list[Progress] = []


class Progress:
    """Counts towards a total; a context manager."""

    def __init__(
        self,
        total: int,
        description: str,
        *,
        unit: str = "it",
        initial: int = 0,
        disable: bool = False,
        leave: bool = True,
        **bar: Any,
    ) -> None:
        self.n = initial
        self._total, self._description, self._unit, self._initial = total, description, unit, initial
        self._disable = disable
        self._notes: dict[str, Any] = {}
        self._started = self._said = time.monotonic()
        self._said_n = initial
        self._bar = None
        if disable:
            return
        if _open and _open[-1]._bar is not None:
            _open[-1]._bar.clear()
        if _shows_bars():
            settings = {"desc": description, "unit": unit, "initial": initial, "leave": leave and not _open}
            self._bar = _bar_class()(total=total, position=0, **settings, **bar)
        _open.append(self)

    def update(self, count: int = 1) -> None:
        """Counts on."""
        self.n += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._disable and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._say()

    def set_postfix(self, **notes: Any) -> None:
        """Shows values beside the count."""
        self._notes = notes
        if self._bar is not None:
            self._bar.set_postfix(notes, refresh=False)

    def write(self, text: str) -> None:
        """Prints a line that does not run into a bar."""
        from tqdm.auto import tqdm

        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends it; the one whose place it took is shown again."""
        if self not in _open:
            return
        _open.remove(self)
        if self._bar is not None:
            self._bar.close()
        elif self.n != self._said_n and not _open:
            self._say()
        for other in _open:
            other._begin_now()
        if _open and _open[-1]._bar is not None:
            _open[-1]._bar.refresh()

    def _begin_now(self) -> None:
        """What was done before the first of what is counted tells nothing of how long the rest takes."""
        if self.n == self._initial:
            self._started = time.monotonic()
            if self._bar is not None:
                self._bar.start_t = self._bar.last_print_t = time.time()

    def _say(self) -> None:
        from tqdm.std import tqdm

        self._said, self._said_n = time.monotonic(), self.n
        elapsed = self._said - self._started
        notes = ", ".join(f"{name}={value}" for name, value in self._notes.items())
        line = tqdm.format_meter(
            self.n,
            self._total,
            elapsed,
            prefix=self._description,
            unit=self._unit,
            initial=self._initial,
            postfix=notes,
            bar_format=_LINE,
        )
        say(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While it lasts, libraries draw no bars of their own: without a terminal, inside one of ours, on a later rank."""
    from tqdm.std import tqdm

    original: Any = tqdm.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, _bar_class()) and (_open or not sys.stderr.isatty() or not is_first()):
            kwargs["disable"] = True
        original(self, *args, **kwargs)

    bar_class: Any = tqdm
    bar_class.__init__ = __init__
    try:
        yield
    finally:
        bar_class.__init__ = original


@functools.cache
def _bar_class() -> Any:
    from tqdm.auto import tqdm

    return type("Bar", (tqdm,), {})


def _shows_bars() -> bool:
    return sys.stderr.isatty() or any(base.__module__ == "tqdm.notebook" for base in _bar_class().__mro__)
