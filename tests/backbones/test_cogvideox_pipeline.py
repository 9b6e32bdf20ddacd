"""The pipeline keeps diffusers' conventions, as a bridge and as the diffusion baseline."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel, DiffusionPipeline
from diffusers.pipelines.cogvideo.pipeline_cogvideox import retrieve_timesteps
from PIL import Image
from safetensors.torch import load_file, save_file

from framebridge_plugin import FrameBridgeCogVideoXPipeline
from framebridge_plugin.backbones.encoding import encode_video
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers import FrameBridgeScheduler

PROMPT = "a red square"


def open_folder(folder: Path, **kwargs: Any) -> FrameBridgeCogVideoXPipeline:
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(folder, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(bridge_folder: Path) -> FrameBridgeCogVideoXPipeline:
    return open_folder(bridge_folder)


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipeline: FrameBridgeCogVideoXPipeline, **kwargs: Any) -> torch.Tensor:
    """Latents of a short run; every argument can be replaced."""
    call = {"image": picture(), "prompt": PROMPT, "num_inference_steps": 2, "generator": generator()} | kwargs
    return pipeline(**call, output_type="latent").frames


# What goes in


def test_an_image_may_be_anything_that_diffusers_takes(pipeline, tmp_path):
    expected = latents_of(pipeline)
    assert expected.shape == (1, 3, 4, 8, 8)
    assert expected.dtype == torch.float32
    picture().save(tmp_path / "picture.png")
    pixels, array = pixels_of(picture()), np.asarray(picture())
    tensors = [[picture()], pixels, pixels.unsqueeze(0), [pixels], (pixels * 255).byte()]
    arrays = [array, array[None], [array], array / 255, array.astype(np.uint16) * 257]
    for image in (*tensors, *arrays, tmp_path / "picture.png", str(tmp_path / "picture.png")):
        assert torch.equal(latents_of(pipeline, image=image), expected)
    assert not torch.equal(latents_of(pipeline, image=picture(1)), expected)


def test_deep_and_transparent_pictures_reach_the_network_as_they_look(pipeline):
    grey = np.asarray(picture().convert("L"))
    expected = latents_of(pipeline, image=Image.fromarray(grey))
    deep = [Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey.astype(np.float32) / 255)]
    for image in (*deep, grey, grey[..., None]):
        torch.testing.assert_close(latents_of(pipeline, image=image), expected, rtol=1e-5, atol=1e-5)
    white = latents_of(pipeline, image=Image.new("RGB", (64, 64), "white"))
    hidden = picture().convert("RGBA")
    hidden.putalpha(0)
    for image in (hidden, np.asarray(hidden), torch.from_numpy(np.asarray(hidden).copy()).permute(2, 0, 1)):
        assert torch.equal(latents_of(pipeline, image=image), white)


def test_images_and_prompts_are_paired_or_shared(pipeline):
    """Videos of a batch are those of single calls: one generator each, nothing mixed."""
    images, prompts = [picture(0), picture(1)], ["a red square", "a blue square falls"]
    single = [
        latents_of(pipeline, image=image, prompt=prompt, generator=generator(seed))
        for seed, (image, prompt) in enumerate(zip(images, prompts, strict=True))
    ]
    generators = [generator(0), generator(1)]
    paired = latents_of(pipeline, image=images, prompt=prompts, generator=generators)
    torch.testing.assert_close(paired, torch.cat(single), rtol=1e-4, atol=1e-4)

    generators = [generator(0), generator(1)]
    shared_prompt = latents_of(pipeline, image=images, prompt=prompts[0], generator=generators)
    torch.testing.assert_close(shared_prompt[:1], single[0], rtol=1e-4, atol=1e-4)
    generators = [generator(0), generator(1)]
    shared_image = latents_of(pipeline, image=images[1], prompt=prompts, generator=generators)
    torch.testing.assert_close(shared_image[1:], single[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_several_videos_for_each_prompt(pipeline, guidance_scale):
    images, prompts = [picture(0), picture(1)], ["a red square", "a blue square falls"]
    seeds = [0, 1, 2, 3]
    videos = latents_of(
        pipeline,
        image=images,
        prompt=prompts,
        num_videos_per_prompt=2,
        guidance_scale=guidance_scale,
        generator=[generator(seed) for seed in seeds],
    )
    assert videos.shape[0] == 4
    for number, seed in enumerate(seeds):
        expected = latents_of(
            pipeline,
            image=images[number // 2],
            prompt=prompts[number // 2],
            guidance_scale=guidance_scale,
            generator=generator(seed),
        )
        torch.testing.assert_close(videos[number : number + 1], expected, rtol=1e-4, atol=1e-4)


def test_prompt_embeddings_take_the_place_of_the_prompt(pipeline):
    with torch.no_grad():
        prompt_embeds, negative_prompt_embeds = pipeline.encode_prompt([PROMPT], max_sequence_length=16)
    embedded = latents_of(
        pipeline, prompt=None, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds
    )
    assert torch.equal(embedded, latents_of(pipeline))


def test_given_embeddings_are_repeated_as_prompts_are(pipeline):
    prompts = ["a red square moves", "a blue square rests"]
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(prompts, ["a white square"] * 2, max_sequence_length=16)
    expected = latents_of(pipeline, prompt=prompts, negative_prompt="a white square", num_videos_per_prompt=2)
    actual = latents_of(
        pipeline, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, num_videos_per_prompt=2
    )
    assert expected.shape[0] == 4
    assert torch.equal(actual, expected)


def test_the_prompt_the_negative_prompt_and_the_guidance_matter(pipeline):
    results = [
        latents_of(pipeline),
        latents_of(pipeline, prompt="a blue square falls"),
        latents_of(pipeline, negative_prompt="a white square"),
        latents_of(pipeline, guidance_scale=1.0),
        latents_of(pipeline, guidance_scale=3.0),
    ]
    for number, first in enumerate(results):
        assert not any(torch.equal(first, second) for second in results[number + 1 :])


def test_without_guidance_the_network_is_called_once_a_step(pipeline):
    sizes = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    latents_of(pipeline, guidance_scale=1.0)
    latents_of(pipeline, guidance_scale=1.5)
    assert sizes == [1, 1, 2, 2]


@pytest.mark.parametrize("size", [(100, 80), (40, 90), (64, 200)])
def test_an_image_of_another_size_is_resized_and_cropped(pipeline, size):
    video = pipeline(picture(0, size), PROMPT, num_inference_steps=1, generator=generator(), output_type="pt").frames
    assert video.shape == (1, 9, 3, 64, 64)


def test_the_centre_of_the_image_is_what_counts(pipeline):
    wide = Image.new("RGB", (128, 64))
    wide.paste(picture(), (32, 0))
    assert torch.equal(latents_of(pipeline, image=wide), latents_of(pipeline))


def test_size_and_length_can_be_chosen(rotary_folder):
    pipeline = open_folder(rotary_folder)
    call = {"num_inference_steps": 1, "generator": generator(), "output_type": "np"}
    video = pipeline(picture(), PROMPT, height=32, width=48, num_frames=17, **call).frames
    assert video.shape == (1, 17, 32, 48, 3)


# What comes out


def test_output_types(pipeline):
    call = {"image": picture(), "prompt": PROMPT, "num_inference_steps": 1}

    def run(output_type: str, **kwargs: Any) -> Any:
        return pipeline(**call, generator=generator(), output_type=output_type, **kwargs)

    tensor = run("pt").frames
    assert tensor.shape == (1, 9, 3, 64, 64)
    assert 0 <= tensor.min() < tensor.max() <= 1
    array = run("np").frames
    assert isinstance(array, np.ndarray)
    np.testing.assert_allclose(array, tensor.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    frames = run("pil").frames
    assert (len(frames), len(frames[0]), frames[0][0].size) == (1, 9, (64, 64))
    np.testing.assert_allclose(np.asarray(frames[0][3]) / 255, array[0, 3], atol=1 / 255)
    plain = run("pt", return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], tensor)
    latents = run("latent").frames
    decoded = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), output_type="pt")
    torch.testing.assert_close(decoded, tensor)


@pytest.mark.parametrize("sampler", [{}, {"sampler": "dbim", "order": 2, "grid": "lambda"}])
def test_the_same_seed_gives_the_same_latents(pipeline, sampler):
    pipeline.scheduler = FrameBridgeScheduler.from_config(pipeline.scheduler.config, **sampler)
    state = torch.get_rng_state()
    first, again, other = (
        latents_of(pipeline, num_inference_steps=4, generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_every_call_differs(pipeline):
    assert not torch.equal(latents_of(pipeline, generator=None), latents_of(pipeline, generator=None))


def test_the_bridge_starts_at_the_image_and_the_start_can_be_given(pipeline):
    image_latents = encode_video(pipeline.vae, pixels_of(picture())[None, None] * 2 - 1)
    prior = image_latents.expand(-1, 3, -1, -1, -1)
    draws = generator()
    pipeline.scheduler.set_timesteps(2)
    start = pipeline.scheduler.initial_latent(prior, draws)
    assert (start - prior).std().item() == pytest.approx(pipeline.scheduler.schedule.c[-1].item(), rel=0.1)
    # `draws` goes on with the noise of the steps.
    assert torch.equal(latents_of(pipeline, latents=start, generator=draws), latents_of(pipeline))


def copied_loop(pipeline: Any, image: torch.Tensor, prompt: torch.Tensor, start: torch.Tensor, **call: Any) -> Any:
    """The loop of diffusers' CogVideoX pipelines, with the one change that the scheduler's docstring names."""
    scheduler, generator = pipeline.scheduler, call.pop("generator")
    timesteps, _ = retrieve_timesteps(scheduler, **call)
    latents = start
    extra_step_kwargs = pipeline.prepare_extra_step_kwargs(generator, 0.0)
    with torch.no_grad():
        for t in timesteps:
            latent_model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            latent_model_input = torch.cat([latent_model_input, torch.cat([image] * 2)], dim=2)
            timestep = scheduler.alignment.timestep(t).expand(latent_model_input.shape[0])
            noise_pred = pipeline.transformer(latent_model_input, prompt, timestep, return_dict=False)[0]
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + 6.0 * (noise_pred_text - noise_pred_uncond)
            latents = scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("call", [{"num_inference_steps": 3}, {"timesteps": [990.5, 600.0, 40.0]}])
def test_a_loop_copied_from_diffusers_gives_the_same_video(pipeline, call):
    with torch.no_grad():
        prompt, negative = pipeline.encode_prompt([PROMPT], max_sequence_length=16)
    image = encode_video(pipeline.vae, (pixels_of(picture()).unsqueeze(0) * 2 - 1).unsqueeze(1)).expand(
        -1, 3, -1, -1, -1
    )
    scheduler, draws = pipeline.scheduler, generator()
    scheduler.set_prior(image)
    scheduler.set_timesteps(**call)
    start = image + torch.randn(image.shape, generator=draws) * scheduler.init_noise_sigma
    copied = copied_loop(pipeline, image, torch.cat([negative, prompt]), start, generator=draws, **call)
    assert torch.equal(copied, latents_of(pipeline, **call | {"num_inference_steps": call.get("num_inference_steps")}))


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "CogVideoXDDIMScheduler"])
def test_a_scheduler_that_is_no_bridge_is_refused(pipeline, bridge_folder, name):
    other = getattr(diffusers, name)()
    if name != "CogVideoXDDIMScheduler":  # which a baseline has
        with pytest.raises(FrameBridgeError, match=f"a {name} is no bridge"):
            FrameBridgeCogVideoXPipeline(**{**pipeline.components, "scheduler": other})
    with pytest.raises(FrameBridgeError, match=f"a {name} is no bridge, which the model was built with"):
        FrameBridgeCogVideoXPipeline.from_pretrained(bridge_folder, scheduler=other)
    pipeline.scheduler = other
    with pytest.raises(FrameBridgeError, match=f"a {name} is no bridge, which the model was built with"):
        latents_of(pipeline)


def test_a_diffusion_baseline_takes_no_times_of_a_bridge(baseline_folder):
    with pytest.raises(FrameBridgeError, match="timesteps: a CogVideoXDDIMScheduler takes none"):
        latents_of(open_folder(baseline_folder), num_inference_steps=None, timesteps=[999.0])


def test_a_callback_sees_and_replaces_tensors(pipeline):
    seen = []

    def replace(pipe: Any, step: int, time: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((step, float(time), set(tensors), pipe.num_timesteps, pipe.guidance_scale))
        return {"latents": torch.full_like(tensors["latents"], 7.0)}

    latents = latents_of(
        pipeline,
        callback_on_step_end=replace,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"],
    )
    assert torch.equal(latents, torch.full_like(latents, 7.0))
    names = {"latents", "prompt_embeds", "negative_prompt_embeds"}
    assert seen == [(0, 999.0, names, 2, 6.0), (1, 499.0, names, 2, 6.0)]


def test_dynamic_guidance_is_diffusers_formula_of_the_time_that_the_network_is_told(pipeline):
    told, weights = [], []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(float(kwargs["timestep"][0])), with_kwargs=True
    )

    def note(pipe: Any, step: int, time: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights.append(pipe.guidance_scale)
        return {}

    call = {"num_inference_steps": 4, "guidance_scale": 5.0, "callback_on_step_end": note}
    dynamic = latents_of(pipeline, use_dynamic_cfg=True, **call)
    assert not told[0].is_integer()  # the aligned time of index 999
    assert weights == [1 + 2.5 * (1 - math.cos(math.pi * ((4 - time) / 4) ** 5)) for time in told]
    assert not torch.equal(dynamic, latents_of(pipeline, **call))
    assert weights[4:] == [5.0] * 4


def test_steps_and_guidance_come_from_the_model_where_it_has_them(bridge_folder, tmp_path):
    def calls(pipeline: Any, **given: Any) -> list[int]:
        sizes: list[int] = []
        hook = pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        pipeline(picture(), PROMPT, output_type="latent", generator=generator(), **given)
        hook.remove()
        return sizes

    open_folder(bridge_folder, num_inference_steps=3, guidance_scale=0.0).save_pretrained(tmp_path)
    saved = open_folder(tmp_path)
    assert calls(saved) == [1] * 3
    assert calls(saved, num_inference_steps=2, guidance_scale=2.0) == [2] * 2
    assert calls(open_folder(bridge_folder)) == [2] * 50


def test_a_callback_may_interrupt(pipeline):
    def interrupt(pipe: Any, step: int, time: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        pipe._interrupt = True
        calls.append(step)
        return tensors

    calls: list[int] = []
    latents_of(pipeline, num_inference_steps=4, callback_on_step_end=interrupt)
    assert calls == [0]


@pytest.mark.parametrize("memory_saving", ["slicing", "tiling"])
def test_memory_saving_gives_a_video(pipeline, memory_saving):
    call = {"image": [picture(0), picture(1)], "prompt": PROMPT, "num_inference_steps": 1, "output_type": "pt"}
    whole = pipeline(**call, generator=generator()).frames
    if memory_saving == "slicing":
        pipeline.vae.enable_slicing()
    else:
        pipeline.vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=40)
    saved = pipeline(**call, generator=generator()).frames
    assert saved.shape == whole.shape == (2, 9, 3, 64, 64)
    assert torch.isfinite(saved).all()
    if memory_saving == "slicing":
        torch.testing.assert_close(saved, whole, rtol=1e-3, atol=1e-3)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 13}, "num_frames: the VAE returns only 8 k \\+ 1 frames, not 13"),
        ({"height": 40}, "height: should be a multiple of 16"),
        ({"width": 72}, "width: should be a multiple of 16"),
        ({"image": [picture(), picture()], "prompt": ["a", "b", "c"]}, "2 images but 3 prompts"),
        ({"image": []}, "no image given"),
        ({"image": "picture.png"}, "picture.png: no such file"),
        ({"image": torch.zeros(64, 64)}, "image: should be .*, not a tensor of shape \\[64, 64\\]"),
        ({"image": np.zeros((3, 64, 64))}, "image: should be .*, not an array of shape \\[3, 64, 64\\]"),
        ({"image": np.zeros((64, 64, 3), np.int64)}, "image: values of type int64 have no known range"),
        ({"image": np.full((64, 64, 3), 255.0)}, "image: floats should be in \\[0, 1\\], these go from 255 to 255"),
        ({"image": torch.full((3, 64, 64), torch.nan)}, "image: holds values that are not finite"),
        ({"image": 3}, "image: should be .*, not int"),
        ({"generator": [generator(), generator()]}, "2 generators for 1 samples"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipeline, arguments, message):
    with pytest.raises(FrameBridgeError, match=message) as error:
        latents_of(pipeline, **arguments)
    assert "\n" not in str(error.value)


def test_arguments_of_the_wrong_type_or_range_are_refused_in_one_line(pipeline):
    count, start = "a whole number, at least 1", torch.zeros(1, 1, 4, 8, 8)
    calls: list[tuple[dict[str, Any], str]] = [
        *(({"num_frames": value}, f"num_frames is {value}; it should be {count}") for value in (0, 9.0)),
        *(({name: 0}, f"{name} is 0; it should be {count}") for name in ("height", "width", "num_inference_steps")),
        *(({"num_videos_per_prompt": value}, f"per_prompt is {value!r}; it should be {count}") for value in (0, "2")),
        *(({"guidance_scale": value}, "guidance_scale is .*; it should be a number") for value in (math.nan, "x")),
        ({"max_sequence_length": -1}, f"max_sequence_length is -1; it should be {count}"),
        ({"prompt": 3}, "prompt is 3; it should be a text or a list of texts"),
        ({"output_type": "gif"}, "output_type is 'gif'; it should be 'pil', 'np', 'pt' or 'latent'"),
        ({"generator": 3}, "generator is 3; it should be a torch"),
        ({"promt": "a"}, "unknown argument 'promt'; did you mean 'prompt'"),
        ({"num_frame": 9}, "unknown argument 'num_frame'; did you mean 'num_frames'"),
        ({"num_inference_steps": 2, "timesteps": [999.0]}, "give either num_inference_steps or timesteps"),
        ({"latents": start}, r"latents: have the shape \[1, 1, 4, 8, 8\]; they should have \[1, 3, 4, 8, 8\]"),
        ({"callback_on_step_end": lambda *step: {"latents": start}}, "latents: have the shape"),
    ]
    for wrong, message in calls:
        with pytest.raises(FrameBridgeError, match=message) as error:
            pipeline(**{"image": picture(), "prompt": PROMPT, **wrong})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [{"prompt": None}, {"prompt_embeds": torch.zeros(1, 16, 16)}])
def test_exactly_one_of_prompt_and_embeddings_is_wanted(pipeline, arguments):
    with pytest.raises(ValueError, match="prompt_embeds"):
        latents_of(pipeline, **arguments)


def test_a_network_that_was_not_widened_is_refused(pipeline, plain_folder):
    plain = CogVideoXTransformer3DModel.from_pretrained(plain_folder / "transformer")
    with pytest.raises(FrameBridgeError, match="has 4 input channels, a FrameBridge model has 8") as error:
        FrameBridgeCogVideoXPipeline(**{**pipeline.components, "transformer": plain})
    assert "\n" not in str(error.value)


# The diffusion baseline


@pytest.mark.parametrize("scheduler", ["DDIM", "DPM"])
def test_the_baseline_is_sampled_from_noise_with_cogvideox_schedulers(baseline_folder, scheduler):
    pipeline = open_folder(baseline_folder)
    assert type(pipeline.scheduler).__name__ == "CogVideoXDDIMScheduler"
    if scheduler == "DPM":
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    state = torch.get_rng_state()
    first, again, other = (
        latents_of(pipeline, num_inference_steps=4, generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    image = latents_of(pipeline, num_inference_steps=4, generator=generator(1), image=picture(5))
    assert not torch.equal(first, image)


def test_without_image_channels_the_baseline_is_diffusers_own_pipeline(plain_folder, baseline_folder):
    """The same plain network in diffusers' text-to-video pipeline and, widened with zeros, in ours."""
    plain = CogVideoXPipeline.from_pretrained(plain_folder)
    plain.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}
    expected = plain(**call, height=64, width=64, max_sequence_length=16, generator=generator(1)).frames
    pipeline = open_folder(baseline_folder)
    projection = pipeline.transformer.patch_embed.proj
    with torch.no_grad():
        projection.weight.zero_()
        projection.weight[:, :4] = plain.transformer.patch_embed.proj.weight
    torch.testing.assert_close(pipeline(picture(), **call, generator=generator(1)).frames, expected)
    call |= {"use_dynamic_cfg": True, "guidance_scale": 4.0}
    dynamic = plain(**call, height=64, width=64, max_sequence_length=16, generator=generator(1)).frames
    assert not torch.allclose(dynamic, expected, atol=1e-3)
    torch.testing.assert_close(pipeline(picture(), **call, generator=generator(1)).frames, dynamic)


