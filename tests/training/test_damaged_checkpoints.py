"""Whatever happens to a file of a checkpoint is seen before anything is trained on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from framebridge_plugin.errors import FrameBridgeError
from tests.training.run_results import CONSTANT_RATE, losses, metrics, succeeded
from tests.training.small_checkpoints import SmallRun, assert_equal

READ = {
    False: {"trainer/optimizer.safetensors", "model/transformer/diffusion_pytorch_model.safetensors"},
    True: {"trainer/optimizer.safetensors", "trainer/weights.safetensors", "trainer/ema.safetensors"},
}
"""What a resume reads besides the manifest and state.json, by whether there is an average."""


def truncate(share: float):
    def damage(path: Path) -> None:
        os.truncate(path, int(share * path.stat().st_size))

    return damage


def flip(share: float):
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1 << 4
        path.write_bytes(content)

    return damage


DAMAGES = {
    **{f"truncated at {share:.0%}": truncate(share) for share in (0, 0.5, 0.99)},
    **{f"a bit flipped at {share:.0%}": flip(share) for share in (0, 0.6, 1)},
    "deleted": Path.unlink,
}


def refusal_of(run: SmallRun, which: int) -> str | None:
    try:
        run.resume(which)
    except FrameBridgeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("ema", [False, True], ids=["weights", "average"])
def test_every_damage_to_every_file_falls_back_or_changes_nothing(tmp_path, ema):
    run = SmallRun(tmp_path / "run", ema=ema)
    good = {step: run.train_to(step).tensors() for step in (1, 2)}
    newest = run.output_dir / "checkpoints/step_000002"
    files = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert READ[ema] | {"manifest.json", "trainer/state.json", "model/manifest.json"} < files
    outcomes = {}
    for name in sorted(files):
        for damage, harm in DAMAGES.items():
            output_dir = shutil.copytree(run.output_dir, tmp_path / "harmed")
            path = output_dir / "checkpoints/step_000002" / name
            harm(path)
            explicit = SmallRun(output_dir, ema=ema)
            if (refusal := refusal_of(explicit, 2)) is not None:
                assert str(path) in refusal, (name, damage)
                assert "\n" not in refusal
                assert explicit.steps() == {1, 2}  # nothing is moved, nothing taken in its place
                fresh = SmallRun(output_dir, ema=ema)
                assert fresh.resume("latest") == 1
                assert_equal(fresh.tensors(), good[1])
                assert (output_dir / "abandoned/1-after-step-1/step_000002").is_dir()
                assert fresh.steps() == {1}
                outcomes[name, damage] = "fell back"
            else:
                assert_equal(explicit.tensors(), good[2])
                outcomes[name, damage] = "bit-equal"
            shutil.rmtree(output_dir)
    unread = {name for name, _ in outcomes} - READ[ema] - {"manifest.json", "trainer/state.json"}
    equal = {case for case, outcome in outcomes.items() if outcome == "bit-equal"}
    # Only another bit in what is not read goes unseen; `sample --verify` sees that.
    assert equal == {(name, damage) for name in unread for damage in DAMAGES if damage.startswith("a bit")}


def test_folders_that_are_no_checkpoints_are_in_nobodys_way(tmp_path):
    run = SmallRun(tmp_path / "run").train_to(2)
    (run.output_dir / "checkpoints/step_000099").mkdir()
    (run.output_dir / "checkpoints/.step_000003.partial/trainer").mkdir(parents=True)
    again = SmallRun(run.output_dir)
    with pytest.raises(FrameBridgeError, match=r"step_000099/manifest.json is missing"):
        again.resume(99)
    assert again.resume("latest") == 2
    assert {path.name for path in (run.output_dir / "checkpoints").iterdir()} == {"step_000001", "step_000002"}
    assert (run.output_dir / "abandoned/1-after-step-2/step_000099").is_dir()


@pytest.mark.parametrize("name", ["manifest.json", "trainer/state.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path, name):
    run = SmallRun(tmp_path / "run").train_to(2)
    (run.output_dir / "checkpoints/step_000002" / name).unlink()
    os.mkfifo(run.output_dir / "checkpoints/step_000002" / name)
    assert SmallRun(run.output_dir).resume("auto") == 1


def test_a_copy_under_another_number_is_not_that_step(tmp_path):
    run = SmallRun(tmp_path / "run").train_to(3)
    shutil.copytree(run.output_dir / "checkpoints/step_000002", run.output_dir / "checkpoints/step_000007")
    with pytest.raises(FrameBridgeError, match=r"step_000007 is a copy of the checkpoint of update 2"):
        SmallRun(run.output_dir).resume(7)
    assert SmallRun(run.output_dir).resume("auto") == 3


def test_none_left_is_an_error_and_nothing_is_moved(tmp_path):
    run = SmallRun(tmp_path / "run").train_to(2)
    for file in run.output_dir.rglob("optimizer.safetensors"):
        flip(0.9)(file)
    for which in ("latest", "auto"):
        with pytest.raises(FrameBridgeError, match="no checkpoint is whole"):
            SmallRun(run.output_dir).resume(which)
    assert run.steps() == {1, 2}
    for file in run.output_dir.rglob("optimizer.safetensors"):
        file.unlink()
    with pytest.raises(FrameBridgeError, match=r"optimizer.safetensors is missing; no checkpoint is whole"):
        SmallRun(run.output_dir).resume("latest")


def test_a_checkpoint_without_a_manifest_is_not_taken(tmp_path):
    run = SmallRun(tmp_path / "run").train_to(1)
    (run.output_dir / "checkpoints/step_000001/manifest.json").unlink()
    with pytest.raises(FrameBridgeError, match=r"manifest.json is missing: the folder is not whole, or of an earlier"):
        SmallRun(run.output_dir).resume("latest")


def test_other_settings_are_refused_and_no_reason_to_fall_back(tmp_path):
    run = SmallRun(tmp_path / "run").train_to(2)
    with pytest.raises(FrameBridgeError, match="it was trained with seed 7"):
        SmallRun(run.output_dir, settings={"seed": {"seed": 8}}).resume("latest")
    assert run.steps() == {1, 2}


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(train, tmp_path, caplog):
    assert succeeded(train(*CONSTANT_RATE, output="whole"))
    assert succeeded(train(*CONSTANT_RATE))
    flip(0.7)(tmp_path / "run/checkpoints/step_000004/trainer/optimizer.safetensors")
    assert succeeded(train(*CONSTANT_RATE, "checkpoints.resume_from_checkpoint=latest"))
    assert "step_000004 is set aside, and the checkpoint before it taken" in caplog.text
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "run/abandoned/1-after-step-2")] == [3, 4]
