"""`finetrainers export` on checkpoints of real runs, and what a model's manifest is for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framebridge_plugin.backbones.manifest import folder_problem
from framebridge_plugin.cli import main
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.training import FrameBridgeTrainer
from tests.training.bridge_runs import make_inputs, run_trainer

WEIGHTS = {
    "full": (
        "model/transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    ),
    "lora": ("lora/pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run and a LoRA, each with an average and without, with checkpoints of updates 1 and 2."""
    folder = tmp_path_factory.mktemp("runs")
    make_inputs(folder)
    for kind in WEIGHTS:
        for name, options in (("plain", ()), ("averaged", ("--ema_decay=0.5",))):
            run_trainer(
                FrameBridgeTrainer, folder, folder / f"{name}_{kind}", kind, "--checkpointing_steps=1", *options
            )
    return folder


def export(run: Path, to: Path, *options: str) -> dict[str, torch.Tensor]:
    assert main(["export", "--run", str(run), "--to", str(to), *options]) == 0
    assert folder_problem(to, digests=True) is None
    file = next(to / inner for _, inner in WEIGHTS.values() if (to / inner).is_file())
    return load_file(file)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_average_and_trained_weights_of_any_checkpoint(runs, tmp_path, kind, capsys):
    plain, averaged = runs / f"plain_{kind}", runs / f"averaged_{kind}"
    # Averaging changes no weight: what one run exports, the other one has as its trained weights.
    for step in (1, 2):
        raw = load_file(plain / f"checkpoints/step_{step:06d}" / WEIGHTS[kind][0])
        assert equal(export(plain, tmp_path / f"plain{step}", "--step", str(step)), raw)
        assert equal(export(averaged, tmp_path / f"raw{step}", f"--step={step}", "--raw"), raw)
        mean = load_file(averaged / f"checkpoints/step_{step:06d}" / WEIGHTS[kind][0])
        assert equal(export(averaged, tmp_path / f"ema{step}", f"--step={step}", "--ema"), mean)
        assert not equal(mean, raw)
    assert f"{tmp_path / 'ema2'}: " in capsys.readouterr().out
    assert equal(export(averaged, tmp_path / "newest"), mean)
    open_pipeline(str(tmp_path / "raw2"))


def test_it_needs_no_finetrainers(runs, tmp_path):
    program = "import sys; sys.modules['finetrainers'] = None\nfrom framebridge_plugin.cli import main\n"
    arguments = ["export", "--run", runs / "averaged_full", "--raw", "--to", tmp_path / "model"]
    result = subprocess.run(
        [sys.executable, "-c", f"{program}sys.exit(main(sys.argv[1:]))", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'model'}: model of step_000002, the trained weights\n"


def test_what_cannot_be_exported_is_refused_in_one_line(runs, tmp_path, capsys):
    run = shutil.copytree(runs / "plain_lora", tmp_path / "run")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()

    def refusal(*options: str, to: str = "new") -> tuple[int, str]:
        code = main(["export", "--run", str(run), "--to", str(tmp_path / to), *options])
        (line,) = capsys.readouterr().err.splitlines()
        return code, line

    assert refusal("--step=7") == (2, f"error: --step 7: {run} has no such checkpoint (steps there: 1, 2)")
    assert refusal("--ema")[0] == 2
    assert refusal(to="there") == (2, f"error: --to {tmp_path / 'there'}: is there already; name another folder")
    file = run / "checkpoints/step_000002/lora/pytorch_lora_weights.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, line = refusal()
    assert code == 1
    assert line.startswith(f"error: {file} has other bytes than were written; give the --step of another")
    assert not (tmp_path / "new").exists()
    export(run, tmp_path / "new", "--step=1")


# The manifest of a model


def test_a_model_that_was_not_copied_whole_is_not_opened(runs, tmp_path):
    model = shutil.copytree(runs / "plain_full/model", tmp_path / "model")
    (model / "model_index.json").write_text((model / "model_index.json").read_text() + "\n\n")  # as after an editor
    open_pipeline(str(model))
    os.truncate(model / "tokenizer/spiece.model", 10)
    with pytest.raises(FrameBridgeError, match=r"spiece.model has 10 bytes, not \d+; copy the folder again, or"):
        open_pipeline(str(model))
    (model / "manifest.json").unlink()
    assert (
        folder_problem(model)
        == f"{model / 'manifest.json'} is missing: the folder is not whole, or of an earlier version"
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_sample_compares_every_byte_if_it_is_asked_to(runs, tmp_path, kind, capsys):
    folder = Path(shutil.copytree((runs / f"plain_{kind}" / WEIGHTS[kind][0]).parents[kind == "full"], tmp_path / "x"))
    options = ["--image", str(next(runs.glob("*.png"))), "--prompt=a", f"--output={tmp_path / 'v.mp4'}", "--steps=1"]
    assert main(["sample", "--model", str(folder), "--verify", *options]) == 0
    assert f"--verify: every file of {folder} is as its manifest says\n" in capsys.readouterr().err
    file = folder / WEIGHTS[kind][1]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert main(["sample", "--model", str(folder), "--verify", *options]) == 2
    assert capsys.readouterr().err == f"error: --verify: {file} has other bytes than were written\n"
    assert main(["sample", "--model", str(runs / "model"), "--verify", *options]) == 2


# The files of a run


def test_a_run_shares_no_file_with_its_base_and_takes_the_space_of_one_copy(runs):
    base = {(path.stat().st_dev, path.stat().st_ino) for path in (runs / "model").rglob("*") if path.is_file()}
    run = runs / "plain_full"
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not {(path.stat().st_dev, path.stat().st_ino) for path in files} & base
    for name in (
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/spiece.model",
    ):
        original = (runs / "model" / name).read_bytes()
        copies = [
            path for path in files if str(path).endswith(f"/model/{name}") or path.parent.parent.name == "components"
        ]
        copies = [path for path in copies if path.name == Path(name).name and path.read_bytes() == original]
        # In each checkpoint, in the run's result, and the run's own.
        assert len(copies) == 4
        assert len({path.stat().st_ino for path in copies}) == 1
