"""The processes that a command consists of: what started them, what each of them has, how to start Python.

Needs the standard library alone, and torch where processes have met by it.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

from framebridge_plugin.errors import FrameBridgeError, UsageError

T = TypeVar("T")

STORE = "FRAMEBRIDGE_STORE"
"""Environment variable of processes that `--nproc` started: the file by which they find each other."""


def rank() -> int:
    """The number of this process among those that were started together."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the first of those that were started together, or alone."""
    return rank() == 0


def process_count() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def have_met() -> bool:
    """Whether this process and those that were started with it have found each other."""
    torch: Any = sys.modules.get("torch.distributed")
    return torch is not None and torch.is_initialized()


def of_all_ranks(value: T) -> list[T]:
    """The values of all ranks of a run, on each, if they have met already."""
    import torch.distributed

    if not have_met() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def first_alone(function: Callable[[], T]) -> T:
    """Calls a function on the first rank, then the others, which raise without a message what is wrong for all."""
    exit_code = 0
    if is_first():
        try:
            result = function()
        except Exception as error:
            of_all_ranks(getattr(error, "exit_code", 1))
            raise
    if exit_code := of_all_ranks(exit_code)[0]:
        said = FrameBridgeError()
        said.exit_code = exit_code
        raise said
    return result if is_first() else function()


def this_process() -> dict[str, Any]:
    """What tells this process from others: `host`, `machine` and `pid`.

    The machine is its present start and the container on it; names of hosts may be the same.
    """
    machine = host = socket.gethostname()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return {"host": host, "machine": machine, "pid": os.getpid()}


def this_job() -> tuple[str, bool]:
    """What tells the job of this process from others, and whether torchrun or Slurm has started it again."""
    environment = os.environ
    torchrun = f"{environment.get('TORCHELASTIC_RUN_ID')} {this_process()['machine']} {os.getppid()}"
    counts = (environment.get(f"{name}_RESTART_COUNT") for name in ("TORCHELASTIC", "SLURM"))
    return environment.get("SLURM_JOB_ID") or torchrun, any(int(count or 0) > 0 for count in counts)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    return os.path.exists(f"/proc/{pid}")


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
    count = int(environment.get("SLURM_NTASKS", "1"))
    if count == 1:
        return
    local = int(environment.get("SLURM_LOCALID", "0"))
    # With --gpus-per-task a process sees its own GPU alone.
    visible = len(list(filter(None, environment.get("CUDA_VISIBLE_DEVICES", "").split(","))))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    port = 20_000 + (int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(environment["SLURM_STEP_ID"])) % 20_000
    found = {
        "WORLD_SIZE": str(count),
        "RANK": environment.get("SLURM_PROCID", "0"),
        "LOCAL_RANK": str(local % visible if visible else local),
        "MASTER_ADDR": first_node(nodes),
        "MASTER_PORT": str(port),
    }
    environment.update({name: environment.get(name, value) for name, value in found.items()})


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes, such as `gpu[07-09,12],login1`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UsageError(f"Slurm's list of nodes cannot be read: {nodes!r}; set MASTER_ADDR to the first of them")
    return "".join(part or "" for part in match.groups())
