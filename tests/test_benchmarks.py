"""The benchmarks run, and compare with what they say they compare with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import LAUNCH_VARIABLES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_way_of_reading_is_measured_and_refusals_are_shown(tmp_path, benchmark_modules):
    from made_videos import VideoForm, write_video

    videos, output = tmp_path / "videos", tmp_path / "results" / "out.json"
    videos.mkdir()
    write_video(videos / "one.mp4", VideoForm(64, 48, 30, key_every=12, bit_rate=50_000))
    small = ["--frames", "30", "--repetitions", "2", "--loader-clips", "2", "--only", "one"]
    places = ["--videos", str(videos), "--output", str(output)]
    command = [sys.executable, str(BENCHMARKS / "data_loading.py"), *small, *places, "--parts", "clips", "loader"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    results = json.loads(output.read_text())
    assert list(results["clips"]) == ["UCF-like, one key frame", "real: one.mp4"]
    ucf, real = results["clips"].values()
    assert real["video"] == real["video"] | {"codec": "h264", "size": "64x48", "frames": 30, "key_frames": 3}
    assert {"limit", "limit, decoding alone", "whole video", "pyav", "decord"} <= set(real["ways"])
    assert real["ways"]["limit"]["of_limit"] == real["ways"]["whole video"]["times_whole_video"] == 1.0
    assert all(row["cpu_ms_per_clip"] > 0 for row in real["ways"].values())
    assert "decord" not in ucf["ways"]
    assert "refused: decord does not read it rightly, because its container is avi" in printed
    loader = results["loader"]["UCF-like, one key frame"]
    assert set(loader) == {"pyav", "whole video"}
    assert all(list(rows) == ["0 workers", "1 workers", "2 workers"] for rows in loader.values())
    goal = results["goals"]["of_limit"]
    assert goal["reached"].keys() | goal["missed"].keys() == results["clips"].keys()


def test_what_8_bits_change_is_compared_with_float32_and_bfloat16(tmp_path, benchmark_modules):
    import quantization

    small = ["--layers", "1", "--blocks", "1", "--width", "128", "--heads", "2"]
    quantization.main([*small, "--output", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())
    lora, encoder = results["LoRA, 1 blocks"], results["text encoder, 1 layers"]
    assert list(lora) == list(encoder) == ["float32", "bfloat16", "int8", "fp8"]
    assert list(results["full, 1 blocks, emulated"]) == ["float32", "bfloat16", "tensorwise", "rowwise"]
    assert encoder["int8"]["MB"] < encoder["bfloat16"]["MB"] < encoder["float32"]["MB"]
    for rows in (lora, encoder):
        changes = [rows[kind]["from bfloat16"].popitem()[1] for kind in ("int8", "fp8")]
        assert 0 < changes[0] < changes[1] < 0.2


def test_a_start_on_a_generated_table_reads_its_clips(tmp_path, benchmark_modules):
    from made_videos import write_webvid
    from start_up import BATCH, start

    table, root = write_webvid(tmp_path / "webvid", rows=30)
    measured = start(str(table), str(root), samples=2)
    assert measured["first_batch_s"] >= measured["index_s"] > 0
    assert 0 < measured["worker_pss_mb"] <= measured["peak_mb"]
    assert BATCH == 8


def test_every_change_of_a_training_step_is_measured(tmp_path):
    """The command ends with an error if the first loss of a row is not the reference's."""
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), "--quick", "--output", str(tmp_path / "out")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads((tmp_path / "out.json").read_text())
    for model in results["models"].values():
        for rows in (model["live"], model["precomputed"]):
            assert sum(rows[0]["flop"].values()) > sum(rows[-1]["flop"].values())
            assert rows[0]["ratio"] == 1.0
            assert rows[0]["peak_gib"] >= rows[-1]["peak_gib"] > 0
            assert rows[0]["flop"].keys() == {"fp32"}
            assert rows[-1]["operations"] < rows[0]["operations"]
            assert printed.count(rows[-1]["change"]) >= 1
        assert model["live"][-1]["flop"].keys() == {"bf16"}
    latte = results["full_size_flop"]["Latte-S/2"]["16x256x256"]
    # Forward, and two as much back; but for the positions, that have no gradient.
    assert latte["update: precomputed"] == pytest.approx(3 * latte["network, forward"], rel=0.01)
    assert latte["update: the reference"] / latte["update: live"] == pytest.approx(
        1 + (1 - latte["update: precomputed"] / latte["update: live"]) / 16, rel=0.001
    )
    assert results["loop"]["tiny"]["ratio"] > 0


