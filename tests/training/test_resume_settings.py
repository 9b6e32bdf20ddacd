"""What a resume compares with the checkpoint, how it says what differs, and that a refusal leaves the run alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from framebridge_plugin.training.resume_settings import (
    setting_differences,
    settings_refusal,
    tensors_difference,
)
from framebridge_plugin.training.stored_checkpoints import stored_settings
from tests.training.run_results import LORA, accept_changes, metrics, succeeded

WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"


def refusal(stored: dict, settings: dict, *allowed: str) -> str | None:
    return settings_refusal(setting_differences(stored, settings), allowed)


def test_settings_of_either_side_alone_are_differences():
    def difference(stored: dict, settings: dict) -> str | None:
        return setting_differences({"refused": stored}, {"refused": settings}).get("refused")

    assert difference({"rank": 7, "target": None}, {"target": None, "rank": 7}) is None
    assert difference({"alpha": 7, "rank": 4}, {"alpha": 8}) == "with alpha 7, rank 4"
    assert difference({}, {"neural_prior": "a"}) == "without neural_prior"
    assert difference({}, {"of a later version, and not set": None, "and not switched on": False}) is None
    assert difference({"shift": None}, {"shift": 0}) == "with shift None"
    assert difference({}, {"switched on": True}) == "without switched on"
    former = {"layerwise_upcasting_modules": [], "layerwise_upcasting_storage_dtype": "torch.float8_e4m3fn"}
    assert difference(former, {"transformer_quantization": None}) is None
    assert difference(former, {"transformer_quantization": "int8"}) == "without transformer_quantization"
    used = former | {"layerwise_upcasting_modules": ["transformer"]}
    assert difference(used, {}) == "with layerwise_upcasting_modules ['transformer']"
    stored, ours = {"objective": "bridge", "alpha": 7}, {"objective": "diffusion", "alpha": 7, "rank": 4}
    assert difference(stored, ours) == "with objective 'bridge' and without rank"
    read_once = {"vae": "a", "vae (every byte)": "b"}
    assert setting_differences({"base": read_once}, {"base": {"vae": "a"}}) == {}
    assert setting_differences({"base": {"vae": "a"}}, {"base": read_once}) == {}
    many = "with setting0 0, setting1 1, setting2 2, setting3 3 (and 2 more)"
    assert difference({f"setting{number}": number for number in range(6)}, {}) == many


def test_what_is_allowed_is_no_reason_to_refuse_and_what_never_is_has_no_such_remedy():
    stored, ours = {"seed": {"seed": 7}, "batch": {"clips": 2}}, {"seed": {"seed": 8}, "batch": {"clips": 4}}
    back = "resume with the settings of the run's recipe.yaml"
    both = "with clips 2 and with seed 7"
    assert refusal(stored, ours) == f"it was trained {both}; {back}, or take the change by --allow batch --allow seed"
    assert refusal(stored, ours, "seed") == f"it was trained with clips 2; {back}, or take the change by --allow batch"
    assert refusal(stored, ours, "seed", "batch") is None
    network = {"refused": {"rank": 4}}
    assert refusal(stored | network, ours, "seed") == f"it was trained with rank 4 and with clips 2; {back}"


def test_the_first_tensor_that_differs_is_named():
    network = torch.nn.Linear(2, 3).state_dict()
    assert tensors_difference(network, network) is None
    assert tensors_difference({"weight": network["weight"]}, network) == "tensor bias is missing"
    assert tensors_difference(network, {"weight": network["weight"]}) == "tensor bias is none of this network's"
    other = {**network, "weight": torch.zeros(3, 1)}
    assert tensors_difference(other, network) == "tensor weight has the shape [3, 1], not [3, 2]"


# In a run


def test_what_the_optimizer_is_told_is_applied_anew(train, tmp_path):
    """Another rate, schedule, decay, betas, epsilon and limit of the gradient than the checkpoint was trained with."""
    assert succeeded(train("optimization.train_steps=2"))
    anew = ("lr=1e-2", "lr_warmup_steps=0", "train_steps=4", "weight_decay=0.5", "beta1=0", "beta2=0", "epsilon=0.5")
    options = [f"optimization.{option}" for option in (*anew, "max_grad_norm=1e-3")]
    limit = ("training.max_data_samples=6", "checkpoints.resume_from_checkpoint=2")
    assert succeeded(train(*options, *limit))
    (last,) = metrics(tmp_path / "run")[2:]
    # The cosine of four updates at its third, not that of two updates with a warm-up.
    assert last["step"] == 3
    assert last["lr"] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 2 / 4)) / 2)
    assert last["grad_norm"] > 1e-3

    before, after = (load_file(tmp_path / f"run/checkpoints/step_00000{step}/{WEIGHTS}") for step in (2, 3))
    state = load_file(tmp_path / "run/checkpoints/step_000003/trainer/optimizer.safetensors")
    gradient = {name: state[f"optimizer/state/{name}/exp_avg"].double() for name in after}
    assert sum(g.square().sum() for g in gradient.values()).sqrt().item() == pytest.approx(1e-3, rel=1e-3)
    for name, g in gradient.items():
        torch.testing.assert_close(state[f"optimizer/state/{name}/exp_avg_sq"].double(), g**2)
        # Adam's step without moments of before; its correction of their beginning is 1 where beta is 0.
        expected = before[name].double() * (1 - last["lr"] * 0.5) - last["lr"] * g / (g.abs() + 0.5)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-7)


CHANGES = {
    "batch": ("training.gradient_accumulation_steps=2", "with clips per update 2;"),
    "precision": ("precision.text_encoder_dtype=bf16", "with text_encoder_dtype 'torch.float32';"),
    "objective": ("framebridge.caption_dropout=0.3", "with caption_dropout 0.1;"),
    "data": ("framebridge.data.frame_stride=2", "with datasets[0] frame_stride 1;"),
    "seed": ("training.seed=8", "with seed 7;"),
}


def test_what_is_allowed_is_taken_and_noted_and_what_a_run_is_is_never(train, model_folder, tmp_path):
    autoencoder = changed(model_folder, tmp_path / "vae", f"vae/{Path(WEIGHTS).name}")
    changes = {**CHANGES, "base": (autoencoder, "with vae 'of digest ")}
    assert succeeded(train("optimization.train_steps=1"))
    resume = "checkpoints.resume_from_checkpoint=latest"
    for group, (option, message) in changes.items():
        refused = train("--dry-run", option, resume)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert f"or take the change by --allow {group}" in refused.stderr
    options, allowed = [option for option, _ in changes.values()], [f"--allow={group}" for group in changes]
    network = train("--dry-run", "framebridge.target=noise", resume, *options, *allowed)
    assert network.returncode == 1
    assert "it was trained with target 'v'; resume with the settings of the run's recipe.yaml, or ch" in network.stderr
    unknown = train("--allow=target", resume)
    assert unknown.returncode == 2
    assert "'base', 'data', 'batch'" in unknown.stderr

    assert succeeded(train(*options, *allowed, resume, "optimization.train_steps=2"))
    # It goes on after the clips that were seen, with updates of the new size.
    assert [entry["samples_seen"] for entry in metrics(tmp_path / "run")] == [2, 6]
    (noted,) = (tmp_path / "run/allowed.jsonl").read_text().splitlines()
    assert json.loads(noted).items() >= {"step": 1, "samples_seen": 2, "seed": "with seed 7"}.items()
    assert json.loads(noted).keys() == {"step", "samples_seen", *changes}
    # What has been taken is the run's own from now on.
    assert succeeded(train(*options, "--dry-run", resume))
    assert train("--dry-run", resume).returncode == 1
    # Also from a checkpoint of before, when a kill left no later one.
    shutil.rmtree(tmp_path / "run/checkpoints/step_000002")
    assert succeeded(train(*options, "--dry-run", resume))
    assert succeeded(train(*options, "optimization.train_steps=2"))
    assert [entry["samples_seen"] for entry in metrics(tmp_path / "run")] == [2, 6]


def test_a_resume_with_other_data_is_refused_and_changes_no_file(train, clips_folder, tmp_path):
    one_update, resume = "optimization.train_steps=1", "checkpoints.resume_from_checkpoint=latest"
    fewer, renamed, moved = (shutil.copytree(clips_folder, tmp_path / name) for name in ("fewer", "renamed", "moved"))
    next(fewer.glob("*.mp4")).unlink()
    table = (fewer / "metadata.csv").read_text().splitlines()
    kept = [line for line in table[1:] if (fewer / line.split(",")[0]).is_file()]
    (fewer / "metadata.csv").write_text("\n".join([table[0], *kept]) + "\n")
    old = table[1].split(",")[0]
    (renamed / old).rename(renamed / "another.mp4")
    (renamed / "metadata.csv").write_text((renamed / "metadata.csv").read_text().replace(old, "another.mp4"))
    assert succeeded(train(one_update))

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}

    before, entries = files(), {path.name for path in (tmp_path / "run").iterdir()}
    for option, message in (
        (f"framebridge.data.data_root={fewer}", "it was trained with datasets[0] rows 5,"),
        (f"framebridge.data.data_root={renamed}", "it was trained with datasets[0] files 'of digest "),
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
    weights = Path(WEIGHTS).name
    network = changed(model_folder, tmp_path / "network", f"transformer/{weights}")
    vae = changed(model_folder, tmp_path / "vae", f"vae/{weights}")
    text = changed(model_folder, tmp_path / "text", "text_encoder/model.safetensors")
    noise = changed(model_folder, tmp_path / "noise", "scheduler/scheduler_config.json")
    resume, moved = "checkpoints.resume_from_checkpoint=latest", shutil.copytree(model_folder, tmp_path / "moved")
    frozen = {"vae", "text_encoder", "tokenizer"}
    for kind, parts, refused in (
        (LORA, {"transformer", *frozen}, {"transformer": network, "vae": vae}),
        ((), frozen, {"text_encoder": text, "noise schedule": noise}),
    ):
        output = f"run{len(kind)}"
        assert succeeded(train(*kind, "optimization.train_steps=1", "model.verify_files=true", output=output))
        base = stored_settings(tmp_path / output / "checkpoints/step_000001")["base"]
        assert {name.removesuffix(" (every byte)") for name in base if name.endswith(" (every byte)")} == parts
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
    accept_changes(tmp_path / "run/checkpoints/step_000001")
    refused = train(*kind, "checkpoints.resume_from_checkpoint=latest", "optimization.train_steps=2")
    assert refused.returncode == 1
    assert f"of another network: tensor {name} is missing;" in refused.stderr.strip().splitlines()[-1]
