"""`finetrainers sample` on what runs leave behind, on base models, and on what is none of these."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from framebridge_plugin import FrameBridgeCogVideoXPipeline
from framebridge_plugin.cli import main
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training import FrameBridgeTrainer
from tests.backbones.conftest import make_trained_folder
from tests.tiny_models import make_tiny_cogvideox, make_tiny_latte
from tests.training.bridge_runs import SIZE, make_inputs, make_specification, run_trainer
from tests.training.run_results import accept_changes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model `model`, two images, and the runs `full`, `lora` and `baseline`."""
    folder = make_inputs(tmp_path_factory.mktemp("sampling"))
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE + 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    # Other settings than the reference's, so that a default in their place would show.
    run_trainer(FrameBridgeTrainer, folder, folder / "full", "full", "--beta_max=40")
    run_trainer(FrameBridgeTrainer, folder, folder / "lora", "lora", "--beta_max=40")
    run_trainer(FrameBridgeTrainer, folder, folder / "baseline", "full", "--objective=diffusion")
    return folder


@dataclass
class Sampled:
    """What one call of the command came to."""

    code: int
    said: str
    folder: Path

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    def videos(self) -> list[np.ndarray]:
        assert self.code == 0, self.said
        return [read_video(path) for path in sorted(self.folder.glob("*.mp4"))]


Sample = Callable[..., Sampled]


