"""`python -m framebridge_plugin` is the command `finetrainers`."""

from __future__ import annotations

import signal
import sys

from framebridge_plugin import signals


def main() -> int:
    """Run the command, which handles signals before it loads anything."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Before the handlers are there, and once they are gone: the end without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with signals.handled(), signals.as_interruption():
            from framebridge_plugin.cli import main

            return main()
    except KeyboardInterrupt as interruption:
        return signals.ended_by(interruption)


if __name__ == "__main__":
    sys.exit(main())
