"""`finetrainers precompute`: what it writes, in one process or several, killed or not, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from framebridge_plugin.data import ClipIndex, ClipSettings
from framebridge_plugin.training import LatteBridgeSpecification
from framebridge_plugin.training.precomputation.numbering import Captions
from framebridge_plugin.training.precomputation.store import LatentStore, read_manifest
from tests.tiny_models import CLASS_NAMES, make_tiny_latte, moving_square, write_video
from tests.training.conftest import command_environment, small_files_only
from tests.training.run_results import succeeded

ROWS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips for each of three classes, one of which is no video, and a model that knows these classes."""
    folder = tmp_path_factory.mktemp("precompute")
    for label, name in enumerate(CLASS_NAMES[:3]):
        (folder / "clips" / name).mkdir(parents=True)
        for number in range(2):
            write_video(folder / f"clips/{name}/{number}.mp4", moving_square(2 * label + number, 8, 64, 64))
    (folder / "clips" / CLASS_NAMES[1] / "1.mp4").write_text("This is no video.\n")
    make_tiny_latte(folder / "model", "bridge")
    return folder


@pytest.fixture
def recipe_file(inputs: Path, tmp_path: Path) -> Path:
    recipe = {
        "model": {"model_name": "latte_bridge", "pretrained_model_name_or_path": str(inputs / "model")},
        "framebridge": {"data": {"class_root": str(inputs / "clips"), "num_frames": 4, "height": 64, "width": 64}},
        "training": {"training_type": "full-finetune", "seed": 7},
        "optimization": {"train_steps": 3},
        "precision": {"transformer_dtype": "fp32", "vae_dtype": "fp32"},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With another number of threads sums are taken in another order, and differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def last_line(result: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def files(store: Path) -> list[Path]:
    return [*store.glob("captions/*.safetensors"), *store.glob("clips/*/*.safetensors")]


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in files(store)}


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(store)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files(store)}


def bad_files(folder: Path) -> list[str]:
    return [json.loads(line)["path"] for line in (folder / "bad_files.jsonl").read_text().splitlines()]


def test_each_caption_is_embedded_once_and_everything_is_named(precompute, inputs, tmp_path, monkeypatch):
    embedded, original = [], LatteBridgeSpecification.prepare_conditions

    def count(self, *args, caption, **kwargs):
        embedded.append(caption)
        return original(self, *args, caption=caption, **kwargs)

    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(LatteBridgeSpecification, "prepare_conditions", count)
    result = precompute("--variants=2", "--shard-size=4")
    assert succeeded(result)
    assert sorted(embedded) == sorted(["", *CLASS_NAMES[:3]])

    store = tmp_path / "store"
    assert bad_files(store) == [str(inputs / "clips" / CLASS_NAMES[1] / "1.mp4")]
    shards = [safe_open(store / f"clips/variant-0000/00000{number}.safetensors", "pt") for number in (0, 1)]
    for shard, rows in zip(shards, (4, ROWS - 4), strict=True):
        assert shard.get_tensor("latents").shape == (rows, 4, 4, 16, 16)
        assert shard.get_tensor("image_latents").shape == (rows, 1, 4, 16, 16)
    ((skipped,),) = [bad for shard in shards for bad in json.loads(shard.metadata()["skipped"]).values()]
    assert skipped["path"] == bad_files(store)[0]
    assert skipped["kind"] == "not_video"
    assert skipped["reason"]
    assert yaml.safe_load((store / "recipe.yaml").read_text())["training"]["seed"] == 7
    assert json.loads((store / "versions.json").read_text())["torch"]
    # How large the latents are, about their mean, and the factor that would make that 1.
    stored = [load_file(path)["latents"] for path in sorted(store.glob("clips/*/*.safetensors"))]
    deviation = torch.cat(stored).double().std(correction=0).item()
    factor = json.loads((inputs / "model/vae/config.json").read_text())["scaling_factor"] / deviation
    said = f"the latents of {2 * ROWS} clips: {deviation:.4f}; it is 1 with scaling_factor {factor:.4f} in"
    assert said in result.stderr
    # Whole and on the disk before they have their names.
    places = {path.parents[1] / path.name for path in map(Path, flushed) if path.parent.suffix == ".partial"}
    assert places == {*files(store), store / "manifest.json"}
    # safetensors makes files that nobody else can read.
    assert {path.stat().st_mode for path in files(store)} == {(store / "recipe.yaml").stat().st_mode}


def test_captions_of_several_data_sets_have_one_numbering():
    texts = [["b", "a", "b"], ["c", "a", "", "d"]]
    tables = [datasets.Dataset.from_dict({"path": captions, "caption": captions}) for captions in texts]
    indexes = [ClipIndex(table, "caption", id_token=token) for table, token in zip(tables, (None, "x"), strict=True)]
    captions = Captions([(index, ClipSettings(9, 64, 64)) for index in indexes])
    distinct = ["", "a", "b", "x ", "x a", "x c", "x d"]
    assert sorted(captions.text(number) for number in range(len(captions))) == distinct
    assert [captions.text(captions.number(caption)) for caption in distinct] == distinct


