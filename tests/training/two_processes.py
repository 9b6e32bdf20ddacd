"""A program for torchrun that makes several runs in the same processes, one after the other."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framebridge_plugin.cli import main as run_command
from tests.training import averaged_run


def runs_on_their_ports() -> Iterator[Any]:
    """Yields the runs of the command line, each with a port of its own for the processes to meet at."""
    # torchrun's own store keeps the addresses of a run's process group, which the next run would then call.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    for number, run in enumerate(runs):
        os.environ["MASTER_PORT"] = _agree_on_a_port(folder / str(number))
        yield run


def _agree_on_a_port(file: Path) -> str:
    """The first process chooses one that is free now, and tells the other by a file."""
    if os.environ["RANK"] == "0":
        with socket.create_server(("localhost", 0)) as server:
            file.with_suffix(".partial").write_text(str(server.getsockname()[1]))
        file.with_suffix(".partial").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def main() -> None:
    for expected, command, *arguments in runs_on_their_ports():
        if command == "averaged":
            averaged_run.main(*arguments)
        elif (exit_code := run_command([command, *arguments])) != expected:
            sys.exit(f"exit code {exit_code}, not {expected}: {command} {arguments}")


if __name__ == "__main__":
    main()
