"""A run that begins with the weights of an earlier one: what it takes over, and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from framebridge_plugin import FrameBridgeCogVideoXPipeline
from framebridge_plugin.cli import main
from framebridge_plugin.errors import UsageError
from framebridge_plugin.training import CogVideoXBridgeSpecification, FrameBridgeTrainer
from tests.tiny_models import make_tiny_cogvideox, make_tiny_latte
from tests.training.bridge_runs import SIZE, make_inputs, make_trainer, run_trainer
from tests.training.conftest import LAUNCH_VARIABLES

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
TARGETS = "(transformer_blocks|single_transformer_blocks).*(to_q|to_k|to_v|to_out.0)"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model `model`, clips, and the runs `full` and `lora`, whose models are averages of their weights."""
    folder = make_inputs(tmp_path_factory.mktemp("start"))
    for kind in ("full", "lora"):
        run_trainer(FrameBridgeTrainer, folder, folder / kind, kind, "--ema_decay=0.5")
    return folder


class Prepared(Exception):
    """Raised where a run would make its first update."""


def prepare(inputs: Path, output: Path, kind: str, *options: str) -> Any:
    """A trainer that is about to make its first update."""

    def stop() -> None:
        raise Prepared

    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCH_VARIABLES:
            patch.delenv(name, raising=False)
        trainer = make_trainer(functools.partial(FrameBridgeTrainer, on_prepared=stop), inputs, output, kind, *options)
        with pytest.raises(Prepared):
            trainer.run()
    return trainer


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def assert_fresh(trainer: Any) -> None:
    assert (trainer.progress.step, trainer.progress.samples_seen) == (0, 0)
    assert not trainer.optimizer.state_dict()["state"]


@pytest.mark.parametrize("where", ["full", "full/model", "full/checkpoints/step_000002"])
def test_all_weights_of_a_full_run(inputs, tmp_path, where):
    trainer = prepare(inputs, tmp_path, "full", f"--start_from={inputs / where}")
    assert_equal(trainer.transformer.state_dict(), load_file(inputs / "full/model/transformer" / WEIGHTS))
    raw = load_file(inputs / "full/checkpoints/step_000002/trainer/weights.safetensors")
    assert any(not torch.equal(raw[name], tensor) for name, tensor in trainer.transformer.state_dict().items())
    assert_fresh(trainer)


def test_the_layers_of_a_lora_run(inputs, tmp_path):
    trainer = prepare(inputs, tmp_path, "lora", f"--start_from={inputs / 'lora'}", "--ema_decay=0.5")
    stored = load_file(inputs / "lora/lora" / LORA_WEIGHTS)
    layers = {f"transformer.{n}": t for n, t in get_peft_model_state_dict(trainer.transformer).items()}
    assert any(tensor.any() for name, tensor in stored.items() if "lora_B" in name)
    assert_equal(layers, stored)
    assert_fresh(trainer)
    # The average begins there too.
    for name, tensor in trainer.average.tensors.items():
        assert torch.equal(tensor, stored[f"transformer.{name.replace('.default', '')}"])


def test_a_lora_on_the_model_of_a_full_run(inputs, tmp_path):
    trainer = prepare(inputs, tmp_path, "lora", f"--start_from={inputs / 'full'}")
    trained = load_file(inputs / "full/model/transformer" / WEIGHTS)
    own = {n.replace(".base_layer", ""): t for n, t in trainer.transformer.state_dict().items() if "lora_" not in n}
    assert_equal(own, trained)
    info = trainer.model_specification._lora_info
    assert info.replaced_components == {"transformer": str(inputs / "full/model/transformer")}


def test_finetrainers_own_trainer_begins_there_too(inputs, tmp_path):
    from finetrainers.trainer import SFTTrainer  # once the repairs were made

    def prepared(kind: str, **settings: Any) -> Any:
        option = f"--start_from={inputs / kind}"
        trainer = make_trainer(SFTTrainer, inputs, tmp_path, kind, option, **settings)
        trainer._prepare_models()
        trainer._prepare_trainable_parameters()
        return trainer.transformer

    layers = {f"transformer.{n}": t for n, t in get_peft_model_state_dict(prepared("lora")).items()}
    assert_equal(layers, load_file(inputs / "lora/lora" / LORA_WEIGHTS))
    assert_equal(prepared("full").state_dict(), load_file(inputs / "full/model/transformer" / WEIGHTS))

    def of_the_base_alone(name: str, transformer_id: str, **settings: Any) -> Any:
        return CogVideoXBridgeSpecification(name, **settings)

    with pytest.raises(UsageError, match="transformer_id=args.transformer_id"):
        prepared("full", specification_class=of_the_base_alone)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_has_the_weights_of_its_checkpoint(inputs, tmp_path, kind):
    shutil.copytree(inputs / kind / "checkpoints", tmp_path / "checkpoints")
    other = tmp_path / "gone" if kind == "full" else tmp_path / "other"
    if kind == "lora":
        shutil.copytree(inputs / "lora/lora", other)
        path = other / LORA_WEIGHTS
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    options = (f"--start_from={other}", "--ema_decay=0.5", "--resume_from_checkpoint=2")
    trainer = prepare(inputs, tmp_path, kind, *options)
    stored = load_file(tmp_path / "checkpoints/step_000002/trainer/weights.safetensors")
    weights = trainer.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    assert trainer.progress.step == 2


