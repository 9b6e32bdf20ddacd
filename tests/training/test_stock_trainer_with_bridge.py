"""Our CogVideoX specification under finetrainers' own SFTTrainer, as anybody's finetrainers program would use it.

That all kinds of runs work and save what they have trained is the conformance suite's business (tests/testing).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from framebridge_plugin.backbones.cogvideox.pipeline import FrameBridgeCogVideoXPipeline
from framebridge_plugin.backbones.folders import LORA_FILE
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.errors import UsageError
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training import CogVideoXBridgeSpecification, FrameBridgeTrainer
from tests.tiny_models import LATENT_CHANNELS
from tests.training.bridge_runs import make_inputs, make_trainer, run_trainer

RUNS = LORA_RUN, FULL_RUN, BASELINE_RUN = ("lora-accelerate", "full-ptd-precomputed", "full-accelerate-diffusion")


class Recorded(CogVideoXBridgeSpecification):
    """The specification, which also remembers its losses and what the network was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.keys: set[str] = set()

    def loss_terms(self, transformer: Any, scheduler: Any, conditions: Any, latents: Any, *draws: Any) -> Any:
        self.keys |= set(latents)
        prediction, target = super().loss_terms(transformer, scheduler, conditions, latents, *draws)
        self.losses.append((prediction - target).square().mean().item())
        return prediction, target


def train(inputs: Path, name: str) -> Any:
    from finetrainers import SFTTrainer

    kind, backend, *features = name.split("-")
    options = [f"--parallel_backend={backend}"]
    if "precomputed" in features:
        options += ["--enable_precomputation", "--precomputation_items=4"]
    if "diffusion" in features:
        options += ["--objective=diffusion"]
    return run_trainer(SFTTrainer, inputs, inputs / name, kind, *options, specification_class=Recorded)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def trainers(inputs: Path) -> dict[str, Any]:
    return {name: train(inputs, name) for name in RUNS}


@pytest.fixture(scope="module")
def base_weights(inputs: Path) -> dict[str, torch.Tensor]:
    return load_file(inputs / "model/transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_the_logged_loss_is_the_mean_square_without_weights(trainers, name):
    specification = trainers[name].model_specification
    logged = trainers[name].state.train_state.global_avg_losses
    assert len(logged) == 2
    assert logged == pytest.approx(specification.losses, rel=1e-5)
    assert specification.keys == {"latents", "image_latents"} | ({"prior_latents"} if name != BASELINE_RUN else set())


def test_a_full_fine_tune_saves_a_folder_that_the_pipeline_opens(trainers, inputs, base_weights):
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(inputs / FULL_RUN / "model_weights/000002")
    assert isinstance(pipeline.scheduler, FrameBridgeScheduler)
    trained = pipeline.transformer.state_dict()
    queries = [key for key in base_weights if key.endswith("to_q.weight")]
    assert queries
    assert not any(torch.equal(trained[key], base_weights[key]) for key in queries)
    assert trained["patch_embed.proj.weight"][:, LATENT_CHANNELS:].abs().sum() > 0


def test_lora_trains_the_projection_as_one_of_its_layers(trainers, inputs, base_weights):
    folder = inputs / LORA_RUN / "lora_weights/000002"
    layers = load_file(folder / LORA_FILE)
    assert all("lora" in key for key in layers)
    assert all(tensor.abs().sum() > 0 for tensor in layers.values())
    change = layers["transformer.patch_embed.proj.lora_B.weight"].reshape(-1, 2 * LATENT_CHANNELS, 4)
    assert (change[:, :LATENT_CHANNELS].abs().sum(), change[:, LATENT_CHANNELS:].abs().sum()) > (0, 0)

    pipeline = open_pipeline(str(folder))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    projection = pipeline.transformer.patch_embed.proj
    expected = change.reshape(projection.weight.shape)
    expected[:, :LATENT_CHANNELS] += base_weights["patch_embed.proj.weight"]
    torch.testing.assert_close(projection.weight, expected, rtol=0, atol=1e-7)
    assert torch.equal(projection.bias, base_weights["patch_embed.proj.bias"])
    assert isinstance(pipeline.scheduler, FrameBridgeScheduler)


def test_our_trainer_refuses_specifications_of_finetrainers(inputs, tmp_path):
    from finetrainers.models.cogvideox import CogVideoXModelSpecification

    with pytest.raises(UsageError, match="CogVideoXModelSpecification"):
        make_trainer(FrameBridgeTrainer, inputs, tmp_path, "full", specification_class=CogVideoXModelSpecification)
