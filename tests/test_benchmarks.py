"""The benchmark of data loading runs, and compares with what it says it compares with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_way_of_reading_is_measured_and_refusals_are_shown(tmp_path):
    output = tmp_path / "results" / "out.json"
    small = ["--frames", "30", "--repetitions", "1", "--loader-clips", "2", "--parts", "clips", "loader"]
    command = [sys.executable, str(BENCHMARKS / "data_loading.py"), *small, "--output", str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads(output.read_text())

    goal = results["clips"]["640x360, key frame every 12"]
    assert goal["video"] == goal["video"] | {"codec": "h264", "size": "640x360", "frames": 30, "key_frames": 3}
    assert goal["ways"]["limit"]["of_limit"] == goal["ways"]["whole video"]["times_whole_video"] == 1.0
    ucf = results["clips"]["UCF-like, one key frame"]
    assert {"limit", "whole video", "pyav"} <= set(ucf["ways"])
    assert "avi" in ucf["refused"]["decord"]
    assert "refused: decord does not read it rightly" in printed
    assert {"pyav", "decord", "whole video"} == set(results["loader"]["640x360, key frame every 12"])
    assert results["environment"]["date"]


def test_a_start_on_a_generated_table_reads_its_clips(tmp_path, benchmark_modules):
    from made_videos import write_webvid
    from start_up import BATCH, start

    table, root = write_webvid(tmp_path / "webvid", rows=30)
    measured = start(str(table), str(root), samples=2)
    assert measured["first_batch_s"] >= measured["index_s"] > 0
    assert 0 < measured["worker_pss_mb"] <= measured["peak_mb"]
    assert BATCH == 8
