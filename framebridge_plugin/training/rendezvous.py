"""How the processes of a command find each other: without a port where torchrun or srun has not opened one."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from framebridge_plugin import processes
from framebridge_plugin.errors import FrameBridgeError

_ON_THIS_MACHINE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def group_arguments(timeout: timedelta) -> dict[str, Any]:
    """Arguments of `torch.distributed.init_process_group`; none where the environment alone says enough.

    One process has a store in its memory, those of `--nproc` have a file. What they then send each other stays on this
    machine's loopback, unless the environment names another interface. torchrun's store holds what an earlier start of
    the same processes has left there, addresses of the dead among it: each start has a part of its own.
    """
    count, file = processes.process_count(), os.environ.get(processes.STORE)
    if count > 1 and file is None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return {}
        store, rank, count = next(iter(rendezvous("env://", timeout=timeout)))
        return {"store": _of_this_start(store, rank, count, timeout), "rank": rank, "world_size": count}
    for name, interface in _ON_THIS_MACHINE.items():
        os.environ.setdefault(name, interface)
    store = torch.distributed.HashStore() if file is None else torch.distributed.FileStore(file, count)
    return {"store": store, "rank": processes.rank(), "world_size": count}


def _of_this_start(store: Store, rank: int, count: int, timeout: timedelta) -> Store:
    """The first process names the start; another takes a name only once the first has seen its answer to it."""
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("framebridge", own)
        answers = [f"framebridge/{own}/{other}" for other in range(1, count)]
        store.wait(answers, timeout)
        store.set(f"framebridge/{own}", " ".join(store.get(answer).decode() for answer in answers))
        return PrefixStore(own, store)
    while time.monotonic() < deadline:
        if store.check(["framebridge"]):
            start = store.get("framebridge").decode()
            store.set(f"framebridge/{start}/{rank}", own)
            seen = f"framebridge/{start}"
            if store.check([seen]) and own in store.get(seen).decode().split():
                return PrefixStore(start, store)
        time.sleep(0.1)
    raise FrameBridgeError(f"process {rank}: the first process did not come within {timeout.total_seconds():.0f} s")


@contextlib.contextmanager
def met() -> Iterator[torch.device]:
    """While it lasts, the processes that were started together have found each other; gives this one's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        device = torch.device(accelerator.type, local_rank % torch.accelerator.device_count())
    if processes.process_count() > 1:
        # Some wait for others that have more to do, for days if need be.
        limit = timedelta(days=365)
        torch.distributed.init_process_group("gloo", timeout=limit, **group_arguments(limit))
    try:
        yield device
    finally:
        if processes.process_count() > 1:
            torch.distributed.destroy_process_group()


def wait_for_all() -> None:
    """Waits until all processes are here."""
    if processes.process_count() > 1:
        torch.distributed.barrier()