@pytest.fixture
def sample(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Sample:
    """Runs the command with one image, one prompt and two steps, unless it is told otherwise."""
    count = 0

    def run(model: str | Path, *options: str, images: tuple[str, ...] = ("0.png",)) -> Sampled:
        nonlocal count
        folder = tmp_path / f"sampled{count}"
        count += 1
        arguments = ["sample", "--model", str(inputs / model), "--output", str(folder / "video.mp4"), "--steps=2"]
        if "--prompt" not in options:
            arguments += ["--prompt", "a red square"]
        arguments += ["--image", *(str(inputs / image) for image in images)]
        capsys.readouterr()
        code = main([*arguments, *options])
        return Sampled(code, capsys.readouterr().err, folder)

    return run


def read_video(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def rate_of(result: Sampled) -> float:
    with av.open(str(result.folder / "video.mp4")) as container:
        return float(container.streams.video[0].average_rate or 0)


def copy_of(folder: Path, target: Path) -> Path:
    """A copy with files of its own: those of a run may be hard links."""
    return Path(shutil.copytree(folder, target))


# Models


def test_models_and_runs_are_sampled_without_finetrainers(inputs, bridge_folder, latte_folders, tmp_path):
    """Sampling must not drag in the trainer, nor what the trainer needs; and the imports say nothing."""
    program = f"""
import sys
sys.modules["finetrainers"] = None
import torch
from framebridge_plugin import FrameBridgeCogVideoXPipeline, FrameBridgeLattePipeline
print("imported", file=sys.stderr)
cogvideox = FrameBridgeCogVideoXPipeline.from_pretrained({str(bridge_folder)!r})
latte = FrameBridgeLattePipeline.from_pretrained({str(latte_folders["bridge_neural_prior"])!r})
for pipeline, condition in ((cogvideox, "a red square"), (latte, "left")):
    print(*pipeline(torch.zeros(3, 64, 64), condition, num_inference_steps=1, output_type="pt").frames.shape)
print(*sorted({{"av", "datasets", "decord", "pydantic", "wandb"}} & set(sys.modules)))
from framebridge_plugin.cli import main
code = main(sys.argv[1:])
assert "wandb.sdk" not in sys.modules
sys.exit(code)
"""
    output = tmp_path / "x.mp4"
    options = ["--model", inputs / "full", "--image", inputs / "0.png", "--output", output, "--steps=1"]
    command = [sys.executable, "-c", program, "sample", "--prompt=a", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines() == ["1 9 3 64 64", "1 4 3 64 64", ""]
    assert result.stderr.startswith("imported\n")
    assert output.is_file()


@pytest.mark.parametrize("model", ["full", "full/model", "full/checkpoints/step_000002", "lora", "lora/lora"])
def test_a_run_is_sampled_with_its_own_settings(sample, inputs, model):
    result = sample(model)
    (video,) = result.videos()
    assert video.shape == (9, SIZE, SIZE, 3)
    assert rate_of(result) == 12
    assert Image.open(result.folder / "video.png").size[0] > 8 * SIZE
    assert "bridge settings" not in result.said
    assert open_pipeline(str(inputs / model)).scheduler.config.beta_max == 40.0


def test_a_model_that_does_not_say_its_clips_has_the_references(inputs, tmp_path):
    model = copy_of(inputs / "full/model", tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    kept = {name: value for name, value in index.items() if name not in ("num_frames", "height", "width")}
    (model / "model_index.json").write_text(json.dumps(kept))
    pipeline = open_pipeline(str(model))
    assert [pipeline.config[name] for name in ("num_frames", "height", "width")] == [17, 256, 256]
    assert pipeline.scheduler.config.beta_max == 40.0


def test_the_rate_of_the_file_can_be_given(sample):
    result = sample("full", "--fps=2.5")
    assert len(result.videos()) == 1
    assert rate_of(result) == 2.5


def test_the_newest_checkpoint_of_an_unfinished_run_is_sampled(sample, inputs, tmp_path):
    unfinished = tmp_path / "unfinished/checkpoints"
    newest = copy_of(inputs / "full/checkpoints/step_000002", unfinished / "step_000010")
    # What was written last, whatever its number; not what is not whole.
    accept_changes(newest, written=2)
    accept_changes(copy_of(newest, unfinished / "step_000020"), written=1)
    accept_changes(copy_of(newest, unfinished / "step_000030"), written=3)
    (unfinished / "step_000030/trainer/state.json").unlink()
    (unfinished / "step_000040").mkdir()
    (unfinished / ".step_000011.partial").mkdir()
    result = sample(unfinished.parent)
    assert len(result.videos()) == 1
    assert f"the run has not ended: its newest checkpoint {unfinished / 'step_000010'} is used" in result.said


@pytest.mark.parametrize("base", ["CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXFunControlPipeline"])
def test_a_fine_tuned_transformer_alone_in_a_base_model(sample, inputs, tmp_path, base):
    """As the authors release it: no bridge settings beside it, so the reference's are taken, and said."""
    alone = copy_of(inputs / "full/model/transformer", tmp_path / "released/transformer")
    model = copy_of(inputs / "model", tmp_path / "base")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": base}))
    if base == "CogVideoXPipeline":
        result = sample(model, "--transformer", str(alone.parent), "--num-frames=9", f"--height={SIZE}")
        assert result.videos()[0].shape == (9, SIZE, 256, 3)
        assert rate_of(result) == 8, "nothing says it"
        assert "the model has no bridge settings: the reference's are used" in result.said
    pipeline = open_pipeline(str(model), transformer=str(alone))
    assert [pipeline.config[name] for name in ("num_frames", "height", "width")] == [17, 256, 256]
    config = pipeline.scheduler.config
    assert (config.target, config.alignment, config.alignment_edge) == ("v", "variance_preserving", "reference")
    assert (config.beta_min, config.beta_max) == (0.01, 50.0)


@pytest.mark.parametrize("folder", ["full", "full/model", "full/model/transformer"])
def test_a_transformer_of_a_run_brings_its_settings(sample, inputs, folder):
    result = sample("model", "--transformer", str(inputs / folder))
    (video,) = result.videos()
    assert video.shape == (9, SIZE, SIZE, 3)
    assert rate_of(result) == 12
    assert "bridge settings" not in result.said
    pipeline = open_pipeline(str(inputs / "model"), transformer=str(inputs / folder))
    assert pipeline.scheduler.config.beta_max == 40.0
    assert (pipeline.config.num_inference_steps, pipeline.config.guidance_scale) == (50, 6.0)


@pytest.mark.parametrize("model", ["full", "full/checkpoints/step_000002", "lora", "lora/lora"])
def test_python_opens_what_the_command_opens(inputs, model):
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(inputs / model, dtype=torch.bfloat16)
    assert pipeline.scheduler.config.beta_max == 40.0
    assert (pipeline.config.num_frames, pipeline.config.height, pipeline.config.width) == (9, SIZE, SIZE)
    assert pipeline.vae.dtype == torch.bfloat16
    assert bool(pipeline.get_active_adapters()) == ("lora" in model)


def test_python_widens_a_plain_model_and_says_whose_bridge_it_takes(inputs, capsys):
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(inputs / "model")
    assert "the model has no bridge settings: the reference's are used" in capsys.readouterr().err
    config = pipeline.scheduler.config
    assert (config.target, config.alignment_edge, config.beta_max) == ("v", "reference", 50.0)
    assert pipeline.transformer.config.in_channels == 8
    assert not pipeline.transformer.patch_embed.proj.weight[:, 4:].any()
    # The rest of the way by hand: a LoRA's layers and its scheduler.
    pipeline.load_lora_weights(inputs / "lora/lora")
    expected = FrameBridgeCogVideoXPipeline.from_pretrained(inputs / "lora").transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.transformer.state_dict().items())
    # What is given is taken, without a word.
    scheduler = FrameBridgeScheduler(target="data")
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(inputs / "model", scheduler=scheduler)
    assert pipeline.scheduler is scheduler
    assert "bridge settings" not in capsys.readouterr().err


def test_python_refuses_a_model_of_another_kind(tmp_path):
    latte = make_tiny_latte(tmp_path / "latte")
    with pytest.raises(FrameBridgeError, match="is for a FrameBridgeLatte, not for this pipeline"):
        FrameBridgeCogVideoXPipeline.from_pretrained(latte)


def test_a_diffusion_baseline_is_sampled_with_its_own_scheduler(sample):
    result = sample("baseline")
    assert len(result.videos()) == 1
    assert "a diffusion model: sampled with its CogVideoXDDIMScheduler" in result.said


def test_the_pipeline_has_the_precision_asked_for(inputs):
    for model in ("full", "lora"):
        for asked, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
            pipeline = open_pipeline(str(inputs / model), torch_dtype=asked)
            for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
                assert {p.dtype for p in part.parameters()} == {expected}, (model, type(part))


# Samplers


@pytest.fixture(scope="module")
def default_video(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("default") / "video.mp4"
    arguments = ["--model", str(inputs / "full"), "--image", str(inputs / "0.png"), "--prompt", "a red square"]
    assert main(["sample", *arguments, "--output", str(path), "--steps=3"]) == 0
    return read_video(path)


@pytest.mark.parametrize(
    "options",
    [
        ("--sampler=sde", "--grid=linspace"),
        ("--sampler=sde", "--start=clean_prior"),
        ("--sampler=dbim",),
        ("--sampler=dbim", "--order=2", "--grid=lambda"),
        ("--sampler=dbim", "--eta=1", "--start=clean_prior"),
        ("--sampler=dbim", "--eta=0.5", "--grid=trailing"),
        ("--guidance-scale=1",),
        ("--use-dynamic-cfg",),
    ],
)
def test_every_option_of_the_sampler_makes_a_difference(sample, default_video, options):
    (chosen,) = sample("full", "--steps=3", *options).videos()
    assert chosen.shape == default_video.shape
    assert not np.array_equal(chosen, default_video)


def test_dbim_with_all_noise_is_the_sde(sample, default_video):
    (dbim,) = sample("full", "--steps=3", "--sampler=dbim", "--eta=1").videos()
    assert np.abs(default_video.astype(int) - dbim).max() <= 2


def test_the_same_seed_gives_the_same_file(sample):
    first, again, other = sample("full"), sample("full"), sample("full", "--seed=43")
    files = [result.folder / "video.mp4" for result in (first, again, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()


# Several videos, other sizes


def test_several_images_prompts_and_videos(sample):
    options = ("--prompt", "a red square", "a blue square", "--num-videos=2", "--seed=5")
    result = sample("full", *options, "--batch-size=2", images=("0.png", "1.png"))
    assert sorted(path.name for path in result.folder.iterdir()) == [
        *(f"video-{number}.mp4" for number in range(4)),
        "video.png",
    ]
    videos = result.videos()
    assert not np.array_equal(videos[0], videos[1])
    # Video number i is the one that a single call with seed + i makes.
    (last,) = sample("full", "--prompt", "a blue square", "--seed=8", images=("1.png",)).videos()
    assert np.array_equal(videos[3], last)
    chosen = "4 videos at once, as fit into memory; the same bits again: --batch-size 8"
    for said, *more in ((chosen,), ("Videos 1 to 3 of 4", "--batch-size=6", "--device=cpu")):
        together = sample("full", *options, *more, images=("0.png", "1.png"))
        assert said in together.said
        for video, alone in zip(together.videos(), videos, strict=True):
            assert np.abs(video.astype(int) - alone).mean() < 0.1


def test_another_size_and_length(sample):
    (video,) = sample("full", "--height=48", "--width=64", "--num-frames=17").videos()
    assert video.shape == (17, 48, 64, 3)


def test_half_precision(sample):
    (video,), (exact,) = sample("full", "--dtype=bf16").videos(), sample("full").videos()
    assert 0 < np.abs(video.astype(int) - exact).mean() < 20


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-frames=12",), "num-frames: the VAE returns only 8 k + 1 frames, not 12; the nearest is 9"),
        (("--height=40",), "height: should be a multiple of 16"),
        (("--start=clean_prior", "--sampler=dbim"), "clean_prior"),
        (("--order=2",), "--order: "),
        (("--transformer", "nowhere"), "nowhere"),
        (("--device=cuda:99",), "--device cuda:99: there is none here; there are: cpu"),
        (("--device=cpu", "--offload=group"), "--offload group: is for a GPU"),
    ],
)
@pytest.mark.parametrize("model", ["full"])
def test_wrong_options_are_refused_in_one_line(sample, model, options, message):
    result = sample(model, *options)
    assert result.code == 2
    assert len(result.errors) == 1
    assert message in result.errors[0]
    assert not result.folder.exists()


def test_sizes_are_checked_against_a_lora_runs_base_model_too(sample):
    result = sample("lora", "--height=40")
    assert result.code != 0
    assert len(result.errors) == 1
    assert "height: should be a multiple of 16" in result.errors[0]


@pytest.mark.parametrize("model", ["model", "clips", "nowhere", "data.json"])
def test_what_is_no_bridge_model_is_refused_in_one_line(sample, model):
    result = sample(model)
    assert result.code != 0
    assert len(result.errors) == 1
    assert "Traceback" not in result.said
    if model == "model":
        assert "has 4 input channels, a bridge's has 8" in result.errors[0]


DAMAGED = [
    "model/transformer/diffusion_pytorch_model.safetensors",
    "model/vae/diffusion_pytorch_model.safetensors",
    "model/text_encoder/model.safetensors",
    "model/scheduler/scheduler_config.json",
    "model/model_index.json",
    "lora/pytorch_lora_weights.safetensors",
    "lora/framebridge.json",
    "lora/scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("how", ["truncated", "missing"])
@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_is_said_in_one_line(sample, inputs, tmp_path, file, how):
    run = tmp_path / "run"
    part = file.split("/")[0]
    copy_of(inputs / ("full" if part == "model" else "lora") / part, run / part)
    if how == "missing":
        (run / file).unlink()
    else:
        os.truncate(run / file, (run / file).stat().st_size // 2)
    result = sample(run)
    assert result.code in (1, 2)
    assert len(result.errors) == 1, result.said
    assert "Traceback" not in result.said
    assert "--debug shows the traceback" not in result.errors[0]  # an error that nobody foresaw


# The base model of a LoRA


def lora_on(inputs: Path, target: Path, **info: object) -> Path:
    """A copy of the LoRA run that says something else of its base model."""
    copy_of(inputs / "lora/lora", target / "lora")
    file = target / "lora/framebridge.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **info}))
    return target


def test_a_lora_that_does_not_know_its_base_model_says_so_once(sample, inputs, tmp_path):
    result = sample(lora_on(inputs, tmp_path / "run", fingerprint={}))
    assert result.code == 0
    assert result.said.count("does not say how to know the model that it was trained on") == 1


def test_a_base_model_that_was_moved_is_taken_from_where_it_is_now(sample, inputs, tmp_path):
    run = lora_on(inputs, tmp_path / "run", base_model=str(tmp_path / "gone"))
    result = sample(run)
    assert result.code == 2
    (error,) = result.errors
    assert str(tmp_path / "gone") in error
    assert "--base" in error
    with pytest.raises(FrameBridgeError, match="its base model: no such folder: .*gone; say where it is now"):
        FrameBridgeCogVideoXPipeline.from_pretrained(run)
    moved = copy_of(inputs / "model", tmp_path / "moved")
    assert len(sample(run, "--base", str(moved)).videos()) == 1
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(run, base_model=moved)
    assert pipeline.get_active_adapters()
    assert sample("full", "--base", str(moved)).errors == [
        f"error: --base: {inputs / 'full/model'} is a whole model, not a LoRA; leave it out"
    ]


def test_another_base_model_is_refused_unless_asked_for(sample, inputs, tmp_path):
    """It has the same configs and headers, as another fine-tune would."""
    other = make_tiny_cogvideox(tmp_path / "other", seed=5, sample_size=SIZE)
    in_place = lora_on(inputs, tmp_path / "run", base_model=str(other))
    for run, given in ((in_place, []), (inputs / "lora", ["--base", str(other)])):
        result = sample(run, *given)
        assert result.code == 2
        (error,) = result.errors
        assert f"{other} is not the model that the LoRA {run / 'lora'} was trained on" in error
        assert "transformer.diffusion_pytorch_model.safetensors is" in error
        assert "--allow-other-base" in error
        assert len(sample(run, *given, "--allow-other-base").videos()) == 1
    with pytest.raises(FrameBridgeError, match="is not the model that the LoRA"):
        FrameBridgeCogVideoXPipeline.from_pretrained(in_place)
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(inputs / "lora", base_model=other, allow_other_base=True)
    expected = load_file(other / "vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.vae.state_dict().items())


def test_a_base_model_on_the_hub_is_remembered_by_its_commit(inputs, sample, tmp_path, monkeypatch):
    """`main` moves on; the LoRA opens with what it was trained on, whichever cache that is in."""
    repository, cache = tmp_path / "hub/models--owner--tiny", str(tmp_path / "hub")
    commits = ["1" * 40, "2" * 40]
    copy_of(inputs / "model", repository / "snapshots" / commits[0])
    make_tiny_cogvideox(repository / "snapshots" / commits[1], seed=5, sample_size=SIZE)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commits[0])
    specification = make_specification("owner/tiny", cache_dir=cache)
    specification._lora_info.write(copy_of(inputs / "lora/lora", tmp_path / "lora"))
    told = (tmp_path / "lora/framebridge.json").read_text()
    assert (json.loads(told)["base_model"], json.loads(told)["revision"]) == ("owner/tiny", commits[0])
    assert str(tmp_path) not in told

    (repository / "refs/main").write_text(commits[1])
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(tmp_path / "lora", cache_dir=cache)
    expected = load_file(inputs / "model/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.vae.state_dict().items())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
    assert len(sample(tmp_path / "lora").videos()) == 1
    plain = FrameBridgeCogVideoXPipeline.from_pretrained("owner/tiny", cache_dir=cache, revision=commits[0])
    assert plain.transformer.config.in_channels == 8


def test_settings_of_the_sampler_do_not_come_from_the_model(sample, bridge_folder, plain_folder, tmp_path):
    """A folder saved with other sampler settings is still sampled with what the command line says."""
    folder = make_trained_folder(tmp_path / "model", plain_folder)
    scheduler = FrameBridgeScheduler.from_pretrained(folder / "scheduler")
    other = FrameBridgeScheduler.from_config(scheduler.config, sampler="dbim", order=2, grid="lambda")
    other.save_pretrained(folder / "scheduler")
    (default,), (changed,) = sample(bridge_folder).videos(), sample(folder).videos()
    assert np.array_equal(default, changed)
