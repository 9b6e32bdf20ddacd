"""What a dry run lists of what a recipe does outside its run's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from framebridge_plugin.backbones.hub import local_folder
from framebridge_plugin.cli import main
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import NotFetchedError, without_network
from framebridge_plugin.folder_lock import FolderLock
from framebridge_plugin.recipe import load_recipe, outside_effects
from framebridge_plugin.training.validation import read_validation_file
from tests.cogvideox_files import write_clips
from tests.hub_server import serve_hub
from tests.recipe.helpers import problems_of


def effects(path, *overrides) -> list[str]:
    return list(outside_effects(load_recipe(path, overrides)))


def test_a_run_on_local_files_does_nothing_outside_its_folder(minimal):
    assert effects(minimal) == []


def test_everything_that_leaves_the_run_is_listed(minimal, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "/cache")
    (tmp_path / "rows.csv").write_text("caption,image_path\na cat,http://me:secret@example.org/cat.png\n")
    write_clips(tmp_path / "videos")
    (tmp_path / "videos/table.csv").write_text("videoid,name\na,a cat\n")
    overrides = [
        *("model.pretrained_model_name_or_path=zai-org/CogVideoX-2b", "model.revision=abc"),
        *("framebridge.data.data_root=null", "framebridge.data.csv=videos/table.csv"),
        *("framebridge.data.video_root=videos", "compile.compile_modules=[transformer]"),
        *("framebridge.bad_files.policy=quarantine", "framebridge.bad_files.quarantine_file=shared.jsonl"),
        *("validation.validation_dataset_file=rows.csv", "tracking.report_to=wandb", "tracking.tracker_name=mine"),
        *("hub.push_to_hub=true", "hub.hub_model_id=me/x", "dataset.precomputation_dir=encoded"),
        *("framebridge.start_from=me/earlier", "checkpoints.output_dir=run"),
    ]
    expected = [
        "sends: hub.push_to_hub: at the end run/model to the private repository me/x",
        "sends: tracking.report_to: the recipe, the metrics, validation videos and facts about this machine to "
        "Weights & Biases, project mine",
        "reads from the network: model.pretrained_model_name_or_path: zai-org/CogVideoX-2b, revision abc, from the hub"
        ", unless its cache has it",
        "reads from the network: framebridge.start_from: me/earlier, from the hub, unless its cache has it",
        "reads from the network: validation.validation_dataset_file: row 1: http://***@example.org/cat.png",
        f"writes outside output_dir: the quarantine of bad files: {tmp_path / 'shared.jsonl'}",
        "writes outside output_dir: dataset.precomputation_dir: encoded",
        "writes outside output_dir: downloads: /cache",
        "writes outside output_dir: the index of the csv: /cache",
        "writes outside output_dir: compiled code: /tmp",
    ]
    assert effects(minimal, *overrides) == expected
    # A dry run shows it whatever it refuses: here the number of processes.
    assert main(["train", "--recipe", str(minimal), "--dry-run", *overrides, "parallelism.dp_degree=2"]) == 2
    assert capsys.readouterr().err.splitlines()[:-1] == expected
    public = effects(minimal, *overrides, "hub.private=false", "hub.hub_model_id=x")
    assert public[0].endswith("run/model to the PUBLIC repository x, of the login's account")
    lora = effects(minimal, *overrides, "training.training_type=lora", "framebridge.start_from=null")
    assert lora[0] == "sends: hub.push_to_hub: at the end run/lora-to-share to the private repository me/x"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not any("Weights" in line for line in effects(minimal, *overrides))


@pytest.mark.parametrize(
    "file", ["/root/.ssh/keys.jsonl", "~/.bashrc", ".hidden.jsonl", "bad.txt", "link.jsonl", "d/new.jsonl"]
)
def test_a_quarantine_is_no_file_of_something_else(minimal, tmp_path, monkeypatch, file, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / "d").symlink_to(tmp_path / ".ssh")
    policy = ("framebridge.bad_files.policy=quarantine", f"framebridge.bad_files.quarantine_file={file}")
    assert main(["train", "--recipe", str(minimal), "--dry-run", *policy]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "framebridge.bad_files.quarantine_file: " in line
    assert "link: name the file" in line or "should end in .jsonl and lie in no hidden folder" in line


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder, links as such."""
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        *(".lock", "metrics.jsonl", "loss.png", ".run.json", "crash-rank0.txt", "checkpoints", "model", "tensorboard"),
        *("checkpoints/.went_back", "abandoned/1-after-step-2", ".heartbeats/.rank0.json", "validation/step-1-00.mp4"),
    ],
)
def test_a_run_writes_through_no_link_of_its_folder(minimal, tmp_path, name, capsys):
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    (home / "mine").write_text("mine")
    (run / name).parent.mkdir(parents=True)
    for target in (home / "mine", home, home / "new"):
        (run / name).symlink_to(target)
        before = contents(tmp_path)
        for more in (["--dry-run"], []):
            assert main(["train", "--recipe", str(minimal), *more]) == 2
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert f"checkpoints.output_dir: {run / name} is a link to {target}, outside of {run}; remove it" in line
        assert contents(tmp_path) == before
        (run / name).unlink()
    os.mkfifo(run / name)
    (problem,) = problems_of(minimal)
    assert f"{run / name} is neither a file nor a folder; remove it" in problem


def test_a_run_s_folder_may_be_a_link_and_have_links_within(minimal, tmp_path):
    (tmp_path / "other disk/logs/wandb/run-1").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "other disk")
    (tmp_path / "run/logs/wandb/latest-run").symlink_to("run-1")
    load_recipe(minimal)
    with FolderLock(tmp_path / "run"):
        assert (tmp_path / "other disk/.lock").is_file()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "key")
    with pytest.raises(FrameBridgeError, match=r"cannot write .*\.lock: "), FolderLock(tmp_path / "run"):
        pass
    assert not (tmp_path / "key").exists()


def test_a_dry_run_takes_nothing_from_the_network(minimal, tmp_path, monkeypatch, capsys):
    (tmp_path / "val.csv").write_text("caption,image_path\na cat,http://127.0.0.1:9/cat.png\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = ("model.pretrained_model_name_or_path=me/mine", f"model.cache_dir={tmp_path / 'cache'}")
    dry_run = ("train", "--recipe", str(minimal), "--dry-run", *model)
    with serve_hub(monkeypatch, "x" * 40) as hub:
        assert main([*dry_run, "framebridge.data.data_root=me/clips"]) == 0
        said = capsys.readouterr().err
        assert (
            "not checked: the data, and what depends on it: me/clips is not in the hub's cache; a dry run takes"
            in said
        )
        assert (
            "not checked: the model, and what depends on it: me/mine is not in the hub's cache; a dry run takes"
            in said
        )
        assert "is taken from the Hugging Face Hub" not in said
        config = tmp_path / "cache/models--me--mine/snapshots" / ("1" * 40) / "transformer/config.json"
        for path, text in ((config, "{}"), (config.parents[3] / "refs/main", "1" * 40)):
            path.parent.mkdir(parents=True)
            path.write_text(text)
        with without_network(), pytest.raises(NotFetchedError, match="me/mine is not whole in the hub's cache"):
            local_folder("me/mine", cache_dir=tmp_path / "cache")
        with without_network(), pytest.raises(NotFetchedError, match=r"http://127.0.0.1:9/cat.png is not fetched"):
            read_validation_file(tmp_path / "val.csv")
        assert hub.asked == []
