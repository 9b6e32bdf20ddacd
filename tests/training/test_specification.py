"""The CogVideoX specification: latents, captions and the objective on a batch."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from framebridge_plugin.backbones.encoding import encode_video
from framebridge_plugin.backbones.fingerprint import first_difference
from framebridge_plugin.data import ClipSettings, ClipStream, index_dataset
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.training.draws import pixel_noise
from framebridge_plugin.training.objective import ObjectiveSettings, bridge_prediction
from framebridge_plugin.training.validation import read_validation_file
from tests.tiny_models import LATENT_CHANNELS, make_tiny_cogvideox
from tests.training.bridge_runs import make_specification

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def rotary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cogvideox(tmp_path_factory.mktemp("rotary") / "model", rotary=True)


@pytest.fixture(scope="module")
def vae(model_folder: Path) -> Any:
    return make_specification(model_folder).load_latent_models()["vae"]


@pytest.fixture
def video() -> torch.Tensor:
    return torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


# Latents


@pytest.mark.parametrize(("image_noise", "prior_noise"), itertools.product([False, True], repeat=2))
def test_which_latents_a_bridge_gets(model_folder, vae, video, image_noise, prior_noise):
    objective = ObjectiveSettings(image_noise=image_noise, prior_noise=prior_noise)
    result = make_specification(model_folder, objective).prepare_latents(vae=vae, video=video, sample_seed=5)
    clean = encode_video(vae, video[:1].unsqueeze(1))
    assert torch.equal(result["latents"], encode_video(vae, video.unsqueeze(0)))
    assert result["image_latents"].shape == (1, 1, LATENT_CHANNELS, 4, 4)
    assert torch.equal(result["image_latents"], clean) == (not image_noise)
    if not image_noise and not prior_noise:
        # The prior is the latent of the condition image, which forward() falls back to.
        assert set(result) == {"latents", "image_latents"}
        return
    assert set(result) == {"latents", "image_latents", "prior_latents"}
    if prior_noise:
        frames = result["prior_latents"]
        assert frames.shape == result["latents"].shape
        assert not torch.equal(frames[:, 1], frames[:, 2])  # every frame has noise of its own
        # Still the latent of the image, but for noise of about .05.
        assert (frames - clean).abs().max() < 0.5 * clean.abs().max()
    else:
        assert torch.equal(result["prior_latents"], clean)


@pytest.mark.parametrize("image_noise", [False, True])
def test_the_diffusion_baseline_has_no_prior_but_the_same_image(model_folder, vae, video, image_noise):
    bridge, diffusion = (
        make_specification(model_folder, ObjectiveSettings(objective=objective, image_noise=image_noise))
        for objective in ("bridge", "diffusion")
    )
    result = diffusion.prepare_latents(vae=vae, video=video, sample_seed=5)
    assert set(result) == {"latents", "image_latents"}
    expected = bridge.prepare_latents(vae=vae, video=video, sample_seed=5)
    assert torch.equal(result["image_latents"], expected["image_latents"])


def test_noise_is_keyed_on_the_sample(model_folder, vae, video):
    specification = make_specification(model_folder)

    def prepare(seed: int) -> dict[str, torch.Tensor]:
        return specification.prepare_latents(vae=vae, video=video, sample_seed=seed)

    first, again, other = prepare(5), prepare(5), prepare(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(first["latents"], other["latents"])
    assert not torch.equal(first["image_latents"], other["image_latents"])
    assert not torch.equal(first["prior_latents"], other["prior_latents"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_that_is_drawn_where_the_clip_is_read_has_the_same_bits(model_folder, clips_folder, dtype):
    specification = make_specification(model_folder, vae_dtype=dtype)
    vae = specification.load_latent_models()["vae"]
    data = [(index_dataset({"data_root": str(clips_folder)}), ClipSettings(9, 32, 32))]
    plain, drawing = (ClipStream(data, 3, draw=draw) for draw in (None, pixel_noise(specification)))
    (there,) = itertools.islice(torch.utils.data.DataLoader(drawing, batch_size=None, num_workers=1), 1)
    here = next(iter(plain))
    assert {name: tuple(pixels.shape) for name, pixels in there["drawn"].items()} == {
        "image": (1, 3, 32, 32),
        "prior": (1, 9, 3, 32, 32),
    }
    floats = here["video"].float() / 255 * 2 - 1
    latents = specification.prepare_latents(vae=vae, **there)
    expected = specification.prepare_latents(vae=vae, **{**here, "video": floats})
    assert latents.keys() == expected.keys() == {"latents", "image_latents", "prior_latents"}
    assert all(torch.equal(latents[name], expected[name]) for name in expected)


def test_image_and_prior_do_not_share_their_noise(model_folder, vae, video):
    """A one-frame clip has a prior of one frame, which could otherwise be the noisy condition image itself."""
    result = make_specification(model_folder).prepare_latents(vae=vae, video=video[:1], sample_seed=5)
    assert not torch.equal(result["image_latents"], result["prior_latents"])


def test_noise_of_the_given_strength_is_added(model_folder, vae, video):
    clean = encode_video(vae, video[:1].unsqueeze(1))

    def distance(log_mean: float) -> float:
        objective = ObjectiveSettings(noise_log_mean=log_mean, noise_log_std=0.0)
        result = make_specification(model_folder, objective).prepare_latents(vae=vae, video=video, sample_seed=5)
        return (result["image_latents"] - clean).abs().mean().item()

    # The same draw at twice the strength moves the latent about twice as far.
    assert distance(-5.0 + 0.6931) == pytest.approx(2 * distance(-5.0), rel=0.1)


def test_without_a_sample_seed_the_generator_is_used(model_folder, vae, video):
    specification = make_specification(model_folder)
    results = [
        specification.prepare_latents(vae=vae, video=video, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(results[0]["prior_latents"], results[1]["prior_latents"])
    assert not torch.equal(results[0]["prior_latents"], results[2]["prior_latents"])


def test_an_image_data_set_is_refused(model_folder, vae):
    with pytest.raises(FrameBridgeError, match="needs clips, not images"):
        make_specification(model_folder).prepare_latents(vae=vae, image=torch.zeros(1, 3, 32, 32))


# Captions


def test_captions_are_dropped_at_the_given_rate_by_sample(model_folder):
    specification = make_specification(model_folder, ObjectiveSettings(caption_dropout=0.3))
    specification.load_diffusion_models()
    models = specification.load_condition_models()

    def embed(caption: str | list[str], seed: int, settings: Any = specification) -> torch.Tensor:
        return settings.prepare_conditions(**models, caption=caption, sample_seed=seed)["encoder_hidden_states"]

    never = make_specification(model_folder, ObjectiveSettings(caption_dropout=0.0))
    never.load_diffusion_models()
    caption, empty = embed("a red square", 0, never), embed("", 0, never)
    assert caption.shape == (1, 16, 16)
    assert not torch.equal(caption, empty)
    # What finetrainers' loader of batches of one hands over.
    assert torch.equal(embed(["a red square"], 0, never), caption)

    results = [embed("a red square", seed) for seed in range(300)]
    dropped = [torch.equal(result, empty) for result in results]
    assert [torch.equal(result, caption) for result in results] == [not was for was in dropped]
    assert sum(dropped) / 300 == pytest.approx(0.3, abs=0.08)
    assert [torch.equal(embed("a red square", seed), empty) for seed in range(10)] == dropped[:10]


def test_a_long_caption_is_cut_without_a_line_for_each_sample(model_folder, caplog, monkeypatch):
    specification = make_specification(model_folder)
    specification.load_diffusion_models()
    models = specification.load_condition_models()
    for library in map(logging.getLogger, ("diffusers", "transformers")):
        monkeypatch.setattr(library, "handlers", [caplog.handler])
    embeds = specification.prepare_conditions(**models, caption="a red square " * 20)["encoder_hidden_states"]
    assert embeds.shape[1] == 16
    assert caplog.messages == []
    logging.getLogger("diffusers.pipelines.cogvideo.pipeline_cogvideox").warning("still heard")
    assert caplog.messages == ["still heard"]


def test_preparing_a_sample_leaves_the_global_generator_alone(model_folder, vae, video):
    specification = make_specification(model_folder)
    specification.load_diffusion_models()
    models = specification.load_condition_models()
    state = torch.get_rng_state()
    for source in ({"sample_seed": 1}, {"generator": torch.Generator().manual_seed(1)}):
        specification.prepare_latents(vae=vae, video=video, **source)
        specification.prepare_conditions(**models, caption="a red square", **source)
    assert torch.equal(torch.get_rng_state(), state)


# What is precomputed

FACTS = ("objective", "image_noise", "prior_noise", "noise_log_mean", "noise_log_std")


@pytest.mark.parametrize(
    "change",
    [
        *({"objective": "diffusion"}, {"image_noise": False}, {"prior_noise": False}),
        *({"noise_log_mean": -2.0}, {"noise_log_std": 0.25}),
        *({"vae_dtype": torch.bfloat16}, {"text_encoder_dtype": torch.bfloat16}),
        *({"file": "vae/diffusion_pytorch_model.safetensors"}, {"file": "text_encoder/model.safetensors"}),
        *({"file": "tokenizer/spiece.model"}, {"file": "transformer/config.json"}),
    ],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_every_fact_of_the_latents_is_told_when_it_alone_changes(model_folder, tmp_path, change):
    expected = make_specification(model_folder).precomputation_facts()
    ((name, value),) = change.items()
    if name == "file":
        changed = shutil.copytree(model_folder, tmp_path / "model") / value
        content = changed.read_bytes()
        changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        if value == "transformer/config.json":
            changed.write_bytes(content.replace(b'"max_text_seq_length": 16', b'"max_text_seq_length": 8'))
        specification, name = make_specification(tmp_path / "model"), value.replace("/", ".")
        if value == "transformer/config.json":
            name = "max_text_seq_length"
    elif name in FACTS:
        specification = make_specification(model_folder, ObjectiveSettings(**change))
    else:
        specification = make_specification(model_folder, **change)
    assert first_difference(expected, specification.precomputation_facts()).startswith(f"{name} is ")


def test_what_the_latents_do_not_depend_on_is_no_fact_of_theirs(model_folder):
    expected = make_specification(model_folder).precomputation_facts()
    objective = ObjectiveSettings(target="data", caption_dropout=0.5, beta_max=20.0, snr_aligned=False)
    specification = make_specification(model_folder, objective, transformer_dtype=torch.bfloat16)
    assert first_difference(expected, specification.precomputation_facts()) is None


# The objective on a batch


def make_batch(prior: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    latents = {
        "latents": torch.randn(2, 3, LATENT_CHANNELS, 8, 8, generator=generator),
        "image_latents": torch.randn(2, 1, LATENT_CHANNELS, 8, 8, generator=generator),
    }
    if prior:
        latents["prior_latents"] = torch.randn(2, 3, LATENT_CHANNELS, 8, 8, generator=generator)
    return {"encoder_hidden_states": torch.randn(2, 16, 16, generator=generator)}, latents


def load_trained(specification: Any) -> tuple[CogVideoXTransformer3DModel, Any]:
    """The models of a specification, with new input channels that are not zero any more."""
    models = specification.load_diffusion_models()
    generator = torch.Generator().manual_seed(8)
    torch.nn.init.normal_(models["transformer"].patch_embed.proj.weight, std=0.1, generator=generator)
    return models["transformer"].requires_grad_(False), models["scheduler"]


def finetrainers_loss(scheduler: Any, prediction: torch.Tensor, target: torch.Tensor, sigmas: torch.Tensor) -> Any:
    """The loss of finetrainers' training loop, one value for each sample."""
    from finetrainers import utils

    alphas = utils.get_scheduler_alphas(scheduler)
    timesteps = (sigmas * 1000.0).long()
    weights = utils.prepare_loss_weights(
        scheduler=scheduler, alphas=alphas[timesteps] if alphas is not None else None, sigmas=sigmas
    )
    return weights.float() * (prediction - target).square().flatten(1).mean(dim=1)


