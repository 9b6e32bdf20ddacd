"""Going back to an earlier step loses nothing, and age goes by what was written when."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framebridge_plugin.backbones.copying import link_tree, put_in_place
from framebridge_plugin.backbones.folders import find_saved_model
from framebridge_plugin.backbones.manifest import read_manifest
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.training.checkpoints import TrainingState
from tests.training.run_results import metrics
from tests.training.small_checkpoints import SmallRun, assert_equal


def test_what_came_later_is_set_aside_and_never_returned_to(tmp_path):
    first = SmallRun(tmp_path / "run").train_to(4)
    (first.output_dir / "checkpoints/step_000002/model/model_index.json").write_text("{}")
    before = first.tensors()
    back = SmallRun(first.output_dir)
    assert back.resume(2) == 2
    assert back.steps() == {1, 2}
    aside = first.output_dir / "abandoned/1-after-step-2"
    assert {path.name for path in aside.iterdir()} == {"step_000003", "step_000004", "metrics.jsonl"}
    assert [line["step"] for line in metrics(aside)] == [3, 4]
    assert [line["step"] for line in metrics(first.output_dir)] == [1, 2]
    back.train_to(3)
    again = SmallRun(first.output_dir)
    assert again.resume("latest") == 3
    assert_equal(again.train_to(4).tensors(), before)
    third = SmallRun(first.output_dir)
    assert third.resume(1) == 1
    assert {path.name for path in first.output_dir.glob("abandoned/2-after-step-1/*")} == {
        *("step_000002", "step_000003", "step_000004", "metrics.jsonl")
    }
    # A checkpoint that was set aside is one like the others.
    shutil.copytree(aside, tmp_path / "other/checkpoints")
    assert SmallRun(tmp_path / "other").resume("latest") == 4


@pytest.mark.parametrize("again", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_job_that_is_started_again_goes_back_once(tmp_path, monkeypatch, again):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run = SmallRun(tmp_path / "run").train_to(3)
    monkeypatch.setenv(again, "1")  # its first start ended before it went back
    back = SmallRun(run.output_dir)
    assert back.resume(1) == 1
    back.train_to(2)
    monkeypatch.setenv(again, "2")
    assert SmallRun(run.output_dir).resume(1) == 2
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    other = SmallRun(run.output_dir)
    assert other.resume(1) == 1
    other.train_to(3)
    monkeypatch.delenv(again)
    assert SmallRun(run.output_dir).resume(1) == 1


def publish(run: SmallRun) -> None:
    (run.output_dir / "model").mkdir()
    link_tree(run.output_dir / f"checkpoints/step_{run.step:06d}/model", run.output_dir / "model")


def test_what_a_run_had_come_to_is_not_its_model_once_it_goes_on_or_back(tmp_path):
    run = SmallRun(tmp_path / "run").train_to(3)
    publish(run)
    assert find_saved_model(run.output_dir) == run.output_dir / "model"
    further = SmallRun(run.output_dir)
    assert further.resume("auto") == 3
    assert find_saved_model(run.output_dir) == run.output_dir / "checkpoints/step_000003/model"
    further.train_to(4)
    publish(further)
    shutil.rmtree(run.output_dir / "checkpoints/step_000004")  # no checkpoint holds the model any more
    assert SmallRun(run.output_dir).resume(2) == 2
    assert find_saved_model(run.output_dir) == run.output_dir / "checkpoints/step_000002/model"
    assert (run.output_dir / "abandoned/1-after-step-2/model/model_index.json").is_file()


def test_a_line_that_a_kill_cut_short_is_not_kept(tmp_path):
    run = SmallRun(tmp_path / "run").train_to(2)
    with (run.output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert SmallRun(run.output_dir).resume("latest") == 2
    assert [line["step"] for line in metrics(run.output_dir)] == [1, 2]
    assert (run.output_dir / "abandoned/1-after-step-2/metrics.jsonl").read_text() == '{"step": 3, "lo'
    assert SmallRun(run.output_dir).resume("latest") == 2
    assert not (run.output_dir / "abandoned/2-after-step-2").exists()


def test_a_start_anew_sets_the_lines_of_a_run_without_checkpoints_aside(tmp_path):
    run = SmallRun(tmp_path / "run").train_to(1)
    shutil.rmtree(run.output_dir / "checkpoints")
    assert SmallRun(run.output_dir).resume("auto") is None
    assert metrics(run.output_dir) == []
    assert [line["step"] for line in metrics(run.output_dir / "abandoned/1-after-step-0")] == [1]


def test_the_limit_is_filled_with_live_checkpoints_first(tmp_path):
    run = SmallRun(tmp_path / "run", limit=3).train_to(5)
    assert run.steps() == {3, 4, 5}
    back = SmallRun(run.output_dir, limit=3)
    assert back.resume(3) == 3
    abandoned = run.output_dir / "abandoned/1-after-step-3"
    assert {path.name for path in abandoned.glob("step_*")} == {"step_000004", "step_000005"}
    back.train_to(4)
    assert {path.name for path in abandoned.glob("step_*")} == {"step_000005"}
    back.train_to(5)
    assert list(abandoned.glob("step_*")) == []
    assert (abandoned / "metrics.jsonl").is_file()
    assert back.steps() == {3, 4, 5}


def test_what_was_written_last_is_the_newest_whatever_its_number(tmp_path):
    run = SmallRun(tmp_path / "run", limit=2).train_to(3)
    run.checkpointer.mark_finite()
    run.checkpointer.save(TrainingState(1, 2))
    assert run.steps() == {1, 3}
    for folder in run.output_dir.glob("checkpoints/*/model"):
        (folder / "model_index.json").write_text("{}")
    assert find_saved_model(run.output_dir) == run.output_dir / "checkpoints/step_000001/model"
    assert SmallRun(run.output_dir).resume("latest") == 1


def test_the_last_checkpoint_with_a_finite_next_update_is_kept(tmp_path):
    run = SmallRun(tmp_path / "run", limit=2).train_to(2)  # 1 is known to be good, 2 not yet
    again = SmallRun(run.output_dir, limit=2)
    assert again.resume("latest") == 2
    for step in (3, 4, 5):
        again.checkpointer.save(TrainingState(step, step))
    assert again.steps() == {1, 4, 5}
    third = SmallRun(run.output_dir, limit=2)
    assert third.resume("latest") == 5
    third.train_to(7)
    assert third.steps() == {6, 7}


def test_saving_a_step_again_keeps_the_old_one_until_the_new_one_stands(tmp_path, monkeypatch):
    run = SmallRun(tmp_path / "run").train_to(2)
    folder, rename = run.output_dir / "checkpoints/step_000002", os.rename
    written = read_manifest(folder).written
    for made in (0, 1):
        shutil.copytree(folder, new := folder.with_name(".step_000002.partial"))
        left = iter(range(made))

        def stop(*paths: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            rename(*paths)

        monkeypatch.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            put_in_place(new, folder)
        monkeypatch.setattr(os, "rename", rename)
        assert SmallRun(run.output_dir).resume("latest") == 2
        assert read_manifest(folder).written == written
        assert {path.name for path in folder.parent.iterdir()} == {"step_000001", "step_000002"}
    run.checkpointer.save(TrainingState(2, 4))
    assert read_manifest(folder).written == 3
    assert {path.name for path in folder.parent.iterdir()} == {"step_000001", "step_000002"}


def test_publishing_from_a_folder_that_is_gone_fails(tmp_path):
    with pytest.raises(FrameBridgeError, match="nothing can be taken from .*manifest.json is missing"):
        link_tree(tmp_path / "gone", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_start_from_nothing_makes_no_folder(tmp_path: Path):
    run = SmallRun(tmp_path / "run")
    tmp_path.joinpath("run").mkdir()
    for which in (None, "latest", "auto"):
        assert run.resume(which) is None
    with pytest.raises(FrameBridgeError, match=r"no checkpoint 3 in .*\(steps there: none\)"):
        run.resume(3)
    assert not (run.output_dir / "abandoned").exists()
