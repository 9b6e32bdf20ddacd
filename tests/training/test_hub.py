"""What a run sends to the hub, by whose login, and what the hub answers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from framebridge_plugin.backbones.folders import LORA_FILE, LORA_INFO_FILE
from framebridge_plugin.backbones.lora_folders import LoraInfo, read_lora_info
from framebridge_plugin.training.hub import to_share
from tests.hub_server import Hub, serve_hub
from tests.training.run_results import succeeded

TOKEN = "hf_notmeanttobeseen"
PUSH = ("hub.push_to_hub=true", "hub.hub_model_id=mine", "optimization.train_steps=1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch, TOKEN) as hub:
        yield hub


def files_with_the_token(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_the_model_goes_to_a_private_repository_by_the_login_and_the_token_nowhere(train, tmp_path, monkeypatch, hub):
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = train("tracking.report_to=wandb", *PUSH)
    assert succeeded(result)
    announced = f"sends: hub.push_to_hub: at the end {tmp_path / 'run/model'} to the private repository mine"
    assert result.stderr.startswith(announced)
    assert hub.private is True
    assert {asked.authorization for asked in hub.asked if "me/mine" in asked.path} == {f"Bearer {TOKEN}"}
    model = tmp_path / "run/model"
    files = {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert hub.uploaded == files
    assert any("wandb" in str(path) for path in (tmp_path / "run").rglob("*"))
    assert files_with_the_token(tmp_path / "run") == []
    assert TOKEN not in result.stderr + result.stdout


def test_an_upload_that_the_hub_refuses_leaves_a_finished_run_and_says_what_to_do(train, tmp_path, hub):
    hub.refused = ("/commit/main",)
    result = train(*PUSH)
    assert result.returncode == 3
    model = tmp_path / "run/model"
    *_, said_model, _, error = result.stderr.splitlines()
    assert said_model == f"model: {model}"
    assert (model / "model_index.json").is_file()
    assert error == (
        "error: hub.push_to_hub: me/mine was not uploaded: the hub answers 403: You have no write access; "
        f"the model lies in {model}; to try again: {shlex.join(['hf', 'upload', 'me/mine', str(model)])}"
    )
    assert not (tmp_path / "run/crash-rank0.txt").exists()


@pytest.mark.parametrize(
    "refused, private, code, message",
    [
        (
            ("/create", "/mine", "/whoami-v2"),
            None,
            1,
            "hub.push_to_hub: no repository mine to upload to: the hub answers 403: You have no",
        ),
        ((), False, 2, "hub.private: me/mine is there and public; set hub.private=false, or another hub.hub_model_id"),
    ],
)
def test_a_repository_that_will_not_do_ends_the_run_before_its_first_update(
    train, tmp_path, hub, refused, private, code, message
):
    hub.refused, hub.private = refused, private
    result = train(*PUSH)
    assert result.returncode == code
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "run/model").exists()
    assert "Training:" not in result.stderr


def test_what_is_shared_names_no_place_of_this_machine(tmp_path):
    lora, model = tmp_path / "lora", tmp_path / "model"
    lora.mkdir()
    (lora / LORA_FILE).write_bytes(b"layers")
    info = LoraInfo("/home/me/CogVideoX-2b", replaced_components={"vae": "/home/me/vae", "text_encoder": "owner/t5"})
    info.write(lora)
    shared = to_share(lora)
    assert sorted(path.name for path in shared.iterdir()) == [LORA_INFO_FILE, LORA_FILE]
    found = read_lora_info(shared)
    assert (found.base_model, found.replaced_components) == (
        "CogVideoX-2b",
        {"vae": "vae", "text_encoder": "owner/t5"},
    )
    assert read_lora_info(lora) == info
    assert to_share(model) == model