@pytest.mark.parametrize("indices", [[0, 999], [251, 506]])
def test_forward_is_the_unweighted_bridge_loss(model_folder, indices):
    specification = make_specification(model_folder)
    transformer, scheduler = load_trained(specification)
    conditions, latents = make_batch()
    # As the stock loop shapes them.
    sigmas = (torch.tensor(indices) / 1000).reshape(2, 1, 1, 1, 1)
    prediction, target, returned = specification.forward(
        transformer, scheduler, conditions, latents, sigmas, generator=torch.Generator().manual_seed(4)
    )
    assert (returned * 1000).long().flatten().tolist() == indices

    z_0 = latents["latents"]
    image = latents["image_latents"].expand_as(z_0)
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(4))

    def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden_states = torch.cat([latents, image], dim=2)
        return transformer(hidden_states, conditions["encoder_hidden_states"], time, return_dict=False)[0]

    expected = bridge_prediction(
        network, scheduler, z_0, latents["prior_latents"], noise, torch.tensor(indices, dtype=torch.float64)
    )
    torch.testing.assert_close((prediction, target), expected)
    per_sample = (expected[0] - expected[1]).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(finetrainers_loss(scheduler, prediction, target, returned), per_sample)


def test_forward_of_the_diffusion_baseline_is_the_mean_square_of_v(model_folder):
    specification = make_specification(model_folder, ObjectiveSettings(objective="diffusion"))
    transformer, scheduler = load_trained(specification)
    assert type(scheduler) is CogVideoXDDIMScheduler
    conditions, latents = make_batch(prior=False)
    steps = torch.tensor([253, 511])
    prediction, target, returned = specification.forward(
        transformer, scheduler, conditions, latents, steps / 1000, generator=torch.Generator().manual_seed(4)
    )
    z_0 = latents["latents"]
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(4))
    hidden_states = torch.cat([scheduler.add_noise(z_0, noise, steps), latents["image_latents"].expand_as(z_0)], dim=2)
    output = transformer(hidden_states, conditions["encoder_hidden_states"], steps, return_dict=False)[0]
    expected = (output - scheduler.get_velocity(z_0, noise, steps)).square().flatten(1).mean(dim=1)
    # finetrainers finds the weight by truncating sigma * 1000: 253 and 511 must not become 252 and 510.
    loss = finetrainers_loss(scheduler, prediction, target, returned)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_without_a_prior_of_its_own_the_image_is_the_prior(model_folder):
    specification = make_specification(model_folder)
    transformer, scheduler = load_trained(specification)
    conditions, latents = make_batch(prior=False)
    explicit = {**latents, "prior_latents": latents["image_latents"].expand_as(latents["latents"])}
    outputs = [
        specification.forward(
            transformer, scheduler, conditions, each, torch.tensor([0.3, 0.9]), torch.Generator().manual_seed(4)
        )
        for each in (latents, explicit)
    ]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_forward_draws_from_its_generator_alone(model_folder):
    specification = make_specification(model_folder)
    transformer, scheduler = load_trained(specification)
    conditions, latents = make_batch()
    state = torch.get_rng_state()
    first, again, other = (
        specification.forward(
            transformer, scheduler, conditions, latents, torch.tensor([0.3, 0.9]), torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(("height", "width", "frames"), [(8, 8, 3), (12, 16, 5)])
def test_training_and_sampling_use_the_same_rotary_embedding(rotary_folder, height, width, frames):
    specification = make_specification(rotary_folder)
    transformer, scheduler = load_trained(specification)
    pipeline = specification.load_pipeline(transformer=transformer, scheduler=scheduler)
    seen = []

    def record(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["image_rotary_emb"])

    hook = transformer.register_forward_pre_hook(record, with_kwargs=True)
    z_0 = torch.zeros(1, frames, LATENT_CHANNELS, height, width)
    specification.forward(
        transformer,
        scheduler,
        {"encoder_hidden_states": torch.zeros(1, 16, 16)},
        {"latents": z_0, "image_latents": z_0[:, :1]},
        torch.tensor([0.5]),
    )
    hook.remove()
    expected = pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, torch.device("cpu"))
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)


def test_validation_needs_an_image(model_folder):
    with pytest.raises(FrameBridgeError, match="'a cat' has no image; add an image_path"):
        make_specification(model_folder).validation(pipeline=None, prompt="a cat")


def test_a_validation_video_is_read_as_clips_are(tmp_path):
    table, broken = tmp_path / "validation.csv", tmp_path / "broken.mp4"
    table.write_text(f"caption,video_path\na disc,{DATA / 'sar_16_9.mp4'}\n")
    ((sample,)) = read_validation_file(table)
    assert sample["image"].size == (284, 120), "its pixels are not square"
    broken.write_bytes(b"no video")
    table.write_text(f"caption,video_path\na disc,{broken}\n")
    with pytest.raises(FrameBridgeError, match=r"broken\.mp4: not a video"):
        read_validation_file(table)
