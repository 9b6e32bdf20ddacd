"""Signals, killed and hung processes, with real processes; and what they leave for the next start."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.training.conftest import command_environment
from tests.training.run_results import CONSTANT_RATE, assert_same_weights, losses, metrics, succeeded

LONG = (*CONSTANT_RATE, "optimization.train_steps=100000", "checkpoints.checkpointing_steps=100000")


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        command,
        env=command_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell in the background hands on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def command(recipe: Path, run: Path, *options: str) -> list[str]:
    program = [sys.executable, "-m", "framebridge_plugin", "train", f"--recipe={recipe}"]
    return [*program, f"checkpoints.output_dir={run}", *options]


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    return metrics(run)[-1]["step"] if file.is_file() and file.stat().st_size else 0


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    children = [int(child) for child, parent in zip(found[::2], found[1::2], strict=True) if int(parent) == pid]
    return [*children, *(below for child in children for below in descendants(child))]


def ranks(launcher: subprocess.Popen) -> dict[int, int]:
    """The pid of each rank that it has started."""
    found = {}
    for pid in descendants(launcher.pid):
        with contextlib.suppress(OSError):
            parts = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = dict(part.split(b"=", 1) for part in parts if b"=" in part).get(b"RANK")
            if rank is not None:
                found.setdefault(int(rank), pid)
    return found


def listening(pid: int) -> set[str]:
    """The addresses at which a process listens, in hexadecimal."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and line[9] in sockets}


LOOPBACK = {"0100007F", "0" * 24 + "01000000"}


def is_gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, "a process has survived"
        time.sleep(0.1)


def test_a_signal_ends_the_run_after_a_checkpoint_and_the_next_start_goes_on(train, recipe_file, tmp_path):
    run = tmp_path / "run"
    options = (*LONG, "dataloader.dataloader_num_workers=2")
    with started(*command(recipe_file, run, *options)) as process:
        wait_for(lambda: last_step(run) >= 2, process)
        workers = descendants(process.pid)
        assert len(workers) == 2
        assert listening(process.pid) <= LOOPBACK
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, which tells all processes
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143
    step = last_step(run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{step:06d}"
    line = f"stopped by SIGTERM after update {step}, which is saved in {checkpoint}; the same command goes on"
    assert stderr.splitlines()[-1] == line
    assert "Traceback" not in stderr
    wait_for_end(workers)
    assert not (run / "model").exists()
    assert [path.name for path in run.glob(".*")] == []

    more = (*LONG, f"optimization.train_steps={step + 2}")
    assert succeeded(train(*more))
    assert succeeded(train(*more, output="whole"))
    assert losses(run) == losses(tmp_path / "whole")
    assert_same_weights(run / "model", tmp_path / "whole/model")


def test_a_validation_is_abandoned_and_a_second_signal_ends_at_once(recipe_file, validation_file, tmp_path):
    run, rows = tmp_path / "run", tmp_path / "long.csv"
    rows.write_text(validation_file.read_text().replace(",2\n", ",1000\n"))
    options = (*LONG, f"validation.validation_dataset_file={rows}", "validation.validation_steps=2")
    with started(*command(recipe_file, run, *options)) as process:
        wait_for((run / "validation").is_dir, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]

    run = tmp_path / "other"
    options = ("dataloader.dataloader_num_workers=1", "training.gradient_accumulation_steps=100000")
    with started(*command(recipe_file, run, *LONG, *options)) as process:
        wait_for(lambda: (run / "run.json").is_file() and len(descendants(process.pid)) == 1, process)
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)  # nearer together they would be one
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 143
    assert stderr.splitlines()[-1] == "ended at once by a second signal"
    wait_for_end(below)


def test_several_processes_agree_to_stop_and_a_hung_one_is_named(recipe_file, tmp_path):
    run = tmp_path / "run"
    options = (*LONG, "--nproc=2", "checkpoints.stop_on_sigusr1=true")
    with started(*command(recipe_file, run, *options)) as process:
        wait_for((run / ".lock").is_file, process)
        with started(*command(recipe_file, run, *options)) as second:
            _, stderr = second.communicate(timeout=120)
        assert second.returncode == 1
        assert f"error: {run} is in use by process {ranks(process)[0]} on " in stderr
        # Which has hurt nobody.
        wait_for(lambda: last_step(run) >= 2, process)
        assert set().union(*map(listening, ranks(process).values())) == {"0100007F"}
        process.send_signal(signal.SIGUSR1)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    first = last_step(run)
    assert f"stopped by SIGUSR1 after update {first}" in stderr

    with started(*command(recipe_file, run, *options, "parallelism.heartbeat_timeout=5")) as process:
        wait_for(lambda: last_step(run) > first + 1, process)
        stopped = ranks(process)[1]
        os.kill(stopped, signal.SIGSTOP)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"error: rank 1 (process {stopped} on " in stderr
    assert "has shown no sign of life for" in stderr
    wait_for_end([stopped])

    # What it has left holds up nobody. One of them alone is told.
    (run / ".heartbeats/rank0.json").rename(run / ".heartbeats/rank2.json")
    assert (run / ".lock").is_file()
    (run / "metrics.jsonl").unlink()
    with started(*command(recipe_file, run, *options)) as process:
        wait_for(lambda: last_step(run) > first + 1, process)
        os.kill(ranks(process)[1], signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "waiting" not in stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        f"step_{n:06d}" for n in (first, last_step(run))
    }
    assert [path.name for path in run.glob(".*")] == []


INTERRUPTED_IMPORT = """
import os, signal, sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_IMPORT"]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException as error:
                raise RuntimeError("an error that a library makes of it") from error


sys.meta_path.insert(0, Finder())
"""


def test_a_signal_at_the_start_ends_it_in_one_word(recipe_file, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for number, code in ((signal.SIGINT, 130), (signal.SIGUSR1, 0)):
        with started(*command(recipe_file, run, "--nproc=2", "checkpoints.stop_on_sigusr1=true")) as process:
            wait_for(lambda: ranks(process), process)  # Python is hardly there
            process.send_signal(number)
            _, stderr = process.communicate(timeout=120)
        assert (process.returncode, stderr.split()) == (code, ["interrupted"] * 2)

    # Python runs this file before anything else.
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    for module in ("framebridge_plugin.cli", "diffusers"):
        monkeypatch.setenv("INTERRUPTED_IMPORT", module)
        with started(*command(recipe_file, run)) as process:
            _, stderr = process.communicate(timeout=120)
        assert (process.returncode, stderr) == (130, "interrupted\n")
    assert list(run.iterdir()) == []


def test_a_killed_process_is_started_again_by_torchrun_and_ends_with_the_same_bits(recipe_file, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = (*CONSTANT_RATE, "optimization.train_steps=30", "checkpoints.checkpointing_steps=5")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=2",
    ]
    arguments = ["-m", "framebridge_plugin", *command(recipe_file, run, *options)[3:]]
    with started(*torchrun, *arguments) as process:
        for kills, step in enumerate((7, 17)):
            wait_for(lambda step=step: last_step(run) >= step, process)
            os.kill(ranks(process)[1 - kills], signal.SIGKILL)
            wait_for(lambda step=step: last_step(run) < step or last_step(run) > step + 8, process)
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    assert stderr.count("going on after update") == 2
    with started(*command(recipe_file, whole, *options, "--nproc=2")) as process:
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    assert losses(run) == losses(whole)
    assert_same_weights(run / "checkpoints/step_000030", whole / "checkpoints/step_000030")