def test_autocast_changes_a_loss_by_little_and_bfloat16_loses_small_updates_that_it_rounds_to_the_nearest(
    tmp_path, benchmark_modules, monkeypatch
):
    from precision import main

    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    main(["--quick", "--output", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    (curves,) = results["curves"].values()
    assert 0 < abs(curves["difference"]) < 1e-2 < curves["noise"]
    made = {name: row["way_made"] for name, row in results["small_updates"].items()}
    assert made["float32"] == 1.0
    assert 0 < made["bfloat16"] < 0.1
    assert 0.9 < made["bfloat16, stochastic rounding"] < 1.1
    assert "| bfloat16 |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").is_file()


def test_sampling_is_compared_with_diffusers_own_pipeline_at_equal_calls(tmp_path, benchmark_modules):
    from sampling_speed import main

    assert main(["--quick", "--output", str(tmp_path / "out")]) == 0
    theirs, alone, two, in_turn = json.loads((tmp_path / "out.json").read_text())["ways"].values()
    assert [row["calls"] for row in (theirs, alone, two, in_turn)] == [4, 4, 4, 8]
    assert [row["inputs_of_a_clip"] for row in (theirs, alone, two, in_turn)] == [8] * 4
    assert theirs["ratio"] == 1.0
    assert 0 < in_turn["gib"] <= alone["gib"] < two["gib"]


def test_of_clips_a_still_picture_is_not_as_good_as_one_that_moves_rightly(benchmark_modules):
    from sampling import as_good

    same = {"errors": [0.1, 0.2, 0.3], "block_residual": {"mean": 0.1, "standard_error": 0.01}}
    moving = same | {"shift_correlation": {"mean": 0.6, "standard_error": 0.1}}
    still = same | {"shift_correlation": {"mean": None, "standard_error": None}}
    assert [as_good(ours, theirs) for ours in (moving, still) for theirs in (moving, still)] == [
        True,
        True,
        False,
        True,
    ]


def test_few_calls_are_compared_where_the_best_prediction_is_known(tmp_path, benchmark_modules):
    from sampling import main

    main(["--quick", "--output", str(tmp_path / "out")])
    parts = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert len(parts) == 3
    for part in parts.values():
        ways, goal = part["ways"], part["goals"]["8 calls as good as 50 of the reference"]
        theirs = ways["reference: sde, trailing, clean prior"]
        assert part["two true samples"] < theirs["50"] < theirs["8"] < theirs["2"]
        assert ways["dbim, order 2, lambda"]["8"] < 0.8 * theirs["8"]
        ours = {name: way["8"] for name, way in ways.items() if not name.startswith("reference")}
        assert goal["best"] == min(ours.values())
        assert set(goal["ways"]) == {name for name, value in ours.items() if value <= goal["reference"]}
    assert (tmp_path / "out.png").is_file()
    assert "| dbim, order 2, lambda |" in (tmp_path / "out.md").read_text()


def test_the_bridge_is_nearer_to_true_clips_than_its_twin_and_tables_say_what_is_missing(
    tmp_path, benchmark_modules, monkeypatch
):
    """The command's own statement, of two small runs; the real ones take hours."""
    import bridge_vs_diffusion
    from quick_comparison import BRIDGE, TWIN, quick_part, run_quickly

    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert run_quickly(tmp_path) == 0
    part = quick_part(tmp_path)
    comparison = bridge_vs_diffusion.Comparison("quick", part, tmp_path / "runs", tmp_path)
    assert [*comparison.plan()] == []
    assert (tmp_path / "quick.png").is_file()
    still = comparison.found[bridge_vs_diffusion.Job("image repeated", 0.0, part.seeds[0])]
    assert still["headline"]["motion_ratio"]["mean"] == 0
    # As it stands before the bridge's run.
    (job,) = (job for job in comparison.found if job.arm == BRIDGE)
    (tmp_path / f"quick-{job.name}.json").unlink()
    before = bridge_vs_diffusion.Comparison("quick", part, tmp_path / "runs", tmp_path)
    assert next(before.plan()) == job
    bridge_vs_diffusion.report(before)
    lines = (tmp_path / "quick.md").read_text().splitlines()
    assert [line.startswith(f"| {BRIDGE} | missing |") for line in lines].count(True) == 2
    assert not any(line.startswith(f"| {TWIN} | missing |") for line in lines)
