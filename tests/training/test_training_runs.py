"""The trainer on real clips with a tiny real model, in processes of its own, as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import wandb
import yaml
from huggingface_hub import RepoUrl
from PIL import Image
from safetensors.torch import load_file

from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.data import ClipStream, load_dataset_config
from framebridge_plugin.media import read_image, to_uint8
from framebridge_plugin.models.widening import load_bridge_transformer
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training.objective import ObjectiveSettings
from tests.training.bridge_runs import make_specification
from tests.training.conftest import SIZE, command_environment, small_files_only
from tests.training.test_told import sample_as_told

LORA = ("training.training_type=lora", "lora.rank=4", "lora.lora_alpha=8")
CONSTANT_RATE = ("optimization.lr_scheduler=constant", "optimization.lr_warmup_steps=0")


def succeeded(result: subprocess.CompletedProcess) -> bool:
    assert result.returncode == 0, result.stderr[-3000:]
    return True


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(run)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{file.relative_to(folder)}:{name}": t for file in files for name, t in load_file(file).items()}


def first_sampled_frame(contact_sheet: Path) -> np.ndarray:
    """Of the eight frames that lie after the input image and below the caption."""
    with Image.open(contact_sheet) as sheet:
        left = sheet.width - (8 * (SIZE + 2) - 2)
        return np.asarray(sheet)[-SIZE:, left : left + SIZE].astype(int)


def assert_same_weights(first: Path, second: Path) -> None:
    expected, actual = weights(first), weights(second)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.fixture(scope="module")
def dropout_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that draws from torch's global generator while it trains, and only then."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("dropout") / "model")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | {"dropout": 0.2}))
    return folder


@pytest.fixture
def one_clip(clips_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    return write_one_clip(clips_folder, tmp_path / "one clip")


def write_one_clip(clips_folder: Path, folder: Path) -> tuple[str, ...]:
    """Options with which nothing but index and eps is drawn."""
    folder.mkdir()
    shutil.copy(next(clips_folder.glob("*.mp4")), folder / "a.mp4")
    (folder / "a.txt").write_text("the only clip")
    return (
        f"framebridge.data.data_root={folder}",
        "framebridge.data.window=start",
        "framebridge.image_noise=false",
        "framebridge.prior_noise=false",
        "framebridge.caption_dropout=0",
        "training.batch_size=1",
    )


def expected_update(
    run: Path, model: Path, step: int, draws: list[tuple[int, int]], dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Loss and gradient norm of the untrained network for an update of a run with the options of `one_clip`.

    Args:
        run: The run's folder.
        model: Its model.
        step: The update.
        draws: Micro-steps and ranks that it is the mean over.
        dtype: The precision of all models.
    """
    from finetrainers import utils

    objective = ObjectiveSettings(image_noise=False, prior_noise=False, caption_dropout=0.0)
    dtypes = dict.fromkeys(("transformer_dtype", "vae_dtype", "text_encoder_dtype"), dtype)
    specification = make_specification(model, objective, **dtypes)
    models = specification.load_diffusion_models()
    network, scheduler = models["transformer"].train(), models["scheduler"]
    sample = next(iter(ClipStream(load_dataset_config(run / "dataset_config.json"), seed=7)))
    prepare = {name: sample[name] for name in ("caption", "video", "sample_seed")}
    conditions = specification.prepare_conditions(**specification.load_condition_models(), **prepare)
    latents = specification.prepare_latents(**specification.load_latent_models(), **prepare)
    losses = []
    for micro_step, rank in draws:
        generator = torch.Generator().manual_seed(derive_seed("step", 7, step, micro_step, rank))
        sigmas = utils.prepare_sigmas(
            scheduler=scheduler,
            sigmas=utils.get_scheduler_sigmas(scheduler),
            batch_size=1,
            num_train_timesteps=1000,
            generator=generator,
        )
        prediction, target, _ = specification.forward(
            transformer=network,
            scheduler=scheduler,
            condition_model_conditions=specification.collate_conditions([conditions]),
            latent_model_conditions=specification.collate_latents([latents]),
            sigmas=sigmas,
            generator=generator,
        )
        losses.append((prediction - target).square().mean())
    assert len({loss.item() for loss in losses}) == len(draws)
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()


