"""Several processes of one command on this machine, as torchrun would start them, for `--nproc`.

They end together: when one of them fails, when the command is told to stop, and also when it is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence

from framebridge_plugin import signals
from framebridge_plugin.errors import FrameBridgeError, UsageError, say
from framebridge_plugin.processes import STORE, python_command

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_SECONDS_TO_END = 15
"""What is left of a failed command; a process that notices by itself needs no more than 10 seconds."""


def starts_processes(wanted: int | None) -> bool:
    """Whether the command is to start that many processes; what torchrun or srun has started is used, or refused."""
    if wanted is None:
        return False
    found = os.environ.get("WORLD_SIZE")
    if found is None:
        return wanted > 1
    if str(wanted) not in (found, os.environ.get("LOCAL_WORLD_SIZE")):
        raise UsageError(
            f"--nproc {wanted}: torchrun or srun has started {found} processes already (WORLD_SIZE); leave it out"
        )
    return False


def launch(arguments: Sequence[str], count: int) -> int:
    """Run the command `finetrainers` in several processes, with the environment that torchrun gives each.

    They find each other by a file, and talk on this machine alone. On a CPU they divide the threads. A signal is
    passed on to them, and they have as long as they need; the second one ends them. The result is 0, or the exit code
    of the process that failed first, which has said why; the others are ended.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or processors)
    command, environment = python_command("framebridge_plugin", *arguments)
    with tempfile.TemporaryDirectory(prefix="framebridge-") as private, signals.deferred():
        environment |= {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            STORE: os.path.join(private, "store"),
            "OMP_NUM_THREADS": str(max(1, threads // count)),
        }
        with signals.blocked():
            processes = [
                subprocess.Popen(
                    command,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    # Nothing is written to it: it closes when this process ends, in whatever way.
                    stdin=subprocess.PIPE,
                    # Ctrl-C comes to this process alone, which passes it on.
                    start_new_session=True,
                )
                for rank in range(count)
            ]
        try:
            return _wait(processes)
        finally:
            _end(processes)


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    told = None
    while True:
        if told is None and (told := signals.pending()) is not None:
            for process in processes:
                process.send_signal(told)
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code and code not in _STOPPED), None)
        # Told to stop, be it one of them, they save what they have, and need not end at the same time.
        if None not in codes or (failed is not None and told is None):
            break
        time.sleep(0.1)
    if failed is None or failed > 0:
        return failed or next(filter(None, codes), 0)
    if told is not None:
        return 128 - failed
    raise FrameBridgeError(
        f"process {codes.index(failed)} of {len(codes)} was killed by signal {-failed}, perhaps for want of memory; "
        "run the command again, it goes on where it was"
    )


def end_with_launcher() -> None:
    """Makes this process end when the one that launched it does; without effect in a process that none launched."""
    if os.environ.get(STORE) is None:
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
        say()  # what comes next does not belong into their progress bar
    deadline = time.monotonic() + _SECONDS_TO_END
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