def test_several_processes_write_what_one_does_and_variants_can_be_added(precompute, tmp_path):
    assert succeeded(precompute("--shard-size=2", "--nproc=2"))
    before = stamps(tmp_path / "store")
    assert len(before) == 2 + 3
    assert succeeded(precompute("--variants=2"))
    after = stamps(tmp_path / "store")
    assert len(after) == 2 + 6
    assert before.items() < after.items()
    fewer = precompute("--variants=1")
    assert fewer.returncode == 2
    remedy = "leave it out, or precompute into another folder"
    assert last_line(fewer) == f"error: --variants 1: {tmp_path / 'store'} has 2 already; {remedy}"
    no_epochs = precompute("--only=captions", "--variants=3")
    assert no_epochs.returncode == 2
    assert last_line(no_epochs) == "error: --variants has no effect with --only captions; leave it out"
    assert succeeded(precompute())
    assert stamps(tmp_path / "store") == after

    assert succeeded(precompute("--variants=2", "--shard-size=2", store="alone"))
    assert contents(tmp_path / "alone") == contents(tmp_path / "store")
    assert bad_files(tmp_path / "alone") == bad_files(tmp_path / "store")


def start(recipe_file: Path, store: Path, *options: str) -> subprocess.Popen:
    """Starts the command, and comes back when it has written some of the clips."""
    command = ["precompute", f"--recipe={recipe_file}", f"--output={store}", "--shard-size=1", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "framebridge_plugin", *command],
        env=command_environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background hands on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while len(list(store.glob("clips/*/*.safetensors"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def children_of(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def wait_for_end(processes: list[int]) -> None:
    def is_running(process: int) -> bool:
        try:
            return Path(f"/proc/{process}/cmdline").read_bytes() != b""  # a zombie has none
        except OSError:
            return False

    deadline = time.monotonic() + 60
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_in_the_middle_it_goes_on_without_writing_a_file_again(recipe_file, precompute, tmp_path):
    options = ("--variants=20", "dataloader.dataloader_num_workers=1")
    killed = start(recipe_file, tmp_path / "store", *options, "--nproc=2")
    children = children_of(killed)
    assert len(children) == 2
    killed.kill()
    killed.communicate()
    wait_for_end(children)
    finished = stamps(tmp_path / "store")
    assert 5 < len(finished) < 20 * ROWS
    # What a process leaves that is killed while it writes.
    partial = tmp_path / "store/clips/variant-0019/.000005.safetensors.1.partial"
    partial.mkdir(parents=True)
    (partial / "000005.safetensors").write_bytes(b"half of it")

    assert succeeded(precompute(*options))
    assert finished.items() < stamps(tmp_path / "store").items()
    assert not partial.exists()
    assert succeeded(precompute(*options, "--shard-size=1", store="whole"))
    assert len(contents(tmp_path / "whole")) == 4 + 20 * ROWS
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert bad_files(tmp_path / "store") == bad_files(tmp_path / "whole")


def test_ctrl_c_ends_all_processes(recipe_file, tmp_path):
    process = start(recipe_file, tmp_path / "store", "--variants=5000", "--nproc=2")
    children = children_of(process)
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    wait_for_end(children)


def test_what_fails_in_all_processes_is_said_once(precompute, tmp_path):
    assert succeeded(precompute("--shard-size=1"))
    result = precompute("--nproc=2", "--shard-size=9")
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1
    assert last_line(result) == f"error: --shard-size 9: {tmp_path / 'store'} has files of 1; leave it out"


def test_the_policy_for_bad_files_holds(train, precompute, tmp_path):
    strict = "framebridge.bad_files.policy=raise"
    result = precompute(strict)
    assert result.returncode == 1
    assert "error: a clip cannot be read" in result.stderr
    assert not list(tmp_path.glob("store/clips/*/*.safetensors"))

    assert succeeded(precompute())
    result = train(strict, f"framebridge.precomputed={tmp_path / 'store'}", "training.batch_size=6")
    assert result.returncode == 1
    assert "error: a clip cannot be read" in result.stderr
    assert bad_files(tmp_path / "run") == bad_files(tmp_path / "store")


DIFFERENCES = {
    "training.seed=8": "training.seed is 7 there and 8 here",
    "framebridge.data.window=start": "framebridge.data.window is random there and start here",
    "framebridge.data.frame_stride=2": "framebridge.data.frame_stride is 1 there and 2 here",
    "precision.vae_dtype=bf16": "precision.vae_dtype is torch.float32 there and torch.bfloat16 here",
    "training.enable_tiling=true": "training.enable_tiling is False there and True here",
}


def test_a_store_of_other_latents_is_refused_by_name(train, precompute, inputs, tmp_path):
    assert succeeded(precompute())
    for override, difference in DIFFERENCES.items():
        result = precompute(override)
        assert result.returncode == 2
        assert difference in last_line(result)
    unchanged = ("framebridge.caption_dropout=0.3", "framebridge.target=data", "optimization.lr=1")
    assert succeeded(precompute(*unchanged))

    vae = shutil.copytree(inputs / "model/vae", tmp_path / "vae")
    assert succeeded(precompute(f"model.vae_id={vae}"))
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.weight"] *= 1.01
    save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    assert "model.vae.diffusion_pytorch_model.safetensors is" in last_line(precompute(f"model.vae_id={vae}"))

    moved = shutil.copytree(inputs / "clips", tmp_path / "moved")
    elsewhere = f"framebridge.data.class_root={moved}"
    assert succeeded(precompute(elsewhere))
    clip = moved / CLASS_NAMES[0] / "1.mp4"
    clip.write_bytes(clip.read_bytes() + b"\0")
    assert "data.0.file_sizes is" in last_line(precompute(elsewhere))
    clip.rename(clip.with_name("2.mp4"))
    assert "data.0.files is" in last_line(precompute(elsewhere))
    shutil.copy(clip.with_name("2.mp4"), clip)
    assert "data.0.rows is 6 there and 7 here" in last_line(precompute(elsewhere))

    refused = (f"framebridge.precomputed={tmp_path / 'store'}", "training.seed=8")
    for result in (train(*refused), train(*refused, "--dry-run")):
        assert result.returncode == 2
        assert last_line(result) == (
            f"error: {tmp_path / 'store'}: its latents and captions are not those of this run: training.seed is 7 "
            "there and 8 here; set that back, or precompute into another folder"
        )
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_or_missing_file_ends_a_run_in_one_line(train, precompute, tmp_path, workers):
    options = (f"framebridge.precomputed={tmp_path / 'store'}", f"dataloader.dataloader_num_workers={workers}")
    assert succeeded(precompute())
    file = tmp_path / "store/clips/variant-0000/000000.safetensors"
    whole = file.read_bytes()

    # One bit of every row.
    length = int.from_bytes(whole[:8], "little")
    start, end = json.loads(whole[8 : 8 + length])["latents"]["data_offsets"]
    damaged = bytearray(whole)
    for row in range(ROWS):
        damaged[8 + length + start + row * (end - start) // ROWS] ^= 1
    file.write_bytes(damaged)
    result = train(*options, output="flipped")
    assert result.returncode == 1
    assert last_line(result).startswith(f"error: {file} is damaged (row ")
    remedy = "remove it and run `finetrainers precompute` again: it writes only what is missing"
    assert last_line(result).endswith(f" is not as it was written); {remedy}")

    file.write_bytes(whole[: len(whole) // 2])
    result = train(*options, output="cut")
    assert result.returncode == 1
    assert last_line(result).startswith(f"error: {file} is damaged (")

    file.unlink()
    result = train(*options, output="missing")
    assert result.returncode == 1
    assert "1 of its files are missing, first clips/variant-0000/000000.safetensors" in last_line(result)
    assert succeeded(precompute())
    assert file.read_bytes() == whole
    assert succeeded(train(*options, output="whole"))


def test_a_full_disk_ends_it_in_one_line_and_it_goes_on_later(precompute, tmp_path):
    with small_files_only():
        result = precompute("--shard-size=3")
    assert result.returncode == 1
    file = tmp_path / "store/clips/variant-0000/000000.safetensors"
    assert last_line(result).startswith(f"error: cannot write {file}: ")
    assert list(file.parent.iterdir()) == []
    captions = stamps(tmp_path / "store")
    assert len(captions) == 2
    assert succeeded(precompute())
    assert captions.items() < stamps(tmp_path / "store").items()


def test_a_recipe_can_name_the_folder_before_it_is_there(train, recipe_file, tmp_path, precompute):
    stored = f"framebridge.precomputed={tmp_path / 'store'}"
    missing = train(stored)
    assert missing.returncode == 2
    assert "holds no precomputed latents: `finetrainers precompute` makes them" in last_line(missing)
    assert succeeded(precompute(stored))
    both = train(stored, "dataset.enable_precomputation=true")
    assert both.returncode == 2
    assert "framebridge.precomputed: excludes dataset.enable_precomputation" in last_line(both)
    (tmp_path / "store/manifest.json").write_text("{}")
    damaged = train(stored)
    assert damaged.returncode == 1
    assert "manifest.json is no manifest of precomputed latents" in last_line(damaged)


def test_rows_are_read_from_few_open_files(precompute, tmp_path):
    assert succeeded(precompute("--variants=12", "--shard-size=2"))
    manifest = read_manifest(tmp_path / "store")
    store = LatentStore(tmp_path / "store", manifest.fingerprint)
    for variant in range(12):
        for offset in range(ROWS):
            latents, _, _ = store.clip(variant, offset)
            assert latents["latents"].shape == (1, 4, 4, 16, 16)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert 0 < len({line.split()[-1] for line in maps if f"{tmp_path}/store" in line}) <= 17
