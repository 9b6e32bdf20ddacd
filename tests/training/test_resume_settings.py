"""What a resume compares with the checkpoint, how it says what differs, and that a refusal leaves the run alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from framebridge_plugin.training.resume_settings import settings_difference, tensors_difference
from tests.training.run_results import LORA, succeeded


def test_settings_of_either_side_alone_are_differences():
    assert settings_difference({"seed": 7, "target": None}, {"target": None, "seed": 7}) is None
    assert settings_difference({"seed": 7, "rank": 4}, {"seed": 8}) == "it was trained with seed 7, rank 4"
    assert settings_difference({}, {"neural_prior": None}) == "it was trained without neural_prior"
    stored, ours = {"objective": "bridge", "seed": 7}, {"objective": "diffusion", "seed": 7, "rank": 4}
    assert settings_difference(stored, ours) == "it was trained with objective 'bridge' and without rank"


def test_many_differences_are_counted():
    message = settings_difference({f"setting{number}": number for number in range(6)}, {})
    shown = "setting0 0, setting1 1, setting2 2, setting3 3"
    assert message == f"it was trained with {shown} (2 more settings differ)"


def test_the_first_tensor_that_differs_is_named():
    network = torch.nn.Linear(2, 3).state_dict()
    assert tensors_difference(network, network) is None
    assert tensors_difference({"weight": network["weight"]}, network) == "tensor bias is missing"
    assert tensors_difference(network, {"weight": network["weight"]}) == "tensor bias is none of this network's"
    other = {**network, "weight": torch.zeros(3, 1)}
    assert tensors_difference(other, network) == "tensor weight has the shape [3, 1], not [3, 2]"


# In a run


def test_a_resume_with_other_data_is_refused_and_changes_no_file(train, clips_folder, tmp_path):
    one_update, resume = "optimization.train_steps=1", "checkpoints.resume_from_checkpoint=latest"
    fewer, moved = (shutil.copytree(clips_folder, tmp_path / name) for name in ("fewer", "moved"))
    next(fewer.glob("*.mp4")).unlink()
    table = (fewer / "metadata.csv").read_text().splitlines()
    kept = [line for line in table[1:] if (fewer / line.split(",")[0]).is_file()]
    (fewer / "metadata.csv").write_text("\n".join([table[0], *kept]) + "\n")
    assert succeeded(train(one_update))

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}

    before, entries = files(), {path.name for path in (tmp_path / "run").iterdir()}
    for option, message in (
        (f"framebridge.data.data_root={fewer}", "it was trained with datasets[0] rows 5;"),
        ("framebridge.data.frame_stride=2", "it was trained with datasets[0] frame_stride 1;"),
        ("training.seed=8", "it was trained with seed 7;"),
    ):
        refused = train(option, resume)
        assert refused.returncode == 1
        assert message in refused.stderr.strip().splitlines()[-1]
        assert files() == before
        assert {path.name for path in (tmp_path / "run").iterdir()} == entries

    # The same data in another place are no other data.
    assert succeeded(train(f"framebridge.data.data_root={moved}", resume, "optimization.train_steps=2"))
    assert str(moved) in (tmp_path / "run/dataset_config.json").read_text()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*entries, "recipe-resumed.yaml"}
    assert files()["recipe.yaml"] == before["recipe.yaml"]


def changed(model: Path, folder: Path, file: str) -> str:
    """The option for a copy of a model that differs in the last byte of one file, or in one setting."""
    path = shutil.copytree(model, folder) / file
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0.012", b"0.013") if file.endswith(".json") else content[:-1] + b"\x3c")
    assert path.read_bytes() != content
    return f"model.pretrained_model_name_or_path={folder}"


def test_a_resume_on_another_model_is_refused_where_the_checkpoint_does_not_hold_it(train, model_folder, tmp_path):
    weights = "diffusion_pytorch_model.safetensors"
    network = changed(model_folder, tmp_path / "network", f"transformer/{weights}")
    vae = changed(model_folder, tmp_path / "vae", f"vae/{weights}")
    text = changed(model_folder, tmp_path / "text", "text_encoder/model.safetensors")
    noise = changed(model_folder, tmp_path / "noise", "scheduler/scheduler_config.json")
    resume, moved = "checkpoints.resume_from_checkpoint=latest", shutil.copytree(model_folder, tmp_path / "moved")
    for kind, refused in (
        (LORA, {"transformer": network, "vae": vae}),
        ((), {"text_encoder": text, "noise schedule": noise}),
    ):
        output = f"run{len(kind)}"
        assert succeeded(train(*kind, "optimization.train_steps=1", output=output))
        for name, option in refused.items():
            for dry_run in ((), ("--dry-run",)):
                result = train(*kind, *dry_run, option, resume, output=output)
                assert result.returncode == 1
                assert f"it was trained with {name} 'of digest " in result.stderr.strip().splitlines()[-1]
        same = network if not kind else f"model.pretrained_model_name_or_path={moved}"
        assert succeeded(train(*kind, same, resume, "optimization.train_steps=2", output=output))


def test_a_resume_with_another_lora_is_refused(train):
    assert succeeded(train(*LORA, "optimization.train_steps=1"))
    for option, message in (
        ("lora.rank=8", "it was trained with rank 4;"),
        ("lora.lora_alpha=4", "it was trained with lora_alpha 8;"),
        ("lora.target_modules=transformer_blocks.*to_q", "it was trained with target_modules "),
    ):
        refused = train(*LORA, option, "checkpoints.resume_from_checkpoint=latest")
        assert refused.returncode == 1
        assert message in refused.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ((), "model/transformer/diffusion_pytorch_model"),
        (("framebridge.ema_decay=0.9",), "trainer/weights"),
        (("framebridge.ema_decay=0.9",), "trainer/ema"),
        (LORA, "trainer/weights"),
    ],
    ids=["full", "full with EMA", "EMA", "lora"],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(train, tmp_path, kind, file):
    """Which torch would fill up with the fresh network's."""
    assert succeeded(train(*kind, "optimization.train_steps=1"))
    path = tmp_path / f"run/checkpoints/step_000001/{file}.safetensors"
    stored = load_file(path)
    name = sorted(stored)[-1]
    del stored[name]
    save_file(stored, path)
    refused = train(*kind, "checkpoints.resume_from_checkpoint=latest", "optimization.train_steps=2")
    assert refused.returncode == 1
    assert f"of another network: tensor {name} is missing;" in refused.stderr.strip().splitlines()[-1]
