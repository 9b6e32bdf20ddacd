"""`python -m framebridge_plugin` is the command `finetrainers`."""

from __future__ import annotations

import sys

from framebridge_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
