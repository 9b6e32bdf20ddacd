"""How the rows of a validation file are shared by the processes and written, and what becomes of errors."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import av
import torch
from PIL import Image

from framebridge_plugin import register
from framebridge_plugin.training.validation import ValidationVideo, sample_validation_videos
from tests.training.run_results import assert_same_weights, losses, metrics, succeeded

register()

from finetrainers.data import VideoArtifact  # noqa: E402
from finetrainers.trackers import initialize_trackers  # noqa: E402

from framebridge_plugin.training.trackers import OptionalTracker, _service_processes  # noqa: E402

ROWS = [
    {"prompt": "one", "image": Image.new("RGB", (16, 16), (200, 30, 30))},
    {"prompt": "two", "image": Image.new("RGB", (16, 16)), "export_fps": 5.0},
    {"prompt": "three", "image": Image.new("RGB", (16, 16)), "export_fps": None},
]


def validate(folder: Path, rank: int, world_size: int) -> tuple[list[ValidationVideo], list[tuple[str, int]]]:
    """What one process writes, and the prompts that it samples with the seeds of their generators."""
    calls = []

    def validation(*, pipeline: Any, generator: torch.Generator, prompt: str, image: Image.Image) -> list[Any]:
        calls.append((prompt, generator.initial_seed()))
        return [VideoArtifact(value=[image] * 3)]

    place = {"rank": rank, "world_size": world_size}
    written = sample_validation_videos(ROWS, None, validation, folder, fps=8.0, label="final", seed=7, **place)
    return written, calls


def test_videos_have_the_rate_of_their_row_or_of_the_clips(tmp_path):
    written, _ = validate(tmp_path, 0, 1)
    assert [(item.number, item.caption) for item in written] == [(0, "one"), (1, "two"), (2, "three")]
    rates = []
    for item in written:
        with av.open(str(item.video)) as container:
            rates.append(float(container.streams.video[0].average_rate))
        assert item.sheet.is_file()
    assert rates == [8.0, 5.0, 8.0]


def test_all_processes_make_as_many_calls_and_write_each_video_once(tmp_path):
    _, alone = validate(tmp_path, 0, 1)
    assert len({seed for _, seed in alone}) == len(ROWS)
    shares = [validate(tmp_path, rank, 2) for rank in range(2)]
    assert [[item.number for item in written] for written, _ in shares] == [[0, 2], [1]]
    assert [calls for _, calls in shares] == [[alone[0], alone[2]], [alone[1], alone[0]]]


# In a run


def test_a_validation_that_fails_does_not_end_the_run_but_is_told(train, validation_file, tmp_path, caplog):
    # Where the videos of two of three validations should come to lie, there are folders.
    for label in ("step000002", "final"):
        (tmp_path / f"run/validation/{label}-00.mp4").mkdir(parents=True)
    shown = (f"validation.validation_dataset_file={validation_file}", "validation.validation_steps=1")
    options = ("optimization.train_steps=3", "framebridge.ema_decay=0.9")
    assert succeeded(train(*options, output="without"))
    result = train(*options, *shown)
    assert result.returncode == 3
    assert result.stderr.splitlines()[-1].startswith("error: the final validation failed")
    for step in (2, 3):
        traceback = "Traceback (most recent call last):"
        assert f"the validation at update {step} failed; the run goes on\n{traceback}" in caplog.text
    entries = metrics(tmp_path / "run")
    assert [entry["loss"] for entry in entries if "loss" in entry] == losses(tmp_path / "without")
    failed = {entry["step"]: entry["validation_error"] for entry in entries if "validation_error" in entry}
    assert failed.keys() == {2, 3}
    assert "step000002-00.mp4" in failed[2]
    assert (tmp_path / "run/validation/step000001-00.mp4").is_file()
    assert_same_weights(tmp_path / "run/model", tmp_path / "without/model")
    assert (tmp_path / "run/loss.png").is_file()


def test_a_tracker_that_fails_does_not_stop_the_run(train, tmp_path, monkeypatch, caplog):
    # It cannot begin, since a file lies where its folder should.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").write_text("")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = train("tracking.report_to=wandb", "optimization.train_steps=2")
    assert succeeded(result)
    assert caplog.text.count("the tracker fails: ") == 1
    assert len(losses(tmp_path / "run")) == 2


def test_a_tracker_that_hangs_does_not_hold_up_the_end_of_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = OptionalTracker(lambda: initialize_trackers(["wandb"], "name", {}, str(tmp_path)), patience=0.5)
    tracker.log({"loss": 1.0}, step=1)
    (process,) = _service_processes()
    os.kill(process, signal.SIGSTOP)
    tracker.finish()
    assert "the tracker has not sent everything in 0.5 s" in caplog.text
    status = Path(f"/proc/{process}/stat")
    assert not status.exists() or " Z " in status.read_text()  # ended, and perhaps not yet waited for
