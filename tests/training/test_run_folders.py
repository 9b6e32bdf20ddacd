"""What the trainer writes, keeps and resumes from, and what it refuses to write over."""

from __future__ import annotations

import json
import os

import yaml

from tests.training.conftest import small_files_only
from tests.training.run_results import CONSTANT_RATE, metrics, succeeded


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_nothing_half_written(train, tmp_path):
    with small_files_only():
        result = train()
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot write checkpoint")
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(train, tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", noting)
    assert succeeded(train("optimization.train_steps=1"))
    folder = tmp_path / "run/checkpoints/step_000001"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    partial = str(folder.with_name(".step_000001.partial"))
    assert {file.removeprefix(f"{partial}/") for file in flushed if file.startswith(partial)} == files


def test_the_newest_checkpoints_are_kept_and_the_last_is_resumed_whatever_their_digits(train, tmp_path):
    options = (*CONSTANT_RATE, "checkpoints.checkpointing_steps=1")
    assert succeeded(train(*options, "optimization.train_steps=2"))
    folder = tmp_path / "run/checkpoints"
    # As if they were from the end of a run of a million updates.
    for step, later in ((1, 999_999), (2, 1_000_000)):
        renamed = (folder / f"step_{step:06d}").rename(folder / f"step_{later:06d}")
        state = json.loads((renamed / "trainer/state.json").read_text())
        (renamed / "trainer/state.json").write_text(json.dumps(state | {"step": later}))
    resume = ("checkpoints.resume_from_checkpoint=latest", "optimization.train_steps=1000001")
    assert succeeded(train(*options, *resume, "checkpoints.checkpointing_limit=2"))
    assert {path.name for path in folder.iterdir()} == {"step_1000000", "step_1000001"}
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1, 2, 1_000_001]


def test_a_run_is_not_overwritten(train, tmp_path):
    assert succeeded(train("optimization.train_steps=2"))
    again = train()
    dry = train("--dry-run")
    assert again.returncode == dry.returncode == 2
    assert "holds the checkpoints of another run" in again.stderr
    assert dry.stderr == again.stderr
    assert yaml.safe_load(dry.stdout)["optimization"]["train_steps"] == 4


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
