"""Losses, single SDE steps and whole SDE runs of the reference's Latte code, with its stand-in for the network.

The names of the groups: `align1` is SNR-aligned, `align0` is not; `None` has the still image as prior, `prior` a
coarse video, which the network is shown too; with `concat_only` it is shown the coarse video, but the still image
is the prior.
"""

from __future__ import annotations

import pytest
import torch

from framebridge_plugin.backbones.latte.networks import call_latte
from framebridge_plugin.backbones.latte.pipeline import FrameBridgeLattePipeline
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.objective import bridge_prediction
from tests.latte_stand_in import StandInLatte, make_scheduler
from tests.reference_vectors import load_vectors, relative_error
from tests.tiny_models import make_tiny_image_vae, make_tiny_latte_network

VECTORS, _ = load_vectors("latte_diffusion")
NO_CLASS = torch.zeros(2, dtype=torch.int64)
SDE_STEPS = [name.removesuffix(".sample") for name in VECTORS if name.startswith("sde1.") and name.endswith(".sample")]


@pytest.mark.parametrize("prior_kind", ["None", "prior", "concat_only"])
@pytest.mark.parametrize("is_aligned", [False, True])
def test_training_losses(is_aligned, prior_kind):
    z_0, noise, condition, coarse = (VECTORS[key] for key in ("x0", "noise", "condition_frame", "coarse_video"))
    shown = None if prior_kind == "None" else coarse
    prior = coarse if prior_kind == "prior" else condition.expand_as(z_0)
    network = StandInLatte(VECTORS, takes_neural_prior=shown is not None)
    for case in ("tmix", "t0", "t1", "t3", "t120", "t500", "t998", "t999"):
        group = f"loss.align{is_aligned:d}.{prior_kind}.{case}"
        prediction, target = bridge_prediction(
            lambda latents, time: call_latte(network, latents, time, NO_CLASS, condition, shown),
            make_scheduler(is_aligned),
            z_0,
            prior,
            noise,
            VECTORS[f"{group}.t"],
        )
        loss_B = (prediction - target).square().mean(dim=(1, 2, 3, 4))
        assert relative_error(loss_B, VECTORS[f"{group}.loss"]) < 2e-5
        if case == "tmix":
            assert relative_error(network.seen_inputs[-1], VECTORS[f"{group}.model_x"]) < 2e-5
            assert relative_error(network.seen_times[-1], VECTORS[f"{group}.model_t"]) < 2e-5


@pytest.mark.parametrize("group", SDE_STEPS)
def test_single_sde_steps(group):
    _, respacing, alignment, prior_kind, position = group.split(".")
    steps, position = int(respacing.removeprefix("resp")), int(position.removeprefix("i"))
    z, condition = VECTORS["s.x"], VECTORS["s.frame_cond1"]
    coarse = VECTORS["s.coarse_video"] if prior_kind == "prior" else None
    prior = condition.expand_as(z) if coarse is None else coarse
    scheduler = make_scheduler(alignment == "align1", [VECTORS["s.noise"]])
    scheduler.set_timesteps(steps)
    time = scheduler.timesteps[steps - 1 - position]
    network = StandInLatte(VECTORS, takes_neural_prior=coarse is not None)

    output = call_latte(network, *scheduler.align(z, prior, time), NO_CLASS, condition, coarse)
    step = scheduler.step(output, time, z, prior)

    # The stored state is no sample of the bridge: aligned at index 999 it is as large as 27, and the error of the
    # reference's c, which is 4e-5 there, grows with it.
    tolerance = 5e-5 if time == 999 and alignment == "align1" else 2e-5
    assert relative_error(step.prev_sample, VECTORS[f"{group}.sample"]) < tolerance
    if time == 0:
        assert torch.equal(step.prev_sample, step.pred_original_sample)
    if f"{group}.model_x" in VECTORS:
        assert relative_error(network.seen_inputs[0], VECTORS[f"{group}.model_x"]) < 2e-5
    # Relative to 1000, for the time at index 0 is 0.
    assert (network.seen_times[0] - VECTORS[f"{group}.model_t"]).abs().max() < 2e-5 * 1000


@pytest.mark.parametrize("prior_kind", ["None", "prior"])
@pytest.mark.parametrize("is_aligned", [False, True])
def test_sde_runs(is_aligned, prior_kind):
    group = f"sdeloop.resp10.align{is_aligned:d}.{prior_kind}"
    coarse = VECTORS["s.coarse_video"] if prior_kind == "prior" else None
    network = StandInLatte(VECTORS, takes_neural_prior=coarse is not None, frame_scale=0.3)
    scheduler = make_scheduler(is_aligned, VECTORS[f"{group}.noises"], start="clean_prior")
    pipeline = make_pipeline(network, scheduler)
    states = []

    def record(_pipeline, _step, _time, tensors):
        states.append(tensors["latents"])
        return {}

    final = pipeline.denoise(
        VECTORS["s.frame_cond1"],
        NO_CLASS,
        coarse,
        num_inference_steps=10,
        guidance_scale=1.0,
        callback_on_step_end=record,
    )
    # Ten units of float32's last place. In float64 the difference is hardly less, so that most is the reference's.
    assert relative_error(states[0], VECTORS[f"{group}.state1"]) < 1.2e-6
    assert relative_error(final, VECTORS[f"{group}.final"]) < 1.2e-6
    assert relative_error(torch.stack(network.seen_times), VECTORS[f"{group}.model_t"]) < 2e-5
    assert not scheduler.noises


def test_the_default_start_is_not_the_reference_one():
    """The reference starts from the noise-free prior but says index 999, where training had noise .2232."""
    group = "sdeloop.resp10.align0.None"
    network = StandInLatte(VECTORS, takes_neural_prior=False, frame_scale=0.3)
    booted = make_scheduler(False, [torch.ones(2, 4, 4, 4, 4), *VECTORS[f"{group}.noises"]])
    assert booted.config.start == "booted"
    pipeline = make_pipeline(network, booted)
    final = pipeline.denoise(VECTORS["s.frame_cond1"], NO_CLASS, num_inference_steps=10, guidance_scale=1.0)
    start = network.seen_inputs[0][:, 1:] - VECTORS["s.frame_cond1"]
    assert start.unique().tolist() == pytest.approx([0.2232] * len(start.unique()), abs=1e-4)
    assert relative_error(final, VECTORS[f"{group}.final"]) > 1e-3


def make_pipeline(network: StandInLatte, scheduler: FrameBridgeScheduler) -> FrameBridgeLattePipeline:
    shape = {"sample_height": 4, "sample_width": 4, "num_frames": 4, "num_classes": 1}
    neural_prior = make_tiny_latte_network(stage="neural_prior", **shape) if network.takes_neural_prior else None
    pipeline = FrameBridgeLattePipeline(make_tiny_image_vae(), network, scheduler, neural_prior)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
