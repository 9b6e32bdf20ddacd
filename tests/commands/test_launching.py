"""Several processes of one command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from framebridge_plugin.commands.launching import launch, starts_processes
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.processes import adopt_slurm, first_node

ROOT = Path(__file__).parents[2]


def test_they_end_well(capfd):
    assert launch(["recipes"], 2) == 0
    output = capfd.readouterr().out  # lines of the two may run into each other
    assert output.count("quickstart ") == 2


def test_the_exit_code_is_that_of_the_first_failure(capfd):
    assert launch(["train", "--nonsense"], 2) == 2
    assert "error:" in capfd.readouterr().err


def test_a_killed_process_is_told_from_one_that_failed(monkeypatch, tmp_path):
    # Python runs this file before anything else.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FrameBridgeError, match="process 1 of 2 was killed by signal 9"):
        launch(["recipes"], 2)


def test_nothing_in_the_working_directory_is_imported(monkeypatch, tmp_path, capfd):
    # As the command does, whose own path holds its folder and not the working directory.
    monkeypatch.setattr(sys, "path", [str(ROOT), *(path for path in sys.path if path not in ("", os.getcwd()))])
    for name in ("yaml", "pydantic", "framebridge_plugin"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    assert launch(["train", "--recipe=quickstart", "training.seed=x"], 2) == 2
    error = capfd.readouterr().err
    assert "training.seed" in error
    assert "imported from" not in error


def test_what_torchrun_or_srun_has_started_is_used(monkeypatch):
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    environment = step | {"SLURM_STEP_NODELIST": "gpu[07-09,12],login1"}
    adopt_slurm(environment)
    found = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert found == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    assert first_node("a-1,a-2") == "a-1"
    for unchanged in (
        step | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun within srun
        {name: value for name, value in step.items() if name != "SLURM_STEP_ID"},  # the script of sbatch
        step | {"SLURM_NTASKS": "1"},
    ):
        before = dict(unchanged)
        adopt_slurm(unchanged)
        assert unchanged == before

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert starts_processes(2)
    assert not starts_processes(None)
    assert not starts_processes(1)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert not starts_processes(16)
    assert not starts_processes(8)
    with pytest.raises(UsageError, match="has started 16 processes already"):
        starts_processes(4)
