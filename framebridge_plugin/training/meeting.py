"""How the processes of a command find each other: without a port where torchrun has not opened one."""

from __future__ import annotations

import os
from typing import Any

import torch

from framebridge_plugin.processes import STORE, process_count

_ON_THIS_MACHINE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def meeting_place() -> dict[str, Any]:
    """Arguments of `torch.distributed.init_process_group`; none for processes that torchrun or srun started.

    One process has a store in its memory, those of `--nproc` have a file. What they then send each other stays on this
    machine's loopback, unless the environment names another interface.
    """
    count, file = process_count(), os.environ.get(STORE)
    if count > 1 and file is None:
        return {}
    for name, interface in _ON_THIS_MACHINE.items():
        os.environ.setdefault(name, interface)
    store = torch.distributed.HashStore() if file is None else torch.distributed.FileStore(file, count)
    return {"store": store, "rank": int(os.environ.get("RANK", "0")), "world_size": count}
