"""Wan 2.1 under the stock trainer: its flow-matching baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from framebridge_plugin import FrameBridgeWanPipeline, register
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training import WanBridgeSpecification
from framebridge_plugin.training.objective import ObjectiveSettings
from tests.tiny_models import LATENT_CHANNELS, make_clips
from tests.tiny_wan import make_tiny_wan
from tests.training.bridge_runs import run_trainer

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
    clips = make_clips(folder / "clips", count=4, frames=5, size=SIZE)
    dataset = {"data_root": str(clips), "dataset_type": "video", "video_resolution_buckets": [[5, SIZE, SIZE]]}
    (folder / "data.json").write_text(json.dumps({"datasets": [dataset]}))
    Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(folder / "red.png")
    columns = "caption,image_path,num_inference_steps,num_frames,height,width\n"
    (folder / "validation.csv").write_text(f"{columns}a red square,{folder / 'red.png'},1,5,{SIZE},{SIZE}\n")
    return folder


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
