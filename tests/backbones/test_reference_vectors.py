"""Losses, gradients and whole sampling runs of the reference implementation, from numbers stored in tests/data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from framebridge_plugin.backbones.cogvideox.pipeline import FrameBridgeCogVideoXPipeline
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.objective import bridge_prediction

DATA = Path(__file__).parents[1] / "data"
INFO = json.loads((DATA / "cogvideox.json").read_text())


class RecordedNoise(FrameBridgeScheduler):
    """A scheduler whose draws are the ones that the reference recorded."""

    noises: list[torch.Tensor]

    def _draw(self, like, generator):
        return self.noises.pop(0)


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(DATA / "cogvideox.safetensors")


def make_transformer(vectors: dict[str, torch.Tensor], rope: bool) -> CogVideoXTransformer3DModel:
    config = {**INFO["transformer_config"], "use_rotary_positional_embeddings": rope}
    transformer = CogVideoXTransformer3DModel(**config).eval()
    weights = {name.removeprefix("sd."): tensor for name, tensor in vectors.items() if name.startswith("sd.")}
    transformer.load_state_dict(weights, strict=True)
    return transformer


def make_scheduler(cls: type[FrameBridgeScheduler] = FrameBridgeScheduler) -> FrameBridgeScheduler:
    """The reference's bridge, its options chosen by name."""
    backbone = {"_class_name": "CogVideoXDDIMScheduler", **INFO["scheduler_config"]}
    return cls.from_backbone(
        backbone, target="v", alignment_edge="reference", sampler="sde", grid="trailing", start="clean_prior"
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest magnitude of the expected tensor."""
    scale = expected.abs().max().item() or 1.0
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("case", ["matched", "resized", "rope"])
def test_training_loss_and_gradients(vectors, case):
    v = {name.removeprefix(f"loss.{case}."): tensor for name, tensor in vectors.items() if f"loss.{case}." in name}
    transformer = make_transformer(vectors, rope=case == "rope")
    rotary = (v["rope_cos"], v["rope_sin"]) if case == "rope" else None
    seen = {}

    def network(latents, timestep):
        hidden_states = torch.cat([latents, v["X_cond"]], dim=2)
        seen.update(hidden_states=hidden_states, timestep=timestep)
        return transformer(
            hidden_states=hidden_states,
            encoder_hidden_states=v["text"],
            timestep=timestep,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]

    prediction, target = bridge_prediction(
        network, make_scheduler(), v["X0"], v["prior"], v["noise"], v["timesteps"].double()
    )
    loss = (prediction - target).square().mean()
    loss.backward()

    assert seen["timestep"].dtype == torch.float32
    assert_close(seen["hidden_states"], v["model_in"], 2e-5)
    assert_close(seen["timestep"], v["model_t"], 2e-5)
    assert_close(target, v["target"], 2e-5)
    assert_close(prediction, v["pred"], 1e-4)
    assert_close(loss, v["loss"], 1e-5)
    parameters = dict(transformer.named_parameters())
    norms = torch.stack([parameters[name].grad.norm() for name in INFO["grad_param_names"]])
    assert_close(norms, v["grad_norms"], 1e-4)


@pytest.mark.parametrize("case", INFO["pipe_cases"])
def test_sampling_run(vectors, case):
    settings = INFO["pipe_cases"][case]
    v = {name.removeprefix(f"pipe.{case}."): tensor for name, tensor in vectors.items() if f"pipe.{case}." in name}
    scheduler = make_scheduler(RecordedNoise)
    scheduler.noises = list(v["noises"])
    pipeline = FrameBridgeCogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=make_transformer(vectors, settings["rope"]),
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    if settings["rope"]:  # the reference's own positions
        rope = {"image_rotary_emb": (v["rope_cos"], v["rope_sin"])}
        pipeline.transformer.register_forward_pre_hook(
            lambda module, args, given: (args, given | rope), with_kwargs=True
        )
    # Up to three latent frames of the reference's start come from another draw of the autoencoder's posterior.
    start = torch.cat([v["image_latents"][:, :3], v["prior"][:, 3:]], dim=1)
    after = []

    def record(_pipeline, _step, _timestep, tensors):
        after.append(tensors["latents"])
        return {}

    final = pipeline.denoise(
        image_latents=v["image_latents"],
        prior=v["prior"],
        prompt_embeds=v["prompt_embeds"],
        negative_prompt_embeds=v["negative_prompt_embeds"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        latents=start,
        callback_on_step_end=record,
    )

    assert torch.equal(scheduler.timesteps, v["timesteps"].float())
    assert_close(torch.stack(after), v["latents_after"], 1e-5)
    assert_close(final, v["final"], 1e-5)
    assert not scheduler.noises


def test_default_start_is_not_the_reference_one(vectors):
    """The reference starts from the noise-free prior but says index 999, where training had noise .2232."""
    prior = vectors["pipe.a.prior"]
    scheduler = FrameBridgeScheduler.from_config(make_scheduler().config, start="booted")
    scheduler.set_timesteps(50)
    start = scheduler.initial_latent(prior, torch.Generator().manual_seed(0))
    assert (start - prior).std().item() == pytest.approx(0.2232, rel=0.05)
