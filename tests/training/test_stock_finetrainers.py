"""finetrainers' own CogVideoX fine-tune works after register(), and resumes in a program of its own.

That it saves what it has trained, and validates, is the conformance suite's business (tests/testing).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import make_clips, make_tiny_cogvideox
from tests.training import stock_runs
from tests.training.conftest import LAUNCH_VARIABLES, command_environment

PROGRAM = stock_runs.__file__
# accelerate is the default, which has to be accepted without being named.
RUNS = {
    "accelerate-lora": ["--training_type", "lora", "--rank", "4", "--gradient_checkpointing"],
    "accelerate-full": ["--training_type", "full-finetune", "--enable_precomputation", "--precomputation_items", "4"],
    "ptd-lora": ["--parallel_backend", "ptd", "--training_type", "lora", "--rank", "4", "--gradient_checkpointing"],
    "ptd-full": ["--parallel_backend", "ptd", "--training_type", "full-finetune"],
}


def command_lines(folder: Path, *, steps: int, options: tuple[str, ...] = ()) -> list[list[str]]:
    types = ["--text_encoder_dtype", "fp32", "--transformer_dtype", "fp32", "--vae_dtype", "fp32"]
    common = ["--model_name", "cogvideox", "--pretrained_model_name_or_path", str(folder / "model"), *types]
    common += ["--dataset_config", str(folder / "data.json")]
    common += ["--train_steps", str(steps), "--checkpointing_steps", "1", "--seed", "3"]
    common += ["--lr", "1e-3", "--lr_scheduler", "constant", *options]
    return [[*common, *own, "--output_dir", str(folder / name)] for name, own in RUNS.items()]


def train_in_a_new_process(lines: list[list[str]]) -> dict[str, dict]:
    """Makes all runs; returns what each reports."""
    result = subprocess.run(
        [sys.executable, PROGRAM, json.dumps(lines)],
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(zip(RUNS, json.loads(result.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """Three steps in this process, which spares the imports, then a new one that resumes for two more."""
    folder = tmp_path_factory.mktemp("stock")
    # finetrainers' CogVideoX specification always pads captions to 226 tokens.
    make_tiny_cogvideox(folder / "model", max_text_length=226, sample_size=32)
    clips = make_clips(folder / "clips", count=4, frames=9, size=32)
    dataset = {"data_root": str(clips), "dataset_type": "video", "video_resolution_buckets": [[9, 32, 32]]}
    (folder / "data.json").write_text(json.dumps({"datasets": [dataset]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])  # which a run replaces
        for name in LAUNCH_VARIABLES:
            patch.delenv(name, raising=False)
        begun = {name: stock_runs.run(line) for name, line in zip(RUNS, command_lines(folder, steps=3), strict=True)}
    for name in RUNS:
        # Whoever starts anew instead of resuming writes this one again.
        shutil.rmtree(folder / name / "finetrainers_step_1")
    resumed = train_in_a_new_process(command_lines(folder, steps=5, options=("--resume_from_checkpoint", "latest")))
    return folder, begun, resumed


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_alone_without_a_launcher(trained, name):
    _, begun, resumed = trained
    for run in (begun[name], resumed[name]):
        assert run["specification"] == "CogVideoXModelSpecification"
        assert run["world_size"] == 1
        assert run["launch_variables"] == []
    assert len(begun[name]["losses"]) == 3
    assert all(loss > 0 for loss in begun[name]["losses"])


@pytest.mark.parametrize("name", RUNS)
def test_it_resumes_where_it_stopped(trained, name):
    folder, begun, resumed = trained
    assert resumed[name]["losses"][:3] == begun[name]["losses"]
    assert len(resumed[name]["losses"]) == 5
    steps = sorted(int(path.name.rsplit("_", 1)[1]) for path in (folder / name).glob("finetrainers_step_*"))
    assert steps == [2, 3, 4, 5]
