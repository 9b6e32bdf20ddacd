"""The Latte pipeline on tiny models of every kind: what goes in, what is drawn, what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from framebridge_plugin import FrameBridgeLattePipeline
from framebridge_plugin.backbones.encoding import encode_frames
from framebridge_plugin.backbones.latte.networks import call_latte
from framebridge_plugin.schedulers import FrameBridgeScheduler
from tests.backbones.latte_calls import latents_of, open_folder, picture, seeded
from tests.tiny_models import LATTE_KINDS, make_latte_backbone, make_tiny_latte


@pytest.fixture
def pipeline(latte_folders) -> FrameBridgeLattePipeline:
    return open_folder(latte_folders["bridge"])


@pytest.fixture(params=LATTE_KINDS)
def any_pipeline(request, latte_folders) -> FrameBridgeLattePipeline:
    return open_folder(latte_folders[request.param])


# What goes in


def test_shapes_of_every_kind(any_pipeline):
    latents = latents_of(any_pipeline)
    assert latents.shape == (1, 4, 4, 16, 16)
    assert latents.dtype == torch.float32
    video = any_pipeline(picture(), "up", num_inference_steps=2, generator=seeded(), output_type="pt").frames
    assert video.shape == (1, 4, 3, 64, 64)
    assert 0 <= video.min() < video.max() <= 1


def test_an_autoencoder_that_compresses_eight_times(tmp_path):
    pipeline = open_folder(make_tiny_latte(tmp_path, num_frames=3, size=(32, 64), compression=8))
    video = pipeline(picture(), "up", num_inference_steps=2, generator=seeded(), output_type="np").frames
    assert video.shape == (1, 3, 32, 64, 3)


def test_a_class_is_a_name_or_a_label(any_pipeline):
    by_name = latents_of(any_pipeline, class_label="up")
    assert torch.equal(latents_of(any_pipeline, class_label=2), by_name)
    assert torch.equal(latents_of(any_pipeline, class_label="2"), by_name)
    assert not torch.equal(latents_of(any_pipeline, class_label="down"), by_name)


def test_a_label_is_a_label_even_if_a_class_has_a_number_for_its_name(tmp_path):
    pipeline = open_folder(make_tiny_latte(tmp_path, class_names=("3", "2", "1", "0")))
    by_label = latents_of(pipeline, class_label=0)
    assert torch.equal(latents_of(pipeline, class_label="3"), by_label)
    assert not torch.equal(latents_of(pipeline, class_label="0"), by_label)


def test_no_class_is_the_null_label(pipeline):
    unconditional = latents_of(pipeline, class_label="", guidance_scale=1.0)
    assert not torch.equal(unconditional, latents_of(pipeline, guidance_scale=1.0))
    # With the null label on both sides the guidance has nothing to weigh.
    torch.testing.assert_close(latents_of(pipeline, class_label=""), unconditional, rtol=1e-4, atol=1e-4)


def test_images_are_pictures_or_tensors(pipeline):
    expected = latents_of(pipeline, image=picture(3))
    pixels = torch.from_numpy(np.array(picture(3))).permute(2, 0, 1) / 255
    for image in (pixels, pixels.unsqueeze(0), [pixels]):
        assert torch.equal(latents_of(pipeline, image=image), expected)


def test_images_are_resized_and_cropped_to_the_size_of_training(pipeline):
    wide = Image.new("RGB", (128, 64))
    wide.paste(picture(), (32, 0))
    assert torch.equal(latents_of(pipeline, image=wide), latents_of(pipeline))


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_many_videos_each_with_its_own_generator(any_pipeline, guidance_scale):
    images, classes = [picture(0), picture(1)], ["left", 3]
    videos = latents_of(
        any_pipeline,
        image=images,
        class_label=classes,
        num_videos_per_image=2,
        guidance_scale=guidance_scale,
        generator=[seeded(seed) for seed in range(4)],
    )
    assert len(videos) == 4
    for number in range(4):
        alone = latents_of(
            any_pipeline,
            image=images[number // 2],
            class_label=classes[number // 2],
            guidance_scale=guidance_scale,
            generator=seeded(number),
        )
        # Untrained diffusion latents reach 700, so that rounding is measured by the largest of them.
        torch.testing.assert_close(videos[number : number + 1], alone, rtol=0, atol=1e-5 * alone.abs().max().item())


def test_one_image_serves_for_all_classes_and_one_class_for_all_images(pipeline):
    assert len(latents_of(pipeline, class_label=["left", "right", "up"])) == 3
    assert len(latents_of(pipeline, image=[picture(0), picture(1)], num_videos_per_image=2)) == 4


def test_one_generator_gives_every_video_its_own_noise(any_pipeline):
    first, second = latents_of(any_pipeline, num_videos_per_image=2)
    assert not torch.equal(first, second)


# What is drawn


def test_the_seed_decides(any_pipeline):
    state = torch.get_rng_state()
    first, again, other = (latents_of(any_pipeline, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_every_call_differs(any_pipeline):
    assert not torch.equal(latents_of(any_pipeline, generator=None), latents_of(any_pipeline, generator=None))


def record_calls(network: torch.nn.Module) -> list[torch.Tensor]:
    inputs: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    return inputs


def test_one_latent_of_the_image_is_condition_prior_and_input_of_the_neural_prior(latte_folders):
    pipeline = open_folder(latte_folders["bridge_neural_prior"])
    seen_by_prior, seen = record_calls(pipeline.neural_prior), record_calls(pipeline.transformer)
    latents_of(pipeline, guidance_scale=1.0)
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None, None] / 255 * 2 - 1
    image_latents = encode_frames(pipeline.vae, pixels, seeded())
    torch.testing.assert_close(seen_by_prior[0], image_latents.expand(-1, 4, -1, -1, -1))
    for inputs in seen:
        torch.testing.assert_close(inputs[:, 0], torch.cat([image_latents, image_latents], dim=2)[:, 0])
    video = call_latte(pipeline.neural_prior, seen_by_prior[0], None, torch.tensor([0]))
    torch.testing.assert_close(seen[0][:, 1:, 4:], video)


@pytest.mark.parametrize("kind", ["bridge", "bridge_neural_prior"])
def test_the_bridge_starts_at_its_prior(latte_folders, kind):
    pipeline = open_folder(latte_folders[kind])
    seen = record_calls(pipeline.transformer)
    latents_of(pipeline, guidance_scale=1.0)
    prior = seen[0][:, 1:, 4:] if kind == "bridge_neural_prior" else seen[0][:, :1]
    start = seen[0][:, 1:, :4] - prior
    assert start.std().item() == pytest.approx(pipeline.scheduler.schedule.c[-1].item(), rel=0.1)


def test_the_start_can_be_given(pipeline):
    first, second = (latents_of(pipeline, latents=torch.full((1, 4, 4, 16, 16), value)) for value in (0.0, 1.0))
    assert not torch.equal(first, second)


# Guidance


def test_guidance_is_on_the_networks_output_with_the_null_label(pipeline):
    """In one step the prediction is z_t - sigma (u + w (c - u)): linear in w, with u from the null label."""
    call = {"num_inference_steps": 1}
    unconditional = latents_of(pipeline, class_label="", guidance_scale=1.0, **call)
    conditional = latents_of(pipeline, guidance_scale=1.0, **call)
    guided = latents_of(pipeline, guidance_scale=7.0, **call)
    expected = unconditional + 7.0 * (conditional - unconditional)
    assert not torch.allclose(guided, conditional, atol=1e-2)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4 * guided.abs().max().item())


def test_the_neural_prior_is_called_once_and_without_guidance(latte_folders):
    pipeline = open_folder(latte_folders["bridge_neural_prior"])
    seen_by_prior, seen = record_calls(pipeline.neural_prior), record_calls(pipeline.transformer)
    latents_of(pipeline, guidance_scale=7.0)
    latents_of(pipeline, guidance_scale=1.0)
    assert [len(inputs) for inputs in seen_by_prior] == [1, 1]
    assert [len(inputs) for inputs in seen] == [2, 2, 1, 1]
    # Both branches of the guidance see the video of the true class.
    video = call_latte(pipeline.neural_prior, seen_by_prior[0], None, torch.tensor([0]))
    torch.testing.assert_close(seen[0][:, 1:, 4:], video.repeat(2, 1, 1, 1, 1))


def test_a_neural_prior_alone_gives_its_video_in_one_call(latte_folders):
    pipeline = open_folder(latte_folders["neural_prior"])
    assert pipeline.transformer is None
    assert pipeline.scheduler is None
    seen = record_calls(pipeline.neural_prior)
    video = latents_of(pipeline, class_label="right", num_inference_steps=1000)
    assert len(seen) == 1
    torch.testing.assert_close(video, call_latte(pipeline.neural_prior, seen[0], None, torch.tensor([1])))


# Samplers


@pytest.mark.parametrize("sampler", [{"grid": "linspace"}, {"sampler": "dbim", "order": 2, "grid": "lambda"}])
def test_the_bridge_takes_every_sampler(pipeline, sampler):
    default = latents_of(pipeline, num_inference_steps=4)
    pipeline.scheduler = FrameBridgeScheduler.from_config(pipeline.scheduler.config, **sampler)
    latents = latents_of(pipeline, num_inference_steps=4)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, default)


@pytest.mark.parametrize("scheduler", ["DDIM", "DPM"])
def test_the_diffusion_baseline_starts_from_noise(latte_folders, scheduler):
    pipeline = open_folder(latte_folders["diffusion"])
    assert type(pipeline.scheduler).__name__ == "CogVideoXDDIMScheduler"
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    if scheduler == "DPM":
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    seen = record_calls(pipeline.transformer)
    latents = latents_of(pipeline, num_inference_steps=4, guidance_scale=1.0)
    assert torch.isfinite(latents).all()
    noise = seen[0][:, 1:]
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05)
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)


def test_the_diffusion_baseline_takes_diffusers_own_samplers(latte_folders, capsys):
    pipeline = open_folder(latte_folders["diffusion"])
    config = pipeline.scheduler.config

    def run(scheduler: Any) -> torch.Tensor:
        pipeline.scheduler = scheduler
        return latents_of(pipeline, num_inference_steps=4, guidance_scale=1.0)

    default = run(pipeline.scheduler)
    for same in (
        DDIMScheduler.from_config(config),
        DPMSolverMultistepScheduler.from_config(config, solver_order=1),
    ):
        # At the first step an output is multiplied by 158.
        torch.testing.assert_close(run(same), default, rtol=1e-3, atol=1e-3 * default.abs().max().item())
    clamped = run(DDIMScheduler.from_config(config, clip_sample=True, clip_sample_range=3.0))
    assert clamped.abs().max() <= 3.0 < default.abs().max()
    assert not torch.allclose(run(DPMSolverMultistepScheduler.from_config(config)), default)

    said = []
    for name, steps in ((DPMSolverMultistepScheduler, 24), (DDIMScheduler, 25), (DDIMScheduler, 24)):
        pipeline.scheduler = name.from_config(config)
        latents_of(pipeline, num_inference_steps=steps, guidance_scale=1.0)
        said.append(capsys.readouterr().err.partition("warning: ")[2])
    assert said[:2] == ["", ""]
    assert said[2].startswith("24 steps do not divide 1000: diffusers' DDIMScheduler takes each 2% too short")


def test_a_callback_sees_and_replaces_tensors(latte_folders):
    pipeline = open_folder(latte_folders["bridge_neural_prior"])
    seen = []

    def replace(pipe: Any, step: int, time: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((step, float(time), set(tensors), pipe.num_timesteps, pipe.guidance_scale, pipe.current_timestep))
        return {"latents": torch.full_like(tensors["latents"], 7.0)}

    names = ["latents", "image_latents", "neural_prior"]
    latents = latents_of(
        pipeline, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=names, guidance_scale=3.0
    )
    assert torch.equal(latents, torch.full_like(latents, 7.0))
    assert seen == [(0, 999.0, set(names), 2, 3.0, 999.0), (1, 499.0, set(names), 2, 3.0, 499.0)]


def test_a_callback_may_interrupt(pipeline):
    def interrupt(pipe: Any, step: int, time: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        pipe._interrupt = True
        steps.append(step)
        return tensors

    steps: list[int] = []
    latents_of(pipeline, num_inference_steps=4, callback_on_step_end=interrupt)
    assert steps == [0]


# What comes out


def test_output_types(pipeline):
    def run(output_type: str, **arguments: Any) -> Any:
        return pipeline(
            picture(), "left", num_inference_steps=1, generator=seeded(), output_type=output_type, **arguments
        )

    tensor = run("pt").frames
    array = run("np").frames
    np.testing.assert_allclose(array, tensor.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    frames = run("pil").frames
    assert (len(frames), len(frames[0]), frames[0][0].size) == (1, 4, (64, 64))
    np.testing.assert_allclose(np.asarray(frames[0][3]) / 255, array[0, 3], atol=1 / 255)
    plain = run("pt", return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], tensor)


def test_half_precision_keeps_latents_and_time_in_float32(latte_folders):
    pipeline = open_folder(latte_folders["bridge"])
    pipeline.scheduler = FrameBridgeScheduler.from_backbone(make_latte_backbone(), target="eps_psi")
    expected = latents_of(pipeline)
    pipeline.to(torch.bfloat16)
    times = []
    pipeline.transformer.time_proj.register_forward_pre_hook(lambda module, args: times.append(args[0]))
    latents = latents_of(pipeline)
    assert latents.dtype == torch.float32
    assert {time.dtype for time in times} == {torch.float32}
    assert times[0][0].item() == pytest.approx(964.55, abs=0.01)
    assert (latents - expected).abs().max() < 0.2 * expected.abs().max()
