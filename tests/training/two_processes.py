"""A program for torchrun that makes several runs in the same processes, one after the other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from framebridge_plugin.cli import main as run_command
from tests.training import averaged_run


def runs_on_their_ports() -> Iterator[Any]:
    """Yields the runs of the command line, each with a port of its own for the processes to meet at."""
    # torchrun's own store keeps the addresses of a run's process group, which the next run would then call.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    ports, runs = map(json.loads, sys.argv[1:])
    for port, run in zip(ports, runs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        yield run


def main() -> None:
    for command, *arguments in runs_on_their_ports():
        if command == "averaged":
            averaged_run.main(*arguments)
        elif exit_code := run_command([command, *arguments]):
            sys.exit(exit_code)


if __name__ == "__main__":
    main()