# Saving and loading


def test_a_saved_pipeline_is_the_same_again(pipeline, tmp_path):
    expected = latents_of(pipeline)
    pipeline.scheduler = FrameBridgeScheduler.from_config(pipeline.scheduler.config, sampler="dbim", order=2)
    pipeline.save_pretrained(tmp_path / "copy")
    copy = open_folder(tmp_path / "copy")
    assert dict(copy.scheduler.config) == dict(pipeline.scheduler.config)
    assert (copy.config.num_frames, copy.config.height, copy.config.width) == (9, 64, 64)
    copy.scheduler = FrameBridgeScheduler.from_config(copy.scheduler.config, sampler="sde", order=1)
    assert torch.equal(latents_of(copy), expected)


def test_a_folder_of_a_run_opens_with_its_bridge_settings(bridge_folder, plain_folder):
    pipeline = open_folder(bridge_folder)
    assert isinstance(pipeline.scheduler, FrameBridgeScheduler)
    assert pipeline.scheduler.config.beta_max == 40.0
    assert pipeline.scheduler.config.alignment == "variance_preserving"
    assert pipeline.scheduler.config.backbone["_class_name"] == "CogVideoXDDIMScheduler"
    # What training does not change is there too, and no file of the base model.
    original, copy = (folder / "vae/diffusion_pytorch_model.safetensors" for folder in (plain_folder, bridge_folder))
    assert copy.read_bytes() == original.read_bytes()
    assert not copy.samefile(original)


