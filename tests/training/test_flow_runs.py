"""Flow-matching backbones by recipe and under the stock trainer: LoRA, full fine-tune, baseline, store, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file

from framebridge_plugin import FrameBridgeLTXPipeline, FrameBridgeWanPipeline, register
from framebridge_plugin.cli import main
from framebridge_plugin.models.widening import widen_input_channels
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training import WanBridgeSpecification
from framebridge_plugin.training.objective import ObjectiveSettings
from framebridge_plugin.training.specifications import specification_of
from tests.tiny_ltx import make_tiny_ltx
from tests.tiny_models import LATENT_CHANNELS, make_clips
from tests.tiny_wan import make_tiny_wan
from tests.training.bridge_runs import run_trainer
from tests.training.conftest import LAUNCH_VARIABLES
from tests.training.run_results import heldout

register()

from finetrainers import SFTTrainer, utils  # noqa: E402

SIZE = 32
PRECISION = dict.fromkeys(("text_encoder_dtype", "transformer_dtype", "vae_dtype"), torch.float32)
BASELINE = ObjectiveSettings(objective="diffusion", image_noise=False, prior_noise=False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    make_tiny_wan(folder / "model")
    make_tiny_wan(folder / "unipc", unipc=True)
    make_tiny_ltx(folder / "ltx")
    clips = make_clips(folder / "clips", count=4, frames=9, size=SIZE)
    make_clips(folder / "heldout", count=1, frames=9, size=SIZE)
    dataset = {"data_root": str(clips), "dataset_type": "video", "video_resolution_buckets": [[5, SIZE, SIZE]]}
    (folder / "data.json").write_text(json.dumps({"datasets": [dataset]}))
    Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(folder / "red.png")
    columns = "caption,image_path,num_inference_steps,num_frames,height,width\n"
    (folder / "validation.csv").write_text(f"{columns}a red square,{folder / 'red.png'},1,5,{SIZE},{SIZE}\n")
    return folder


@pytest.fixture
def run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """Runs a subcommand with a recipe of two updates on a folder of the inputs; returns what it said."""
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run_command(*arguments: str, model: str = "unipc", training_type: str = "lora") -> str:
        name = "ltx_bridge" if model == "ltx" else "wan_bridge"
        recipe = {
            "model": {"model_name": name, "pretrained_model_name_or_path": str(inputs / model)},
            "framebridge": {
                "data": {"data_root": str(inputs / "clips"), "num_frames": 5, "height": SIZE, "width": SIZE}
            },
            "training": {"training_type": training_type, "batch_size": 2, "seed": 7},
            "optimization": {"train_steps": 2, "lr": 1e-2, "lr_scheduler": "constant", "lr_warmup_steps": 0},
            "precision": dict.fromkeys(PRECISION, "fp32"),
            "checkpoints": {"output_dir": str(tmp_path / "run"), "checkpointing_steps": 2},
            "validation": {
                "validation_dataset_file": str(inputs / "validation.csv"),
                "validation_steps": 1,
                "heldout": {"data_root": str(inputs / "heldout")},
            },
        }
        if training_type == "lora":
            recipe["lora"] = {"rank": 4, "lora_alpha": 8}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        capfd.readouterr()
        status, said = main(list(arguments)), capfd.readouterr()
        assert status == 0, said.err[-3000:]
        return said.err

    return run_command


def sample(run: Any, inputs: Path, model: Path, output: Path) -> None:
    settings = ("--steps=2", "--seed=1", "--prompt=a red square")
    run("sample", f"--model={model}", f"--image={inputs / 'red.png'}", *settings, f"--output={output}")
    assert output.stat().st_size > 0


def test_a_lora_by_recipe_on_a_store_with_validation_and_samples(run, inputs, tmp_path):
    recipe, folder = f"--recipe={tmp_path / 'recipe.yaml'}", tmp_path / "run"
    run("precompute", recipe, f"--output={tmp_path / 'store'}")
    run("train", recipe, f"framebridge.precomputed={tmp_path / 'store'}")
    assert len(list((folder / "validation").glob("*.mp4"))) == 2
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert resolved["framebridge"]["target"] == "flow"

    layers = load_file(folder / "lora/pytorch_lora_weights.safetensors")
    change = layers["transformer.patch_embedding.lora_B.weight"].flatten(1).unflatten(1, (2 * LATENT_CHANNELS, -1))
    assert change[:, :LATENT_CHANNELS].any()
    assert change[:, LATENT_CHANNELS:].any()
    ours = FrameBridgeWanPipeline.from_pretrained(folder)
    assert (ours.scheduler.config.target, ours.scheduler.config.alignment) == ("flow", "flow_matching")
    assert (ours.config.num_frames, ours.config.height, ours.config.width) == (5, SIZE, SIZE)

    # The same in diffusers' own pipeline, into the widened network.
    ours.fuse_lora(components=["transformer"])
    ours.unload_lora_weights()
    expected = ours.transformer.state_dict()
    projection = expected["patch_embedding.weight"][:, LATENT_CHANNELS:].flatten(1)
    torch.testing.assert_close(projection, change[:, LATENT_CHANNELS:].flatten(1), rtol=0, atol=1e-7)
    for source in (folder / "lora", folder / "lora/pytorch_lora_weights.safetensors"):
        theirs = WanPipeline.from_pretrained(inputs / "unipc")
        widen_input_channels(theirs.transformer, "patch_embedding")
        theirs.load_lora_weights(source)
        theirs.fuse_lora(components=["transformer"])
        theirs.unload_lora_weights()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.transformer.state_dict().items())
    sample(run, inputs, folder, tmp_path / "video.mp4")


def test_a_full_baseline_by_recipe_opens_and_samples(run, inputs, tmp_path):
    folder = tmp_path / "run"
    recipe = f"--recipe={tmp_path / 'recipe.yaml'}"
    run("train", recipe, "framebridge.objective=diffusion", model="unipc", training_type="full-finetune")
    pipeline = FrameBridgeWanPipeline.from_pretrained(folder)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.transformer.patch_embedding.weight[:, LATENT_CHANNELS:].any()
    assert [len(numbers) for numbers in heldout(folder).values()] == [23, 23, 23]
    sample(run, inputs, folder, tmp_path / "video.mp4")


def test_an_ltx_by_recipe_is_told_the_rate_of_its_clips(run, inputs, tmp_path):
    folder, shape = tmp_path / "run", ("framebridge.data.num_frames=9", "validation.validation_dataset_file=null")
    run("train", f"--recipe={tmp_path / 'recipe.yaml'}", *shape, model="ltx")
    assert [len(numbers) for numbers in heldout(folder).values()] == [23, 23, 23]
    assert FrameBridgeLTXPipeline.from_pretrained(folder).config.fps == 12  # the files'
    sample(run, inputs, folder, tmp_path / "video.mp4")

    specification = specification_of("ltx_bridge")(str(inputs / "ltx"), **PRECISION)
    models, scales = specification.load_diffusion_models(), []
    models["transformer"].register_forward_pre_hook(
        lambda module, args, given: scales.append(given["rope_interpolation_scale"]), with_kwargs=True
    )
    z_0 = torch.zeros(1, 2, LATENT_CHANNELS, 1, 1)
    conditions = {"encoder_hidden_states": torch.zeros(1, 8, 16), "encoder_attention_mask": torch.ones(1, 8)}
    for rate in (12.0, None):
        specification.clip_rate = rate
        batch = (conditions, {"latents": z_0, "image_latents": z_0})
        specification.loss_terms(models["transformer"], models["scheduler"], *batch, torch.tensor([500.0]))
    assert scales == [(8 / 12, 32, 32), (8 / 25, 32, 32)]


@pytest.mark.parametrize("model", ["model", "unipc"])
def test_the_baseline_is_the_backbones_flow_matching_on_the_widened_network(inputs, model):
    specification = WanBridgeSpecification(str(inputs / model), objective=BASELINE, **PRECISION)
    scheduler = specification.load_diffusion_models()["scheduler"]
    transformer = specification.load_diffusion_models()["transformer"].eval()
    torch.nn.init.normal_(transformer.patch_embedding.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    z_0, image_latents = torch.randn(2, 2, 2, LATENT_CHANNELS, 4, 4, generator=torch.Generator().manual_seed(2))
    text = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(3))
    times = torch.tensor([250, 900])  # of the scheduler's own table
    with torch.no_grad():
        prediction, target, sigmas = specification.forward(
            transformer=transformer,
            scheduler=scheduler,
            condition_model_conditions={"encoder_hidden_states": text},
            latent_model_conditions={"latents": z_0, "image_latents": image_latents},
            sigmas=utils.get_scheduler_sigmas(scheduler)[times].view(2, 1, 1, 1, 1),
            generator=torch.Generator().manual_seed(4),
        )
        eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(4))
        own = FlowMatchEulerDiscreteScheduler(shift=3.0)
        noisy = own.scale_noise(z_0, own.timesteps[times], eps)
        shown = torch.cat([noisy, image_latents], dim=2).transpose(1, 2)
        expected = transformer(shown, own.timesteps[times], text, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(target, eps - z_0)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(utils.prepare_loss_weights(scheduler, sigmas=sigmas), torch.ones(2))


class Recorded(WanBridgeSpecification):
    """The baseline, which also remembers what its objective returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, objective=BASELINE, **kwargs)
        self.losses: list[float] = []

    def forward(self, **kwargs: Any) -> Any:
        prediction, target, sigmas = super().forward(**kwargs)
        self.losses.append((prediction - target).square().mean().item())
        return prediction, target, sigmas


def test_the_stock_trainer_logs_the_unweighted_loss_of_the_baseline(inputs, tmp_path):
    options = ["--model_name=wan_bridge", f"--validation_dataset_file={inputs / 'validation.csv'}"]
    trainer = run_trainer(
        SFTTrainer, inputs, tmp_path / "run", "full", *options, "--validation_steps=1", specification_class=Recorded
    )
    losses = trainer.state.train_state.global_avg_losses
    assert len(losses) == 2
    assert losses == pytest.approx(trainer.model_specification.losses, rel=1e-5)
    saved = FrameBridgeWanPipeline.from_pretrained(tmp_path / "run/model_weights/000002")
    assert not isinstance(saved.scheduler, FrameBridgeScheduler)
