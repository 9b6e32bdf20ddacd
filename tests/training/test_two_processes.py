"""Our trainer on two processes, replicated and sharded; all runs are made in the same two, which torchrun starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.training import FrameBridgeTrainer
from framebridge_plugin.training.precomputation.store import Manifest
from tests.tiny_models import CAPTIONS, make_clips
from tests.training import test_latte_runs as latte
from tests.training import two_processes
from tests.training.averaged_run import OPTIONS
from tests.training.bridge_runs import make_inputs, run_trainer
from tests.training.conftest import SIZE, run_in_two_processes, write_recipe
from tests.training.run_results import (
    CONSTANT_RATE,
    LORA,
    assert_same_weights,
    expected_update,
    heldout,
    losses,
    metrics,
    succeeded,
    write_one_clip,
)
from tests.training.test_broken_data import BROKEN, add_broken, found
from tests.training.test_ema import exported, trainer_file

SPLITS = ("dp_degree", "dp_shards")
AVERAGED = [("full", "dp_degree"), ("full", "dp_shards"), ("lora", "dp_shards")]


FOUR_CLIPS = {
    "2 processes": ("training.batch_size=2",),
    "2 processes, 2 micro-steps": ("training.batch_size=1", "training.gradient_accumulation_steps=2"),
}


QUANTIZED = (
    *(*LORA, *CONSTANT_RATE, "optimization.train_steps=2", "training.gradient_checkpointing=true"),
    *("precision.transformer_quantization=int8", "precision.text_encoder_quantization=fp8"),
)


def heldout_clips(folder: Path) -> tuple[str, ...]:
    """Options for the loss on three clips, which two processes do not share evenly."""
    clips = make_clips(folder / "heldout", count=3, frames=12, size=SIZE, captions=("held out", *CAPTIONS))
    return (f"validation.heldout.data_root={clips}",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, clips_folder: Path) -> Path:
    """The folder of all runs and of what they are made from."""
    folder = tmp_path_factory.mktemp("two")
    commands: list[list[Any]] = []

    def train(recipe: Path, output: str, *options: str, exit_code: int = 0) -> None:
        commands.append(
            [exit_code, "train", f"--recipe={recipe}", f"checkpoints.output_dir={folder / output}", *options]
        )

    recipe = write_recipe(folder, model_folder, clips_folder)
    one_clip = (*write_one_clip(clips_folder, folder / "one clip"), *CONSTANT_RATE, "framebridge.ema_decay=0.9")
    for split in SPLITS:
        options = (*one_clip, f"parallelism.{split}=2")
        train(recipe, f"whole-{split}", *options)
        train(recipe, f"mixed-{split}", *options, "precision.autocast=bf16")
        train(recipe, f"parts-{split}", *options, "optimization.train_steps=2")
        train(recipe, f"parts-{split}", *options, "checkpoints.resume_from_checkpoint=latest")

    lora = (*one_clip[:-1], *LORA)
    for split in SPLITS:
        options = (*lora, f"parallelism.{split}=2")
        train(recipe, f"lora-whole-{split}", *options)
        train(recipe, f"lora-parts-{split}", *options, "optimization.train_steps=2")
        train(recipe, f"lora-parts-{split}", *options, "checkpoints.resume_from_checkpoint=latest")

    train(recipe, "quantized", *QUANTIZED, "training.batch_size=1", "parallelism.dp_degree=2")

    rounded = (*one_clip[:-1], "precision.transformer_dtype=bf16", "optimization.stochastic_rounding=true")
    for split in SPLITS:
        options = (*rounded, f"parallelism.{split}=2")
        train(recipe, f"rounded-whole-{split}", *options)
        train(recipe, f"rounded-parts-{split}", *options, "optimization.train_steps=2")
        train(recipe, f"rounded-parts-{split}", *options, "checkpoints.resume_from_checkpoint=latest")

    for name, options in FOUR_CLIPS.items():
        options = (*options, f"framebridge.caption_cache_dir={folder / 'captions'}", *heldout_clips(folder))
        train(recipe, name, *CONSTANT_RATE, *options, "parallelism.dp_degree=2", "optimization.train_steps=3")

    Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(folder / "red.png")
    rows = "\n".join(["caption,image_path,num_inference_steps", *[f"red,{folder / 'red.png'},2"] * 2])
    (folder / "rows.csv").write_text(f"{rows}\n")
    (folder / "not validated/validation/final-01.mp4").mkdir(parents=True)  # where the second process would write
    options = ("parallelism.dp_degree=2", f"validation.validation_dataset_file={folder / 'rows.csv'}")
    train(recipe, "not validated", *options, "optimization.train_steps=1", exit_code=3)

    clips = shutil.copytree(clips_folder, folder / "some broken")
    add_broken(clips, BROKEN)
    options = ("parallelism.dp_degree=2", "training.batch_size=1", f"framebridge.data.data_root={clips}")
    train(recipe, "broken", *options)

    (folder / "latte").mkdir()
    inputs = latte.write_inputs(folder / "latte")
    measuring = f"validation.heldout.class_root={inputs / 'heldout'}"
    options = (
        *latte.options(inputs, "bridge_neural_prior"),
        measuring,
        "training.batch_size=1",
        "optimization.train_steps=2",
    )
    for split in SPLITS:
        split_so = ("parallelism.parallel_backend=ptd", f"parallelism.{split}=2")
        train(latte.write_recipe(inputs, inputs), f"latte-{split}", *options, *split_so)

    (folder / "averaged").mkdir()
    inputs = make_inputs(folder / "averaged")
    # With validation, after which no rank may go on with an average that it has gathered.
    validation = ("--validation_steps=1", f"--validation_dataset_file={inputs / 'validation.csv'}")
    for kind, split in AVERAGED:
        output = str(folder / f"averaged-{kind}-{split}")
        commands.append([0, "averaged", str(inputs), output, kind, f"--{split}=2", *validation])

    Manifest(1, 1, 1, 0, 1, {"seed": 0}).write(folder / "of another seed")
    options = ("parallelism.dp_degree=2", f"framebridge.precomputed={folder / 'of another seed'}")
    train(recipe, "refused", *options, exit_code=2)

    (folder / "printed.txt").write_text(run_in_two_processes(two_processes.__name__, commands))
    return folder


def test_a_store_that_is_refused_is_refused_once(runs):
    """All have the exit code, of which the program that runs them makes sure."""
    printed = (runs / "printed.txt").read_text()
    assert printed.count("are not those of this run") == 1
    assert "error: \n" not in printed


@pytest.mark.parametrize("split", SPLITS)
def test_an_update_is_the_mean_over_the_ranks_which_do_not_share_noise(runs, model_folder, split):
    run = runs / f"whole-{split}"
    assert metrics(run)[-1]["samples_seen"] == 8
    loss, norm = expected_update(run, model_folder, 1, 2)
    assert metrics(run)[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics(run)[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_same_clips_of_an_update_are_the_same_update_however_they_are_shared(runs, train, tmp_path):
    """The same clips with the same draws; sums are taken in another order."""
    whole = (*CONSTANT_RATE, "training.batch_size=4", "optimization.train_steps=3", *heldout_clips(tmp_path))
    assert succeeded(train(*whole))
    halves = ("training.batch_size=2", "training.gradient_accumulation_steps=2")
    assert succeeded(train(*whole, *halves, output="halves"))
    expected = losses(tmp_path / "run")
    found = {name: losses(runs / name) for name in FOUR_CLIPS} | {"halves": losses(tmp_path / "halves")}
    measured = {name: heldout(runs / name) for name in FOUR_CLIPS} | {"halves": heldout(tmp_path / "halves")}
    # The processes shared the captions that they embedded.
    assert len(list(runs.glob("captions/*/*.safetensors"))) == len({*CAPTIONS, "", "held out"})
    # A run of two processes goes on with one, which makes its last update anew.
    resume = f"checkpoints.output_dir={runs / '2 processes'}", "checkpoints.resume_from_checkpoint=2"
    assert succeeded(train(*whole, *resume))
    found["resumed"] = losses(runs / "2 processes")
    measured["resumed"] = heldout(runs / "2 processes")
    for name, values in found.items():
        assert values == pytest.approx(expected, rel=1e-5), name
        assert list(measured[name]) == [0, 3]
        for step, numbers in heldout(tmp_path / "run").items():
            assert measured[name][step] == pytest.approx(numbers, rel=1e-5), name
    other = train(*whole, *halves[:1], *resume)
    assert other.returncode == 1
    assert "it was trained with clips per update 4;" in other.stderr


def test_a_validation_that_fails_on_one_process_ends_none(runs):
    """All agree on the exit code, of which the program that runs them makes sure."""
    run = runs / "not validated"
    (failure,) = [entry for entry in metrics(run) if "validation_error" in entry]
    assert "final-01.mp4" in failure["validation_error"]
    assert (run / "validation/final-00.mp4").is_file()
    assert (run / "model/model_index.json").is_file()


@pytest.mark.parametrize("split", SPLITS)
def test_they_resume_bit_for_bit(runs, split):
    whole, parts = runs / f"whole-{split}", runs / f"parts-{split}"
    assert losses(parts) == losses(whole)
    assert_same_weights(whole / "checkpoints/step_000004/trainer", parts / "checkpoints/step_000004/trainer")


@pytest.mark.parametrize("split", SPLITS)
def test_mixed_precision_trains_float32_weights_shared_out_or_not(runs, split):
    """Replicas by autocast, shards by the policy with which they are gathered."""
    whole, mixed = runs / f"whole-{split}", runs / f"mixed-{split}"
    assert losses(mixed)[0] != losses(whole)[0]
    assert losses(mixed) == pytest.approx(losses(whole), rel=1e-2)
    moments = load_file(mixed / "checkpoints/step_000004/trainer/optimizer.safetensors")
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}


@pytest.mark.parametrize("split", SPLITS)
def test_they_round_at_random_as_one(runs, split):
    """Replicas that did not round alike would be made alike by a resume."""
    whole, parts = runs / f"rounded-whole-{split}", runs / f"rounded-parts-{split}"
    assert losses(parts) == losses(whole)
    assert_same_weights(whole / "checkpoints/step_000004", parts / "checkpoints/step_000004")


def test_a_base_in_8_bits_is_each_process_s_own(runs, train, tmp_path):
    assert succeeded(train(*QUANTIZED))
    assert losses(runs / "quantized") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_their_lora_resumes_bit_for_bit_and_is_what_they_trained(runs, split):
    whole, parts = runs / f"lora-whole-{split}", runs / f"lora-parts-{split}"
    assert losses(parts) == losses(whole)
    assert losses(whole) == pytest.approx(losses(runs / f"lora-whole-{SPLITS[0]}"), rel=1e-4)
    assert_same_weights(whole / "checkpoints/step_000004", parts / "checkpoints/step_000004")

    transformer = open_pipeline(str(parts)).transformer
    trained = load_file(whole / "checkpoints/step_000004/trainer/weights.safetensors")
    assert trained["patch_embed.proj.lora_B.default.weight"].abs().max() > 1e-3
    found = {name.replace(".default_0.", ".default."): t for name, t in transformer.state_dict().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    A = found["patch_embed.proj.lora_A.default.weight"].flatten(1)
    assert torch.equal(A, torch.eye(len(A)))


def test_they_keep_one_account_of_bad_files(runs):
    broken = {str(path) for path in (runs / "some broken").glob("*_0.mp4")}
    assert len(broken) == 3
    assert metrics(runs / "broken")[-1]["bad_files"] == 3
    assert {entry["path"] for entry in found(runs / "broken")} == broken


def test_they_share_the_work_on_a_bridge_whose_neural_prior_is_whole_on_each(runs):
    replicated, sharded = losses(runs / "latte-dp_degree"), losses(runs / "latte-dp_shards")
    assert len(sharded) == 2
    assert sharded == pytest.approx(replicated, rel=1e-4)
    measured = heldout(runs / "latte-dp_shards")
    assert list(measured) == [0, 2]
    for step, numbers in heldout(runs / "latte-dp_degree").items():
        assert measured[step] == pytest.approx(numbers, rel=1e-4)

    file = "diffusion_pytorch_model.safetensors"
    base = load_file(runs / "latte/bridge_neural_prior/transformer" / file)
    weights = {split: load_file(runs / f"latte-{split}/model/transformer" / file) for split in SPLITS}
    for name, tensor in weights["dp_shards"].items():
        torch.testing.assert_close(tensor, weights["dp_degree"][name], rtol=1e-3, atol=1e-4)
    assert not any(
        torch.equal(base[name], weights["dp_shards"][name]) for name in base if name.endswith("to_q.weight")
    )
    prior = (runs / "latte/bridge_neural_prior/neural_prior" / file).read_bytes()
    assert (runs / "latte-dp_shards/model/neural_prior" / file).read_bytes() == prior


@pytest.mark.parametrize(("kind", "split"), AVERAGED)
def test_they_export_the_average_of_one(runs, tmp_path, kind, split):
    run, alone = runs / f"averaged-{kind}-{split}", tmp_path / "alone"
    two_clips = "--gradient_accumulation_steps=2"
    run_trainer(FrameBridgeTrainer, runs / "averaged", alone, kind, *OPTIONS, two_clips)

    stored = trainer_file(run, 3, "ema")
    for rank in range(2):
        held = load_file(run / f"rank{rank}.safetensors")
        assert held.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in held.items())
    final, expected = exported(run), exported(alone)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in final.items())

    def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensors[name].flatten() for name in sorted(expected)])

    error = (flat(final) - flat(expected)).norm()
    lag = (flat(trainer_file(alone, 3, "weights")) - flat(expected)).norm()
    assert error < 1e-3 * lag