def test_a_merged_lora_starts_a_full_run(inputs, tmp_path):
    """The remedy that the refusal names."""
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(inputs / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "merged")
    trainer = prepare(inputs, tmp_path / "run", "full", f"--start_from={tmp_path / 'merged'}")
    assert_equal(trainer.transformer.state_dict(), dict(pipeline.transformer.state_dict()))


# What is refused


def test_arguments_are_checked_as_recipes_are(inputs, tmp_path):
    with pytest.raises(UsageError, match="^start_from: .* is a LoRA, and this run trains all weights"):
        prepare(inputs, tmp_path, "full", f"--start_from={inputs / 'lora'}")
    with pytest.raises(UsageError, match="^start_from: the layers of .* are others"):
        prepare(inputs, tmp_path, "lora", f"--start_from={inputs / 'lora'}", "--rank=2")
    with pytest.raises(UsageError, match="^start_from: .* has the lora_alpha 8, this run 4"):
        prepare(inputs, tmp_path, "lora", f"--start_from={inputs / 'lora'}", "--lora_alpha=4")
    other = make_tiny_cogvideox(tmp_path / "other", seed=5, sample_size=SIZE)
    with pytest.raises(UsageError, match="^start_from: .* was trained with another model: transformer"):
        prepare(inputs, tmp_path, "lora", f"--start_from={inputs / 'lora'}", f"--transformer_id={other}/transformer")


@pytest.fixture
def recipe_file(inputs: Path, tmp_path: Path) -> Path:
    recipe = {
        "model": {"pretrained_model_name_or_path": str(inputs / "model")},
        "framebridge": {"data": {"data_root": str(inputs / "clips"), "num_frames": 9, "height": SIZE, "width": SIZE}},
        "training": {"training_type": "lora"},
        "lora": {"rank": 4, "lora_alpha": 8},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


FULL = ("training.training_type=full-finetune", "lora=null")


@pytest.mark.parametrize(("start", "overrides"), [("lora", ()), ("full", ()), ("full", FULL)])
def test_a_recipe_says_what_it_starts_from(inputs, recipe_file, capsys, start, overrides):
    override = f"framebridge.start_from={inputs / start}"
    assert main(["train", "--recipe", str(recipe_file), "--dry-run", override, *overrides]) == 0
    assert f"start_from: {inputs / start}" in capsys.readouterr().out


def test_a_dry_run_looks_at_a_lora_of_the_hub(inputs, recipe_file, tmp_path, capsys, monkeypatch):
    cached = tmp_path / "models--owner--lora"
    shutil.copytree(inputs / "lora/lora", cached / "snapshots/0123")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    dry_run = ["train", "--recipe", str(recipe_file), "--dry-run", "framebridge.start_from=owner/lora"]
    assert main(dry_run) == 0
    for option, message in (("lora.rank=8", "are others: tensor "), ("lora.lora_alpha=4", "has the lora_alpha 8")):
        assert main([*dry_run, option]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("start", "overrides", "message"),
    [
        ("lora", FULL, "lora is a LoRA, and this run trains all weights: set training.training_type=lora"),
        ("lora", ("lora.rank=8",), "lora has the rank 4, this run 8: set lora.rank=4"),
        ("lora", ("lora.lora_alpha=4",), "has the lora_alpha 8, this run 4: set lora.lora_alpha=8"),
        ("lora", ("lora.target_modules=[to_q,to_k]",), f"set lora.target_modules={json.dumps([TARGETS])}"),
        ("lora", ("model.pretrained_model_name_or_path=OTHER",), "was trained with another model: transformer."),
        ("full", (*FULL, "model.vae_id=OTHER/vae"), "was trained with another model: vae."),
        ("full", (*FULL, "model.transformer_id=OTHER/transformer"), "excludes model.transformer_id"),
        ("LATTE", FULL, "is not from a run of cogvideox_bridge"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(inputs, recipe_file, tmp_path, capsys, start, overrides, message):
    others = {"OTHER": tmp_path / "other", "LATTE": tmp_path / "latte"}
    if any("OTHER" in override for override in overrides):
        make_tiny_cogvideox(others["OTHER"], seed=5, sample_size=SIZE)
    if start == "LATTE":
        make_tiny_latte(others["LATTE"])
    overrides = [override.replace("OTHER", str(others["OTHER"])) for override in overrides]
    overrides.append(f"framebridge.start_from={others.get(start, inputs / start)}")
    capsys.readouterr()  # of making the models
    assert main(["train", "--recipe", str(recipe_file), "--dry-run", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "framebridge.start_from: " in line
    assert message in line


def test_a_start_that_is_not_there_is_refused(recipe_file, tmp_path, capsys):
    override = f"framebridge.start_from={tmp_path / 'later'}"
    assert main(["train", "--recipe", str(recipe_file), "--dry-run", override]) == 2
    assert "framebridge.start_from: " in (line := capsys.readouterr().err)
    assert "later holds no saved model or LoRA" in line