@pytest.mark.parametrize("backend", ["ptd", "accelerate"])
@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_trains_saves_and_resumes_bit_for_bit(train, dropout_model, tmp_path, kind, backend):
    model = f"model.pretrained_model_name_or_path={dropout_model}"
    options = (*kind, model, f"parallelism.parallel_backend={backend}")
    result = train(*options, output="whole")
    assert succeeded(result)
    sample_as_told(result.stderr)
    name = "lora" if kind else "model"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert len(metrics(whole)) == 4
    assert (whole / "recipe.yaml").is_file()
    assert (whole / "versions.json").is_file()
    assert (whole / "loss.png").is_file()
    assert list((whole / "tensorboard").iterdir())

    # A checkpoint of step 2 alone, as a run leaves it that was killed before step 4.
    parts.mkdir()
    subprocess.run(["cp", "-r", whole / "checkpoints", parts / "checkpoints"], check=True)
    subprocess.run(["rm", "-r", parts / "checkpoints" / "step_000004"], check=True)
    (parts / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    assert succeeded(train(*options, "checkpoints.resume_from_checkpoint=latest", output="parts"))
    assert losses(parts) == losses(whole)
    assert [entry["lr"] for entry in metrics(parts)] == [entry["lr"] for entry in metrics(whole)]
    assert_same_weights(whole / name, parts / name)
    assert_same_weights(whole / "checkpoints/step_000004/trainer", parts / "checkpoints/step_000004/trainer")


def test_ctrl_c_leaves_the_last_checkpoint_usable(train, recipe_file, tmp_path):
    command = [sys.executable, "-m", "framebridge_plugin", "train", f"--recipe={recipe_file}"]
    process = subprocess.Popen(
        [*command, "optimization.train_steps=5000"],
        env=command_environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background hands on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/step_000002").is_dir() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert succeeded(train("checkpoints.resume_from_checkpoint=2", "optimization.train_steps=3"))
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_validation_changes_nothing_and_writes_videos(train, dropout_model, validation_file, tmp_path):
    model = f"model.pretrained_model_name_or_path={dropout_model}"
    assert succeeded(train(model, output="without"))
    options = (f"validation.validation_dataset_file={validation_file}", "validation.validation_steps=1")
    assert succeeded(train(model, *options, output="with"))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert_same_weights(tmp_path / "with/model", tmp_path / "without/model")
    videos = {path.name for path in (tmp_path / "with/validation").glob("*.mp4")}
    assert videos == {"step000001-00.mp4", "step000002-00.mp4", "step000003-00.mp4", "final-00.mp4"}
    with av.open(str(tmp_path / "with/validation/final-00.mp4")) as container:
        assert container.streams.video[0].average_rate == 12, "not the rate of the training clips"


@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_the_final_validation_uses_the_trained_weights(train, model_folder, validation_file, tmp_path, kind):
    options = (f"validation.validation_dataset_file={validation_file}", "optimization.lr=1e-2")
    assert succeeded(train(*kind, *options))
    pipeline = open_pipeline(str(tmp_path / "run"))
    with validation_file.open() as file:
        row = next(csv.DictReader(file))

    def frames() -> np.ndarray:
        generator = torch.Generator().manual_seed(derive_seed("validation", 7, 0))
        call = {"image": read_image(row["image_path"]), "prompt": row["caption"], "num_inference_steps": 2}
        return to_uint8(pipeline(**call, generator=generator, output_type="pil").frames[0]).astype(int)

    first = first_sampled_frame(tmp_path / "run/validation/final-00.png")
    assert np.abs(first - frames()[0]).max() <= 1
    pipeline.transformer = load_bridge_transformer(str(model_folder), subfolder="transformer")
    assert np.abs(first - frames()[0]).max() > 1


@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_precomputation_gives_the_same_run(train, tmp_path, kind):
    assert succeeded(train(*kind, output="direct"))
    options = ("dataset.enable_precomputation=true", "dataset.precomputation_items=3")
    assert succeeded(train(*kind, *options, output="precomputed"))
    assert losses(tmp_path / "precomputed") == losses(tmp_path / "direct")


def test_a_run_that_precomputes_once_resumes_where_it_stopped(train, tmp_path):
    once = ("dataset.enable_precomputation=true", "dataset.precomputation_items=3", "dataset.precomputation_once=true")
    options = (*once, *CONSTANT_RATE)
    assert succeeded(train(*options, output="whole"))
    # It stops at the second of the three items.
    assert succeeded(train(*options, "optimization.train_steps=2", output="parts"))
    assert succeeded(train(*options, "checkpoints.resume_from_checkpoint=latest", output="parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "parts/model", tmp_path / "whole/model")


def test_bfloat16_lora_with_checkpointing_and_offline_wandb(
    train, one_clip, model_folder, validation_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = (
        *one_clip,
        *("precision.transformer_dtype=bf16", "precision.vae_dtype=bf16", "precision.text_encoder_dtype=bf16"),
        *("training.gradient_checkpointing=true", "training.enable_slicing=true"),
        *("tracking.report_to=wandb", f"validation.validation_dataset_file={validation_file}"),
    )
    assert succeeded(train(*LORA, *options))
    # The layers start at zero, and the latents stay in float32, whatever the network computes in.
    expected, _ = expected_update(tmp_path / "run", model_folder, 1, [(0, 0)], torch.bfloat16)
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)
    assert list((tmp_path / "run/logs/wandb").glob("offline-run-*"))
    assert (tmp_path / "run/validation/final-00.mp4").is_file()
    saved = weights(tmp_path / "run/lora")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in saved.items())


def test_an_update_is_the_mean_over_its_micro_steps_and_is_clipped_once(train, one_clip, model_folder, tmp_path):
    # With this learning rate the network stays as it is.
    options = (*one_clip, *CONSTANT_RATE, "optimization.lr=1e-12", "training.gradient_accumulation_steps=2")
    assert succeeded(train(*options, "optimization.train_steps=9", "training.max_data_samples=5", output="loose"))
    entries = metrics(tmp_path / "loose")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert [entry["samples_seen"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        loss, norm = expected_update(tmp_path / "loose", model_folder, entry["step"], [(0, 0), (1, 0)])
        assert entry["loss"] == pytest.approx(loss, rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4)
    # The norm is that of the whole update: with clipping after each half it would depend on the limit.
    tight = ("optimization.max_grad_norm=1e-6", "optimization.train_steps=1")
    assert succeeded(train(*options, *tight, output="tight"))
    assert metrics(tmp_path / "tight")[0]["grad_norm"] == entries[0]["grad_norm"] > 1e-3


def test_clipping_starts_at_the_given_update(train, tmp_path):
    options = (
        *("optimization.lr_scheduler=constant", "optimization.lr_warmup_steps=0", "optimization.train_steps=3"),
        *("optimization.max_grad_norm=1e-3", "checkpoints.checkpointing_steps=1"),
    )

    def run(start_step: int) -> Path:
        output = f"after{start_step}"
        assert succeeded(train(*options, f"framebridge.max_grad_norm_start_step={start_step}", output=output))
        return tmp_path / output

    late, never, always = run(2), run(3), run(0)
    for step in (1, 2):
        assert_same_weights(
            late / f"checkpoints/step_00000{step}/model", never / f"checkpoints/step_00000{step}/model"
        )
    assert losses(late) == losses(never)
    # The norm is logged as it was, clipped or not; the moments have the clipped gradient.
    assert [entry["grad_norm"] for entry in metrics(late)] == [entry["grad_norm"] for entry in metrics(never)]
    assert metrics(late)[0]["grad_norm"] == metrics(always)[0]["grad_norm"] > 1e-3
    final = "checkpoints/step_000003/trainer/optimizer.safetensors"
    unclipped, clipped = load_file(never / final), load_file(late / final)
    assert any(not torch.equal(tensor, clipped[name]) for name, tensor in unclipped.items())
    first = "checkpoints/step_000001/trainer/optimizer.safetensors"
    moments = load_file(always / first)
    squares = [tensor.double().square().sum() for name, tensor in moments.items() if name.endswith("exp_avg")]
    # One update with beta1 .9 leaves a tenth of the gradient there.
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw-torchao-8bit", "adamw-bnb-8bit"])
def test_8bit_optimizers_resume_and_the_diffusion_baseline_trains(train, tmp_path, optimizer):
    # A constant rate, so that a run of two updates is the first half of one of four.
    options = (
        *("framebridge.objective=diffusion", f"optimization.optimizer={optimizer}"),
        *("optimization.lr_scheduler=constant", "optimization.lr_warmup_steps=0"),
    )
    assert succeeded(train(*options, output="whole"))
    config = json.loads((tmp_path / "whole/model/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "CogVideoXDDIMScheduler"
    assert succeeded(train(*options, "optimization.train_steps=2", output="part"))
    assert succeeded(train(*options, "checkpoints.resume_from_checkpoint=2", output="part"))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_processes_wait_for_each_other_as_long_as_either_limit_says(train, monkeypatch):
    limits, init_process_group = [], torch.distributed.init_process_group

    def noting(*args, **kwargs):
        limits.append(kwargs["timeout"].total_seconds())
        init_process_group(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, "init_process_group", noting)
    for init, nccl in ((60, 1234), (1234, 60)):
        limit = (f"parallelism.init_timeout={init}", f"parallelism.nccl_timeout={nccl}")
        assert succeeded(
            train("parallelism.parallel_backend=ptd", *limit, "optimization.train_steps=1", output=str(init))
        )
    assert limits == [1234, 1234]


def test_a_loss_that_is_not_finite_stops_before_the_update(train, tmp_path):
    options = ("optimization.lr=1e30", "optimization.lr_warmup_steps=0", "optimization.lr_scheduler=constant")
    result = train(*options)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: step 2: the loss is")
    assert "Traceback" not in result.stderr
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1]


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_nothing_half_written(train, tmp_path):
    with small_files_only():
        result = train()
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot write checkpoint")
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_resume_with_another_objective_is_refused(train, tmp_path):
    assert succeeded(train("optimization.train_steps=2"))
    result = train("checkpoints.resume_from_checkpoint=latest", "framebridge.target=eps_psi")
    assert result.returncode == 1
    assert "it was trained with target 'v'" in result.stderr
    dry = train("checkpoints.resume_from_checkpoint=latest", "framebridge.target=eps_psi", "--dry-run")
    assert (dry.returncode, dry.stderr.splitlines()[-1]) == (1, result.stderr.splitlines()[-1])
    assert train("checkpoints.resume_from_checkpoint=latest", "--dry-run").returncode == 0
    missing = train("checkpoints.resume_from_checkpoint=7", "--dry-run")
    assert missing.returncode == 1
    assert "(steps there: 2)" in missing.stderr


def test_the_model_is_pushed_to_the_hub_and_the_token_written_nowhere(train, tmp_path, monkeypatch):
    from finetrainers.trainer.sft_trainer import trainer as stock

    from framebridge_plugin.training import trainer as ours

    pushed = []

    def upload_folder(*, repo_id: str, folder_path: Path, token: str) -> None:
        pushed.append((repo_id, Path(folder_path), token, (folder_path / "model_index.json").is_file()))

    # The hub itself is all that is missing.
    monkeypatch.setattr(
        stock, "create_repo", lambda repo_id, token, exist_ok: RepoUrl(f"https://huggingface.co/me/{repo_id}")
    )
    monkeypatch.setattr(ours, "upload_folder", upload_folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    token = "hf_notmeanttobeseen"
    hub = ("hub.push_to_hub=true", f"hub.hub_token={token}", "hub.hub_model_id=mine")
    assert succeeded(train("tracking.report_to=wandb", *hub, "optimization.train_steps=1"))
    assert pushed == [("me/mine", tmp_path / "run/model", token, True)]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert [path for path in files if token.encode() in path.read_bytes()] == []


def test_the_newest_checkpoints_are_kept_and_the_last_is_resumed_whatever_their_digits(train, tmp_path):
    options = (*CONSTANT_RATE, "checkpoints.checkpointing_steps=1")
    assert succeeded(train(*options, "optimization.train_steps=2"))
    folder = tmp_path / "run/checkpoints"
    # As if they were from the end of a run of a million updates.
    for step, later in ((1, 999_999), (2, 1_000_000)):
        renamed = (folder / f"step_{step:06d}").rename(folder / f"step_{later:06d}")
        state = json.loads((renamed / "trainer/state.json").read_text())
        (renamed / "trainer/state.json").write_text(json.dumps(state | {"step": later}))
    resume = ("checkpoints.resume_from_checkpoint=latest", "optimization.train_steps=1000001")
    assert succeeded(train(*options, *resume, "checkpoints.checkpointing_limit=2"))
    assert {path.name for path in folder.iterdir()} == {"step_1000000", "step_1000001"}
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1, 2, 1_000_001]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(train, tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", noting)
    assert succeeded(train("optimization.train_steps=1"))
    folder = tmp_path / "run/checkpoints/step_000001"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    partial = str(folder.with_name(".step_000001.partial"))
    assert {file.removeprefix(f"{partial}/") for file in flushed if file.startswith(partial)} == files


def test_a_run_is_not_overwritten(train, tmp_path):
    assert succeeded(train("optimization.train_steps=2"))
    again = train()
    dry = train("--dry-run")
    assert again.returncode == dry.returncode == 2
    assert "holds the checkpoints of another run" in again.stderr
    assert dry.stderr == again.stderr
    assert yaml.safe_load(dry.stdout)["optimization"]["train_steps"] == 4


@pytest.mark.parametrize(
    "overrides, message",
    [
        ((*LORA, "lora.target_modules=[nonsense]"), "error: lora.target_modules: "),
        (("validation.enable_model_cpu_offload=true",), "error: enable_model_cpu_offload: there is no accelerator"),
        (("tracking.report_to=wandb",), "error: tracking.report_to: wandb has no login here"),
        (("hub.push_to_hub=true",), "error: hub.push_to_hub: "),
    ],
)
def test_a_dry_run_refuses_what_the_start_would(train, tmp_path, monkeypatch, overrides, message):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # which keeps the mode of an earlier run of this process
    result = train("--dry-run", *overrides)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(message)
    assert yaml.safe_load(result.stdout)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_refused_in_one_line(train, tmp_path):
    assert succeeded(train("optimization.train_steps=2"))
    file = next((tmp_path / "run/checkpoints/step_000002").rglob("optimizer.safetensors"))
    os.truncate(file, file.stat().st_size // 2)
    result = train("checkpoints.resume_from_checkpoint=latest")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot resume from")
    assert "Traceback" not in result.stderr


def test_cosine_decays_to_zero(train, tmp_path):
    options = ("optimization.lr_scheduler=cosine", "optimization.lr_warmup_steps=0", "optimization.lr=1e-3")
    assert succeeded(train(*options))
    rates = [entry["lr"] for entry in metrics(tmp_path / "run")]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 2e-4


@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_a_hub_id_is_loaded_from_the_cache(train, model_folder, tmp_path, kind):
    cache, commit = tmp_path / "hub", "0123456789" * 4
    repository = cache / "models--tiny--cogvideox"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    model = ("model.pretrained_model_name_or_path=tiny/cogvideox", f"model.cache_dir={cache}")
    assert succeeded(train(*kind, *model, "optimization.train_steps=1"))
    if not kind:
        assert (tmp_path / "run/model/text_encoder/model.safetensors").is_file()
        assert (tmp_path / "run/model/tokenizer/spiece.model").is_file()
