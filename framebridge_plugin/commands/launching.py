"""Several processes of one command on this machine, as torchrun would start them, for `--nproc`.

They end together: when one of them fails, when the command is interrupted, and also when it is killed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from framebridge_plugin.errors import FrameBridgeError

_LAUNCHED = "FRAMEBRIDGE_LAUNCHED"
_SECONDS_TO_END = 10


def launch(arguments: Sequence[str], count: int) -> int:
    """Run the command `finetrainers` in several processes, with the environment that torchrun gives each.

    On a CPU they divide the threads. The result is 0, or the exit code of the process that failed first, which has
    said why; the others are ended.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or processors)
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": str(max(1, threads // count)),
        _LAUNCHED: "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "framebridge_plugin", *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            # Nothing is written to it: it closes when this process ends, in whatever way.
            stdin=subprocess.PIPE,
            # Ctrl-C comes to this process alone, which ends the others.
            start_new_session=True,
        )
        for rank in range(count)
    ]
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = next((code for code in codes if code), None)
            if failed is not None and failed < 0:
                raise FrameBridgeError(
                    f"process {codes.index(failed)} of {count} was killed by signal {-failed}, perhaps for want of "
                    "memory; run the command again, it goes on where it was"
                )
            if failed is not None or all(code == 0 for code in codes):
                return failed or 0
            time.sleep(0.1)
    finally:
        _end(processes)


def end_with_launcher() -> None:
    """Makes this process end when the one that launched it does; without effect in a process that none launched."""
    if os.environ.get(_LAUNCHED) is None:
        return

    def wait() -> None:
        os.read(0, 1)  # returns when the other end is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _end(processes: Sequence[subprocess.Popen]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    if running:
        print(file=sys.stderr)  # what comes next does not belong into their progress bar
    deadline = time.monotonic() + _SECONDS_TO_END
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