def test_the_scheduler_is_found_by_the_module_that_the_index_names(bridge_folder):
    index = json.loads((bridge_folder / "model_index.json").read_text())
    assert index["scheduler"] == ["framebridge_plugin.schedulers.framebridge_scheduler", "FrameBridgeScheduler"]
    # diffusers looks the pipeline's own class up among its own; its loader takes ours by this argument.
    with pytest.raises(AttributeError, match="FrameBridgeCogVideoXPipeline"):
        DiffusionPipeline.from_pretrained(bridge_folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused(bridge_folder, tmp_path, part):
    copy = shutil.copytree(bridge_folder, tmp_path / "copy")
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    lacking = min(name for name in tensors if name.endswith("weight"))
    del tensors[lacking]
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    (copy / "manifest.json").unlink()  # it would say so before anything is loaded
    with pytest.raises(FrameBridgeError, match=f"lack 1 tensors of a .*, first {lacking}"):
        open_folder(copy)
    if part == "transformer":
        with pytest.raises(FrameBridgeError, match=f"lack 1 tensors of a .*, first {lacking}"):
            open_pipeline(str(bridge_folder), transformer=str(copy / part))


def test_a_component_that_is_given_is_not_looked_for(pipeline, bridge_folder, tmp_path):
    copy = shutil.copytree(bridge_folder, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    with pytest.raises(FrameBridgeError, match=f"no such folder: {copy / 'vae'}"):
        open_folder(copy)
    opened = FrameBridgeCogVideoXPipeline.from_pretrained(copy, vae=pipeline.vae)
    assert opened.vae is pipeline.vae


def test_a_folder_that_the_bridge_does_not_know_is_refused_from_its_configs(plain_folder, tmp_path):
    copy = shutil.copytree(plain_folder, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder")  # which a pipeline opens first
    diffusers.DDIMScheduler().save_pretrained(copy / "scheduler")
    with pytest.raises(FrameBridgeError, match=f"{copy / 'scheduler'} is for a DDIMScheduler"):
        open_folder(copy)
    shutil.copytree(plain_folder / "scheduler", copy / "scheduler", dirs_exist_ok=True)
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "patch_size_t": 2}))
    with pytest.raises(FrameBridgeError, match=f"{copy / 'transformer'} is a CogVideoX 1.5"):
        open_folder(copy)


def test_half_precision_keeps_latents_and_time_in_float32(pipeline):
    expected = latents_of(pipeline)
    pipeline.to(torch.bfloat16)
    times = []
    pipeline.transformer.time_proj.register_forward_pre_hook(lambda module, args: times.append(args[0]))
    latents = latents_of(pipeline)
    assert latents.dtype == torch.float32
    assert {time.dtype for time in times} == {torch.float32}
    assert times[0][0].item() == pipeline.scheduler.alignment.timestep(999).item()
    assert times[0][0].item() % 1 > 0.01  # a time that bfloat16 does not have
    assert (latents - expected).abs().max() < 0.2 * expected.abs().max()


def test_an_image_to_video_transformer_of_another_width_is_refused(pipeline):
    for change, message in (
        ({"in_channels": 12}, "has 12 input channels"),
        ({"patch_size_t": 1}, "is a CogVideoX 1.5"),
    ):
        transformer = CogVideoXTransformer3DModel.from_config({**pipeline.transformer.config, **change})
        with pytest.raises(FrameBridgeError, match=message):
            FrameBridgeCogVideoXPipeline(**{**pipeline.components, "transformer": transformer})
