"""A tiny model, a few clips, and runs of the real command on them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from framebridge_plugin.cli import main
from tests.tiny_models import make_clips, make_tiny_cogvideox

SIZE = 32


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_cogvideox(folder, sample_size=SIZE)
    return folder


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    make_clips(folder, count=5, frames=12, size=SIZE)
    return folder


@pytest.fixture(scope="session")
def validation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    Image.new("RGB", (40, 32), (200, 30, 30)).save(folder / "red.png")
    lines = ["caption,image_path,num_inference_steps", f"null,{folder / 'red.png'},2"]  # a caption is text
    (folder / "validation.csv").write_text("\n".join(lines) + "\n")
    return folder / "validation.csv"


def write_recipe(folder: Path, model_folder: Path, clips_folder: Path) -> Path:
    """Writes a whole recipe of four short updates."""
    recipe = {
        "model": {"pretrained_model_name_or_path": str(model_folder)},
        "framebridge": {
            "data": {"data_root": str(clips_folder), "num_frames": 9, "height": SIZE, "width": SIZE},
        },
        "training": {"training_type": "full-finetune", "batch_size": 2, "seed": 7},
        "optimization": {"train_steps": 4, "lr": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 1},
        "precision": {"transformer_dtype": "fp32", "vae_dtype": "fp32", "text_encoder_dtype": "fp32"},
        "checkpoints": {"output_dir": str(folder / "run"), "checkpointing_steps": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def recipe_file(model_folder: Path, clips_folder: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, model_folder, clips_folder)


Run = Callable[..., subprocess.CompletedProcess]

LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command_environment() -> dict[str, str]:
    """The environment of a command: no hub, no launch variables of another run, and as many threads as here.

    With another number of threads sums are taken in another order, and differ in their last bits.
    """
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """No file takes more than 40 KiB within the block, as if the disk was full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_in_two_processes(module: str, runs: Sequence[Any], **environment: str) -> str:
    """Has torchrun start a program once, which makes all runs: the imports take longer than they do.

    Args:
        module: The program; it takes a folder to agree on ports in, and the runs as JSON.
        runs: What it is to run.
        **environment: More variables.

    Returns:
        What it printed.
    """
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module)
    with tempfile.TemporaryDirectory() as ports:
        result = subprocess.run(
            [sys.executable, "-m", *torchrun, ports, json.dumps(runs)],
            env={**command_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.fixture
def train(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Runs `finetrainers train` in this process, which spares seconds of imports."""

    def run(*overrides: str, output: str = "run") -> subprocess.CompletedProcess:
        arguments = [
            "train",
            f"--recipe={recipe_file}",
            f"checkpoints.output_dir={tmp_path / output}",
            *overrides,
        ]
        for name in LAUNCH_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        capfd.readouterr()
        return_code = main(arguments)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, return_code, out, err)

    return run


@pytest.fixture
def precompute(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Runs `finetrainers precompute` in this process, and in others with `--nproc`."""

    def run(*arguments: str, store: str = "store") -> subprocess.CompletedProcess:
        for name in LAUNCH_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        capfd.readouterr()
        return_code = main(["precompute", f"--recipe={recipe_file}", f"--output={tmp_path / store}", *arguments])
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, return_code, out, err)

    return run
