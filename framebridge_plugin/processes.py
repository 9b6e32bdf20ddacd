"""The processes that a command consists of: what started them, and how to start Python; the standard library alone."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path

from framebridge_plugin.errors import UsageError

STORE = "FRAMEBRIDGE_STORE"
"""Environment variable of processes that `--nproc` started: the file by which they find each other."""


def is_first() -> bool:
    """Whether this process is the first of those that were started together, or alone."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_machine() -> str:
    """Which start of which machine this is, and which of its containers; names of machines may be the same."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def python_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """A module as a program of its own: the command, and the environment in which it finds what this process finds.

    Files in the working directory are no modules of it (`-P`), unless they are this process's own.
    """
    paths = [path or os.getcwd() for path in sys.path]
    command = [sys.executable, "-P", "-m", module, *arguments]
    return command, os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Gives a process that `srun` started beside others the variables that torchrun would have given it.

    The script of `sbatch` has most of Slurm's variables too, and is one process; only what `srun` started has a step.
    """
    if {"RANK", "WORLD_SIZE"} & environment.keys() or "SLURM_STEP_ID" not in environment:
        return
    count, number = (int(environment.get(name, default)) for name, default in _SLURM)
    if count == 1:
        return
    local = int(environment.get("SLURM_LOCALID", "0"))
    # With --gpus-per-task a process sees its own GPU alone.
    visible = len(list(filter(None, environment.get("CUDA_VISIBLE_DEVICES", "").split(","))))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    port = 20_000 + (int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(environment["SLURM_STEP_ID"])) % 20_000
    found = {
        "WORLD_SIZE": str(count),
        "RANK": str(number),
        "LOCAL_RANK": str(local % visible if visible else local),
        "MASTER_ADDR": first_node(nodes),
        "MASTER_PORT": str(port),
    }
    environment.update({name: environment.get(name, value) for name, value in found.items()})


_SLURM = (("SLURM_NTASKS", "1"), ("SLURM_PROCID", "0"))


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes, such as `gpu[07-09,12],login1`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UsageError(f"Slurm's list of nodes cannot be read: {nodes!r}; set MASTER_ADDR to the first of them")
    return "".join(part or "" for part in match.groups())
