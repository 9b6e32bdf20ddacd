"""What the trainer writes, keeps and resumes from, and what it refuses to write over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from framebridge_plugin import folder_lock
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.folder_lock import FolderLock
from tests.training.conftest import small_files_only
from tests.training.run_results import CONSTANT_RATE, accept_changes, losses, metrics, succeeded


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_nothing_half_written(train, tmp_path):
    with small_files_only():
        result = train()
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot copy")
    assert list((tmp_path / "run/components").iterdir()) == []
    assert succeeded(train("optimization.train_steps=2"))
    with small_files_only():
        result = train("checkpoints.resume_from_checkpoint=latest")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot write checkpoint")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000002"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(train, tmp_path, monkeypatch):
    def nearly_full(path: Path) -> Any:
        return disk_usage(path)._replace(free=64 * 2**20)

    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    result = train()
    assert result.returncode == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: cannot write a checkpoint: it takes 6")
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(train, tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", noting)
    assert succeeded(train("optimization.train_steps=1"))
    folder = tmp_path / "run/checkpoints/step_000001"
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {"manifest.json", "model/transformer", "trainer/optimizer.safetensors"} < paths
    partial = str(folder.with_name(".step_000001.partial"))
    order = [path.removeprefix(partial).removeprefix("/") for path in flushed if path.startswith(partial)]
    assert {*order} == {*paths, ""}
    # A folder after what is in it, then the folder that has the new name in it.
    assert all(order.index(path) < order.index(str(Path(path).parent).removeprefix(".")) for path in paths)
    assert flushed.index(str(folder.parent)) > flushed.index(partial)


def test_the_newest_checkpoints_are_kept_and_the_last_is_resumed_whatever_their_digits(train, tmp_path):
    options = (*CONSTANT_RATE, "checkpoints.checkpointing_steps=1")
    assert succeeded(train(*options, "optimization.train_steps=2"))
    folder = tmp_path / "run/checkpoints"
    # As if they were from the end of a run of a million updates.
    for step, later in ((1, 999_999), (2, 1_000_000)):
        renamed = (folder / f"step_{step:06d}").rename(folder / f"step_{later:06d}")
        state = json.loads((renamed / "trainer/state.json").read_text())
        (renamed / "trainer/state.json").write_text(json.dumps(state | {"step": later}))
        accept_changes(renamed)
    resume = ("checkpoints.resume_from_checkpoint=latest", "optimization.train_steps=1000001")
    assert succeeded(train(*options, *resume, "checkpoints.checkpointing_limit=2"))
    assert {path.name for path in folder.iterdir()} == {"step_1000000", "step_1000001"}
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1, 2, 1_000_001]


def test_the_same_command_starts_and_goes_on_and_another_run_is_refused(train, tmp_path):
    run = tmp_path / "run"
    result = train("optimization.train_steps=2", "checkpoints.resume_from_checkpoint=latest")
    assert succeeded(result)
    assert f"no checkpoint in {run / 'checkpoints'}: starting at update 1" in result.stderr
    identity = json.loads((run / "run.json").read_text())
    shutil.rmtree(run / "checkpoints")  # as if it was killed before the first
    assert succeeded(train("optimization.train_steps=2"))
    first = losses(run)
    result = train()
    assert succeeded(result)
    assert "going on after update 2; to start anew, choose another checkpoints.output_dir" in result.stderr
    assert [entry["step"] for entry in metrics(run)] == [1, 2, 3, 4]
    assert losses(run)[:2] == first
    assert json.loads((run / "run.json").read_text()) == identity

    # What makes it another run is not whether there are checkpoints.
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    other = train("training.seed=8")
    dry = train("training.seed=8", "--dry-run")
    assert other.returncode == dry.returncode == 1
    (line,) = (line for line in other.stderr.splitlines() if line.startswith("error: "))
    assert f"the folder of run {identity['id'][:8]}: it was trained" in line
    assert "with seed 7" in line
    assert dry.stderr.splitlines()[-1] == line
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not list(run.glob(".*"))

    (run / "run.json").unlink()
    foreign = train("training.seed=8")
    assert foreign.returncode == 2
    assert f"{run / 'model'} is of no run that could go on" in foreign.stderr


HOLDER = """
import sys, time
from pathlib import Path
from framebridge_plugin import folder_lock
folder_lock.BEAT_S = 0.1
with folder_lock.FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_do_not_share_a_folder(train, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = train()
        assert refused.returncode == 1
        assert f"{run} is in use by process {holder.pid} on " in refused.stderr
        assert [path.name for path in run.iterdir()] == [".lock"]

        # It ends when it finds another one's lock in place of its own, and writes no more.
        (run / ".lock").unlink()
        (run / ".lock").write_text("another one's")
        assert holder.wait(60) == 1
        assert "its lock was taken" in holder.stderr.read()
        assert (run / ".lock").read_text() == "another one's"

    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    with FolderLock(run):
        pass  # free at once
    assert list(run.iterdir()) == []


def test_a_lock_of_another_machine_is_free_without_a_heartbeat(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder_lock, "FREE_AFTER_S", 3.0)
    owner = {"host": "elsewhere", "machine": "another", "pid": 1, "token": "x", "time": 0.0}
    (tmp_path / ".lock").write_text(json.dumps(owner))

    def beat() -> None:
        (tmp_path / ".lock").write_text(json.dumps(owner | {"time": 1.0}))

    threading.Timer(0.5, beat).start()
    with pytest.raises(FrameBridgeError, match="is in use by process 1 on elsewhere"), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert "waiting for a sign of it" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_in_one_line(train, tmp_path):
    assert succeeded(train("optimization.train_steps=2"))
    file = next((tmp_path / "run/checkpoints/step_000002").rglob("optimizer.safetensors"))
    os.truncate(file, file.stat().st_size // 2)
    result = train("checkpoints.resume_from_checkpoint=latest")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot resume from")
    assert "Traceback" not in result.stderr


def test_a_resume_with_another_objective_is_refused(train, tmp_path):
    assert succeeded(train("optimization.train_steps=2"))
    result = train("checkpoints.resume_from_checkpoint=latest", "framebridge.target=eps_psi")
    assert result.returncode == 1
    assert "it was trained with target 'v'" in result.stderr
    dry = train("checkpoints.resume_from_checkpoint=latest", "framebridge.target=eps_psi", "--dry-run")
    assert (dry.returncode, dry.stderr.splitlines()[-1]) == (1, result.stderr.splitlines()[-1])
    assert train("checkpoints.resume_from_checkpoint=latest", "--dry-run").returncode == 0
    missing = train("checkpoints.resume_from_checkpoint=7", "--dry-run")
    assert missing.returncode == 1
    assert "(steps there: 2)" in missing.stderr
