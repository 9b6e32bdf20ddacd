"""`finetrainers precompute` and the runs that read what it wrote: real clips, tiny real models, real processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from framebridge_plugin.cli import main
from framebridge_plugin.training import CogVideoXBridgeSpecification, LatteBridgeSpecification
from tests.tiny_models import CLASS_NAMES, make_clips, make_tiny_latte, moving_square, write_video
from tests.training.conftest import LAUNCH_VARIABLES, command_environment
from tests.training.test_training_runs import assert_same_weights, losses, metrics, succeeded

LATTE_KINDS = ("bridge_neural_prior", "neural_prior")


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of four captions, one of them empty, and the third a file that is no video."""
    folder = make_clips(tmp_path_factory.mktemp("clips") / "clips", count=6, frames=12)
    with (folder / "metadata.csv").open("w", newline="") as file:
        captions = ["a red square", "a blue square", "a broken file", "", "a red square", "a green square"]
        rows = [(f"{number}.mp4", caption) for number, caption in enumerate(captions)]
        csv.writer(file).writerows([("file_name", "caption"), *rows])
    (folder / "2.mp4").write_text("This is no video.\n")
    return folder


@pytest.fixture(scope="module")
def latte_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips for each of three classes, and the models of two stages."""
    folder = tmp_path_factory.mktemp("latte")
    for label, name in enumerate(CLASS_NAMES[:3]):
        (folder / "clips" / name).mkdir(parents=True)
        for number in range(2):
            write_video(folder / f"clips/{name}/{number}.mp4", moving_square(2 * label + number, 8, 64, 64))
    for kind in LATTE_KINDS:
        make_tiny_latte(folder / kind, kind)
    return folder


Precompute = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def precompute(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Precompute:
    """Runs `finetrainers precompute` into `tmp_path / store`, two clips to a file."""

    def run(*arguments: str, store: str = "store") -> subprocess.CompletedProcess:
        for name in LAUNCH_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        capfd.readouterr()
        return_code = main(["precompute", f"--recipe={recipe_file}", f"--output={tmp_path / store}", *arguments])
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, return_code, out, err)

    return run


def last_line(result: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def shards(store: Path) -> dict[str, bytes]:
    files = sorted(store.rglob("*.safetensors"))
    assert files
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    files = [*store.glob("captions/*.safetensors"), *store.glob("clips/*/*.safetensors")]
    return {str(path.relative_to(store)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def bad_files(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "bad_files.jsonl").read_text().splitlines()]
    return [{key: entry[key] for key in ("path", "kind", "reason")} for entry in entries]


def refuse_to_load(*args: object, **kwargs: object) -> None:
    raise AssertionError("the run has no use for this model")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_run_on_the_store_is_the_live_run(train, precompute, clips_folder, tmp_path, monkeypatch, dropout):
    options = (f"framebridge.caption_dropout={dropout}", "optimization.train_steps=5")
    assert succeeded(train(*options, output="live"))
    assert succeeded(precompute("--variants=2", "--shard-size=2", "optimization.lr=1"))
    store = tmp_path / "store"
    assert (store / "recipe.yaml").is_file()
    assert (store / "versions.json").is_file()
    assert bad_files(store) == bad_files(tmp_path / "live")
    assert [Path(entry["path"]).name for entry in bad_files(store)] == ["2.mp4"]

    for name in ("load_condition_models", "load_latent_models"):
        monkeypatch.setattr(CogVideoXBridgeSpecification, name, refuse_to_load)
    stored = (*options, f"framebridge.precomputed={store}")
    assert succeeded(train(*stored, "dataloader.dataloader_num_workers=1", output="stored"))
    assert losses(tmp_path / "stored") == losses(tmp_path / "live")
    assert len(losses(tmp_path / "stored")) == 5  # 10 samples: into the second epoch of 6
    assert_same_weights(tmp_path / "stored/model", tmp_path / "live/model")
    assert bad_files(tmp_path / "stored") == bad_files(tmp_path / "live")
    assert metrics(tmp_path / "stored")[-1]["bad_files"] == metrics(tmp_path / "live")[-1]["bad_files"] == 1

    assert succeeded(train(*stored, "optimization.train_steps=2", output="parts"))
    assert succeeded(train(*stored, "checkpoints.resume_from_checkpoint=latest", output="parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "live")
    assert_same_weights(tmp_path / "parts/model", tmp_path / "live/model")


@pytest.mark.parametrize("kind", LATTE_KINDS)
def test_latte_runs_on_a_store(train, precompute, recipe_file, latte_inputs, tmp_path, monkeypatch, kind):
    """The bridge and its neural prior have one store between them."""
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["model"] = {"model_name": "latte_bridge"}
    recipe["framebridge"] = {
        "data": {"class_root": str(latte_inputs / "clips"), "num_frames": 4, "height": 64, "width": 64},
        "caption_dropout": 0.5,
    }
    del recipe["precision"]["text_encoder_dtype"]
    recipe_file.write_text(yaml.safe_dump(recipe))
    model = f"model.pretrained_model_name_or_path={latte_inputs}"
    name = "latte_neural_prior" if kind == "neural_prior" else "latte_bridge"
    assert succeeded(precompute("--variants=2", "--shard-size=4", f"{model}/bridge_neural_prior"))
    assert json.loads((tmp_path / "store/manifest.json").read_text())["captions"] == 4

    chosen = (f"model.model_name={name}", f"{model}/{kind}")
    assert succeeded(train(*chosen, output="live"))
    monkeypatch.setattr(LatteBridgeSpecification.__mro__[2], "load_latent_models", refuse_to_load)
    assert succeeded(train(*chosen, f"framebridge.precomputed={tmp_path / 'store'}", output="stored"))
    assert losses(tmp_path / "stored") == losses(tmp_path / "live")
    assert_same_weights(tmp_path / "stored/model", tmp_path / "live/model")


def test_validation_loads_what_the_run_itself_does_not_need(train, precompute, validation_file, tmp_path):
    assert succeeded(precompute())
    stored = f"framebridge.precomputed={tmp_path / 'store'}"
    options = (f"validation.validation_dataset_file={validation_file}", "optimization.train_steps=1")
    assert succeeded(train(stored, *options))
    assert (tmp_path / "run/validation/final-00.mp4").is_file()


def test_each_caption_is_embedded_once(precompute, tmp_path, monkeypatch):
    embedded, original = [], CogVideoXBridgeSpecification.prepare_conditions

    def count(self, *args, caption, **kwargs):
        embedded.append(caption)
        return original(self, *args, caption=caption, **kwargs)

    monkeypatch.setattr(CogVideoXBridgeSpecification, "prepare_conditions", count)
    assert succeeded(precompute())
    assert sorted(embedded) == ["", "a blue square", "a broken file", "a green square", "a red square"]


def test_two_processes_write_what_one_does_and_more_variants_are_added(recipe_file, precompute, tmp_path):
    assert succeeded(precompute("--variants=1", "--shard-size=2", "--nproc=2"))
    before = stamps(tmp_path / "store")
    assert len(before) == 3 + 3
    assert succeeded(precompute("--variants=2"))
    after = stamps(tmp_path / "store")
    assert before.items() < after.items()
    assert succeeded(precompute())
    assert stamps(tmp_path / "store") == after

    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "framebridge_plugin")
    arguments = ("precompute", f"--recipe={recipe_file}", "--variants=2", "--shard-size=2")
    command = [sys.executable, "-m", *torchrun, *arguments, f"--output={tmp_path / 'torchrun'}"]
    assert succeeded(subprocess.run(command, env=command_environment(), capture_output=True, text=True))
    assert shards(tmp_path / "torchrun") == shards(tmp_path / "store")
    assert bad_files(tmp_path / "torchrun") == bad_files(tmp_path / "store")


def children_of(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""  # a zombie has none
    except OSError:
        return False


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_the_middle_it_goes_on_without_writing_a_file_again(
    recipe_file, precompute, tmp_path, processes
):
    options = ("--variants=4", "--shard-size=1", "dataloader.dataloader_num_workers=1")
    command = ["precompute", f"--recipe={recipe_file}", f"--output={tmp_path / 'store'}", *options]
    killed = subprocess.Popen(
        [sys.executable, "-m", "framebridge_plugin", *command, f"--nproc={processes}"],
        env=command_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("store/clips/*/*.safetensors"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = children_of(killed.pid)
    assert children  # the processes, or the one that reads clips
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    finished = stamps(tmp_path / "store")
    assert 5 <= len(list(tmp_path.glob("store/clips/*/*.safetensors"))) < 24
    # What a process leaves that is killed while it writes.
    partial = tmp_path / "store/clips/variant-0000/.000005.safetensors.1.partial"
    partial.mkdir()
    (partial / "000005.safetensors").write_bytes(b"half of it")

    assert succeeded(precompute(*options))
    assert {name: stamp for name, stamp in stamps(tmp_path / "store").items() if name in finished} == finished
    assert not partial.exists()
    assert succeeded(precompute(*options, store="whole"))
    assert shards(tmp_path / "store") == shards(tmp_path / "whole")
    assert bad_files(tmp_path / "store") == bad_files(tmp_path / "whole")


def test_ctrl_c_ends_all_processes(recipe_file, tmp_path):
    command = ["precompute", f"--recipe={recipe_file}", f"--output={tmp_path / 'store'}", "--variants=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "framebridge_plugin", *command, "--shard-size=1", "--nproc=2"],
        env=command_environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background hands on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("store/clips/*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = children_of(process.pid)
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted"
    assert not any(map(runs, children))


DIFFERENCES = {
    "training.seed=8": "seed is 7 there and 8 here",
    "framebridge.data.window=start": "data.0.clip.window is random there and start here",
    "framebridge.data.frame_stride=2": "data.0.clip.frame_stride is 1 there and 2 here",
    "framebridge.data.height=32": "data.0.clip.height is 64 there and 32 here",
    "framebridge.data.resize=decoder": "data.0.clip.resize is torch there and decoder here",
    "framebridge.data.id_token=sks": "data.0.captions is",
    "framebridge.prior_noise=false": "model.prior_noise is True there and False here",
    "framebridge.noise_log_mean=-2": "model.noise_log_mean is -3.0 there and -2.0 here",
    "precision.vae_dtype=bf16": "model.vae_dtype is torch.float32 there and torch.bfloat16 here",
    "training.enable_tiling=true": "enable_tiling is False there and True here",
}


def test_a_store_of_other_latents_is_refused_by_name(
    train, precompute, clips_folder, model_folder, tmp_path, recipe_file
):
    assert succeeded(precompute())
    for override, difference in DIFFERENCES.items():
        result = precompute(override)
        assert result.returncode == 1
        assert difference in last_line(result)

    vae = shutil.copytree(model_folder / "vae", tmp_path / "vae")
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.conv.weight"] *= 1.01
    save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    result = precompute(f"model.vae_id={vae}")
    assert "model.vae.diffusion_pytorch_model.safetensors is" in last_line(result)

    moved = shutil.copytree(clips_folder, tmp_path / "moved")
    shutil.copytree(model_folder, tmp_path / "model")
    elsewhere = (f"framebridge.data.data_root={moved}", f"model.pretrained_model_name_or_path={tmp_path / 'model'}")
    unchanged = ("framebridge.caption_dropout=0.3", "framebridge.target=eps_psi", "optimization.lr=1")
    assert succeeded(precompute(*elsewhere, *unchanged))
    (moved / "3.mp4").write_bytes((moved / "3.mp4").read_bytes() + b"\0")
    assert "data.0.file_sizes is" in last_line(precompute(*elsewhere))
    (moved / "metadata.csv").write_text((moved / "metadata.csv").read_text().replace("red", "RED"))
    assert "data.0.captions is" in last_line(precompute(*elsewhere))
    make_clips(moved, count=7, frames=12)
    assert "data.0.rows is 6 there and 7 here" in last_line(precompute(*elsewhere))

    stored = f"framebridge.precomputed={tmp_path / 'store'}"
    result = train(stored, "training.seed=8")
    assert result.returncode == 1
    assert last_line(result).startswith(f"error: {tmp_path / 'store'}: its latents are not those of this run: seed is")
    assert not (tmp_path / "run/metrics.jsonl").exists()
    result = precompute("--shard-size=3")
    assert result.returncode == 2
    assert "has files of 64" in last_line(result)


def test_the_recipe_names_the_folder_and_excludes_the_other_way(train, recipe_file, tmp_path, monkeypatch, capfd):
    stored = f"framebridge.precomputed={tmp_path / 'here'}"
    result = train(stored)
    assert result.returncode == 1 or result.returncode == 2
    assert "holds no precomputed latents: `finetrainers precompute` makes them" in last_line(result)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["precompute", f"--recipe={recipe_file}", stored]) == 0
    capfd.readouterr()
    result = train(stored, "dataset.enable_precomputation=true")
    assert result.returncode == 2
    assert "framebridge.precomputed: excludes dataset.enable_precomputation" in last_line(result)
    assert succeeded(train(stored, "optimization.train_steps=1"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_or_missing_file_ends_the_run_in_one_line(train, precompute, tmp_path, workers):
    options = (f"framebridge.precomputed={tmp_path / 'store'}", f"dataloader.dataloader_num_workers={workers}")
    assert succeeded(precompute("--shard-size=8"))
    file = tmp_path / "store/clips/variant-0000/000000.safetensors"
    whole = file.read_bytes()

    # One byte of one value of every row.
    length = int.from_bytes(whole[:8], "little")
    start, end = json.loads(whole[8 : 8 + length])["latents"]["data_offsets"]
    damaged = bytearray(whole)
    for row in range(6):
        damaged[8 + length + start + row * (end - start) // 6] ^= 1
    file.write_bytes(damaged)
    result = train(*options, output="flipped")
    assert result.returncode == 1
    assert f"{file} is damaged (row " in last_line(result)
    assert "is not as it was written); remove it and run `finetrainers precompute` again" in last_line(result)

    file.write_bytes(whole[: len(whole) // 2])
    result = train(*options, output="cut")
    assert result.returncode == 1
    assert f"{file} is damaged (" in last_line(result)

    file.unlink()
    result = train(*options, output="missing")
    assert result.returncode == 1
    assert "1 of its files are missing, first clips/variant-0000/000000.safetensors" in last_line(result)
    assert succeeded(precompute())
    assert file.read_bytes() == whole


def test_a_full_disk_ends_it_in_one_line_and_it_goes_on_later(recipe_file, precompute, tmp_path):
    arguments = f"precompute --recipe={recipe_file} --output={tmp_path / 'store'} --shard-size=3"
    command = f"ulimit -f 10; exec {sys.executable} -m framebridge_plugin {arguments}"
    result = subprocess.run(["bash", "-c", command], env=command_environment(), capture_output=True, text=True)
    assert result.returncode == 1
    assert last_line(result).startswith(f"error: cannot write {tmp_path / 'store/clips/variant-0000/000000.safetensors'}")
    assert list(tmp_path.glob("store/clips/*/*")) == []
    captions = stamps(tmp_path / "store")
    assert len(captions) == 2
    assert succeeded(precompute())
    assert captions.items() < stamps(tmp_path / "store").items()


def test_the_policy_for_bad_files_holds_for_stored_clips(train, precompute, tmp_path):
    strict = "framebridge.bad_files.policy=raise"
    result = precompute(strict, store="strict")
    assert result.returncode == 1
    assert "2.mp4" in result.stderr
    assert not list(tmp_path.glob("strict/clips/*/*"))

    assert succeeded(precompute())
    with safe_open(tmp_path / "store/clips/variant-0000/000000.safetensors", "pt") as file:
        ((skipped,),) = json.loads(file.metadata()["skipped"]).values()
    assert Path(skipped["path"]).name == "2.mp4"
    assert skipped["kind"]
    result = train(strict, f"framebridge.precomputed={tmp_path / 'store'}")
    assert result.returncode == 1
    assert "a clip cannot be read" in result.stderr


def test_a_process_that_fails_ends_the_others(precompute, clips_folder, tmp_path):
    result = precompute("--nproc=2", "--shard-size=1", "framebridge.bad_files.policy=raise")
    assert result.returncode == 1
    assert "a clip cannot be read" in result.stderr
    assert "Traceback" not in result.stderr
    result = precompute("--nproc=2", "--shard-size=9")
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1
    assert "has files of 1" in last_line(result)
    assert os.environ.get("WORLD_SIZE") is None


def test_files_are_as_readable_as_others(precompute, tmp_path):
    assert succeeded(precompute())
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.stat().st_mode for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert modes == {plain.stat().st_mode}


def test_rows_are_read_one_by_one_from_few_open_files(precompute, tmp_path):
    """What reading takes is what one sample takes, not the store."""
    from framebridge_plugin.training.latent_store import LatentStore, read_manifest

    assert succeeded(precompute("--variants=12", "--shard-size=2", "framebridge.objective=diffusion"))
    manifest = read_manifest(tmp_path / "store")
    store = LatentStore(tmp_path / "store", manifest.fingerprint)

    def open_shards() -> int:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return len({line.split()[-1] for line in maps if str(tmp_path / "store") in line})

    for variant in range(12):
        for offset in range(6):
            latents, _, _ = store.clip(variant, offset)
            assert latents["latents"].shape == (1, 3, 4, 8, 8)
            assert isinstance(latents["latents"], torch.Tensor)
    assert open_shards() <= 16
