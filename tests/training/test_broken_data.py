"""A real run over a folder with broken files ends well and says what it met, or stops and says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.data_layer.broken_files import KINDS
from tests.training.run_results import losses, metrics, succeeded

BROKEN = ("text", "empty", "cut at tail")


def add_broken(folder: Path, kinds: tuple[str, ...], copies: int = 1) -> set[str]:
    """Put broken files beside the clips.

    Returns:
        Their paths.
    """
    paths = {folder / f"{kind.replace(' ', '_')}_{number}.mp4": kind for kind in kinds for number in range(copies)}
    with (folder / "metadata.csv").open("a") as table:
        for path, kind in paths.items():
            KINDS[kind].make(path)
            table.write(f"{path.name},{kind}\n")
    return set(map(str, paths))


@pytest.fixture
def clips(clips_folder, tmp_path) -> Path:
    return shutil.copytree(clips_folder, tmp_path / "some broken")


def found(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "bad_files.jsonl").read_text().splitlines()]


def test_a_run_ends_well_resumes_and_precomputes_over_broken_files(train, clips, tmp_path, caplog):
    broken = add_broken(clips, BROKEN)
    data = f"framebridge.data.data_root={clips}"
    # One epoch: eight files, of which five can be read.
    assert succeeded(train(data, "dataloader.dataloader_num_workers=1", output="whole"))
    whole = tmp_path / "whole"
    counts = [entry["bad_files"] for entry in metrics(whole)]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    assert {entry["path"] for entry in found(whole)} == broken
    assert {entry["kind"] for entry in found(whole)} == {"not_video", "empty"}
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("framebridge_plugin.data")]
    assert len(logged) == 3
    assert {message.split(": ")[0].removeprefix("cannot read the clip ") for message in logged} == broken
    assert json.loads((whole / "dataset_config.json").read_text())["bad_files"]["policy"] == "skip"

    # As if it was killed after the checkpoint of the second update.
    killed = shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(killed / "checkpoints/step_000004")
    assert succeeded(train(data, "checkpoints.resume_from_checkpoint=latest", output="killed"))
    assert losses(killed) == losses(whole)
    assert [entry["bad_files"] for entry in metrics(killed)] == counts
    assert found(killed) == found(whole)

    precomputation = ("dataset.enable_precomputation=true", "dataset.precomputation_items=4")
    assert succeeded(train(data, *precomputation, output="precomputed"))
    assert losses(tmp_path / "precomputed") == losses(whole)
    assert metrics(tmp_path / "precomputed")[-1]["bad_files"] == 3


def test_a_later_run_leaves_out_what_is_in_quarantine(train, clips, tmp_path, caplog):
    broken = add_broken(clips, BROKEN)
    quarantine = tmp_path / "lists/quarantine.jsonl"
    options = (
        f"framebridge.data.data_root={clips}",
        "framebridge.bad_files.policy=quarantine",
        f"framebridge.bad_files.quarantine_file={quarantine}",
    )
    assert succeeded(train(*options, output="first"))
    assert {json.loads(line)["path"] for line in quarantine.read_text().splitlines()} == broken
    assert succeeded(train(*options, output="second"))
    logged = f"3 files in quarantine are left out; they are listed in {tmp_path / 'second/quarantined.jsonl'}"
    assert logged in [record.getMessage() for record in caplog.records]
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    assert {entry["bad_files"] for entry in metrics(tmp_path / "second")} == {0}


def test_a_run_over_little_else_stops_with_a_report(train, clips, tmp_path):
    broken = add_broken(clips, BROKEN, copies=20)
    options = (f"framebridge.data.data_root={clips}", "framebridge.bad_files.max_in_a_row=6")
    result = train(*options, "dataloader.dataloader_num_workers=1")
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: 6 clips in a row cannot be read"
    shown = [line.removeprefix("error:   ").split(": ") for line in errors[1:6]]
    assert len({path for path, *_ in shown} & broken) == 5
    assert {kind for _, kind, *_ in shown} <= {"not_video", "empty"}
    assert errors[6].endswith(f"so far: {tmp_path / 'run/bad_files.jsonl'}")
    assert "framebridge.bad_files.max_in_a_row" in errors[7]
    assert {path for path, *_ in shown} <= {entry["path"] for entry in found(tmp_path / "run")}
