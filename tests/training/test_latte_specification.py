"""The Latte specifications on samples and batches: labels, latents, and the objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from framebridge_plugin.backbones.encoding import encode_frames
from framebridge_plugin.errors import UsageError
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.draws import drops_caption
from tests.tiny_models import CLASS_NAMES, LATTE_KINDS, make_tiny_latte
from tests.training.latte_runs import (
    CLIP_SHAPE,
    FRAMES,
    LATENT_SIZE,
    SIZE,
    finetrainers_loss,
    make_from_scratch,
    make_latte_batch,
    make_latte_specification,
)

KINDS = pytest.mark.parametrize("kind", LATTE_KINDS)
NULL_LABEL = len(CLASS_NAMES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latte")
    for kind in LATTE_KINDS:
        make_tiny_latte(folder / kind, kind)
    return folder


@pytest.fixture
def video() -> torch.Tensor:
    return torch.rand(FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(kind: str, models: Path, **objective: Any) -> tuple[Any, Any, Any]:
    specification = make_latte_specification(kind, models / kind, **objective)
    loaded = specification.load_diffusion_models()
    return specification, loaded["transformer"].requires_grad_(False), loaded["scheduler"]


def forward(kind: str, models: Path, indices: list[int], seed: int = 4, **objective: Any) -> Any:
    specification, transformer, scheduler = load(kind, models, **objective)
    conditions, latents = make_latte_batch()
    prediction, target, sigmas = specification.forward(
        transformer=transformer,
        scheduler=scheduler,
        condition_model_conditions=conditions,
        latent_model_conditions=latents,
        # As the stock loop shapes them.
        sigmas=(torch.tensor(indices) / 1000).reshape(-1, 1, 1, 1, 1),
        generator=torch.Generator().manual_seed(seed),
        compute_posterior=True,
    )
    return specification, transformer, scheduler, prediction, target, sigmas


def draw_noise(like: torch.Tensor, seed: int = 4) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


# Labels


@KINDS
def test_a_caption_is_the_name_of_its_class(models, kind):
    specification = make_latte_specification(kind, models / kind, caption_dropout=0.0)
    for label, name in enumerate(CLASS_NAMES):
        for caption in (name, [name], str(label)):
            conditions = specification.prepare_conditions(caption=caption, sample_seed=1)
            assert conditions["class_labels"].dtype == torch.int64
            assert conditions["class_labels"].tolist() == [label]
    assert specification.prepare_conditions(caption="", sample_seed=1)["class_labels"].tolist() == [NULL_LABEL]


def test_a_caption_that_is_no_class_has_no_label_and_is_warned_of_once(models, caplog):
    specification = make_latte_specification("bridge", models / "bridge", caption_dropout=0.0)
    for caption in ("a grey wall, number 0", "", "4") * 2:
        assert specification.prepare_conditions(caption=caption)["class_labels"].tolist() == [NULL_LABEL]
    assert [record.getMessage() for record in caplog.records] == [
        f"caption {caption!r} names no class of the model; the clip is trained on without a class"
        for caption in ("a grey wall, number 0", "4")
    ]


def test_classes_are_dropped_at_the_given_rate_by_sample(models):
    specification = make_latte_specification("bridge", models / "bridge", caption_dropout=0.3)

    def label(seed: int, **source: Any) -> int:
        return int(specification.prepare_conditions(caption="up", sample_seed=seed, **source)["class_labels"])

    labels = [label(seed) for seed in range(500)]
    assert set(labels) == {CLASS_NAMES.index("up"), NULL_LABEL}
    assert labels.count(NULL_LABEL) / 500 == pytest.approx(0.3, abs=0.06)
    assert [label(seed, generator=torch.Generator().manual_seed(1)) for seed in range(20)] == labels[:20]


def test_the_neural_prior_is_told_the_true_class_where_the_bridge_is_told_none(models):
    """Dropout is the bridge's alone: losses and gradients against the bare networks, each with its own labels."""
    specification, transformer, scheduler = load("bridge_neural_prior", models, caption_dropout=0.5)
    transformer.requires_grad_(True)
    seeds = [next(seed for seed in range(99) if drops_caption(0.5, seed) == dropped) for dropped in (True, False)]
    names = ("left", "up")
    items = [specification.prepare_conditions(caption=n, sample_seed=s) for n, s in zip(names, seeds, strict=True)]
    conditions = specification.collate_conditions(items)
    true_labels = torch.tensor([CLASS_NAMES.index(name) for name in names])
    told = torch.tensor([NULL_LABEL, true_labels[1]])
    assert conditions == {"class_labels": told.tolist(), "true_class_labels": true_labels.tolist()}
    # What a store of latents makes of the same drop.
    kept = make_latte_specification("bridge_neural_prior", models / "bridge_neural_prior", caption_dropout=0.0)
    stored = [kept.prepare_conditions(caption=caption, sample_seed=0) for caption in (*names, "")]
    dropped = kept.adapter.drop_caption(stored[0], stored[2])
    assert specification.collate_conditions([dropped, stored[1]]) == conditions

    _, latents = make_latte_batch()
    z_0, image, index = latents["latents"], latents["image_latents"], torch.tensor([3, 700])
    prediction, target, _ = specification.forward(transformer=transformer, scheduler=scheduler, sigmas=index / 1000,
                                                  condition_model_conditions=conditions,
                                                  latent_model_conditions=latents,
                                                  generator=torch.Generator().manual_seed(4))  # fmt: skip
    loss = (prediction - target).square().mean()
    gradient = torch.autograd.grad(loss, transformer.patch_embed.proj.weight)[0]

    prior = specification.adapter.prior_network(image.expand_as(z_0), None, true_labels).sample
    z_t = scheduler.add_noise(z_0, prior, draw_noise(z_0), index)
    inputs = torch.cat([torch.cat([image, z_t], dim=1), torch.cat([image, prior], dim=1)], dim=2)
    output = transformer(inputs, index.float(), told).sample[:, 1:]
    sigma = scheduler.schedule.coefficients(index).sigma.float().view(-1, 1, 1, 1, 1)
    expected = (output - (z_t - z_0) / sigma).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, transformer.patch_embed.proj.weight)[0])


def test_labels_survive_collation_and_the_precision_of_the_network(models):
    from finetrainers import utils

    specification = make_latte_specification("bridge", class_names=[f"class {number}" for number in range(400)],
                                             clip_shape=CLIP_SHAPE, vae_id=str(models / "bridge/vae"),
                                             caption_dropout=0.0)  # fmt: skip
    items = [specification.prepare_conditions(caption=f"class {number}") for number in (0, 257, 399)]
    collated = utils.make_contiguous(
        utils.align_device_and_dtype(
            specification.collate_conditions(items), torch.device("cpu"), torch.bfloat16
        )  # bfloat16 has no 257
    )
    for name in ("class_labels", "true_class_labels"):
        assert torch.as_tensor(collated[name]).tolist() == [0, 257, 399]


# Latents


@KINDS
def test_one_sample_of_the_first_frame_is_target_and_condition(models, video, kind):
    specification = make_latte_specification(kind, models / kind)
    vae = specification.load_latent_models()["vae"]
    result = specification.prepare_latents(vae=vae, video=video, sample_seed=5, compute_posterior=True)
    assert {name: list(tensor.shape) for name, tensor in result.items()} == {
        "latents": [1, FRAMES, 4, LATENT_SIZE, LATENT_SIZE],
        "image_latents": [1, 1, 4, LATENT_SIZE, LATENT_SIZE],
    }
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert torch.equal(result["latents"][:, :1], result["image_latents"])
    generator = torch.Generator().manual_seed(derive_seed(5, "posterior"))
    assert torch.equal(result["latents"], encode_frames(vae, video.unsqueeze(0), generator))


def test_the_sample_of_the_posterior_is_keyed_on_the_clip(models, video):
    specification = make_latte_specification("bridge", models / "bridge")
    vae = specification.load_latent_models()["vae"]

    def prepare(**source: Any) -> torch.Tensor:
        return specification.prepare_latents(vae=vae, video=video, **source)["latents"]

    assert torch.equal(prepare(sample_seed=5), prepare(sample_seed=5, generator=torch.Generator().manual_seed(9)))
    assert not torch.equal(prepare(sample_seed=5), prepare(sample_seed=6))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    results = [prepare(generator=generator) for generator in generators]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@KINDS
def test_preparing_and_training_leave_the_global_generator_alone(models, video, kind):
    specification = make_latte_specification(kind, models / kind)
    state = torch.get_rng_state()
    vae = specification.load_latent_models()["vae"]
    specification.prepare_latents(vae=vae, video=video, sample_seed=1)
    specification.prepare_conditions(caption="up", sample_seed=1)
    forward(kind, models, [3, 999])
    make_latte_specification(
        "bridge", clip_shape=CLIP_SHAPE, vae_id=str(models / kind / "vae")
    ).load_diffusion_models()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_clip_that_the_network_is_not_for_is_refused(models):
    specification = make_latte_specification("bridge", models / "bridge")
    vae = specification.load_latent_models()["vae"]
    with pytest.raises(UsageError, match="clips: num_frames: this model was trained on 4 and takes no other, not 3"):
        specification.prepare_latents(vae=vae, video=torch.zeros(3, 3, SIZE, SIZE), sample_seed=1)


# The objective on a batch


@pytest.mark.parametrize("kind", ["bridge", "bridge_neural_prior"])
@pytest.mark.parametrize(
    ("target", "snr_aligned"), [("eps_psi", False), ("v", True), ("noise", True), ("data", False)]
)
def test_forward_is_the_unweighted_bridge_loss(models, kind, target, snr_aligned):
    """Against the scheduler's own functions and the bare network."""
    indices = [0, 999]
    specification, transformer, scheduler, prediction, wanted, sigmas = forward(
        kind, models, indices, target=target, snr_aligned=snr_aligned
    )
    assert isinstance(scheduler, FrameBridgeScheduler)
    assert (sigmas * 1000).long().flatten().tolist() == indices
    conditions, latents = make_latte_batch()
    labels = torch.tensor(conditions["class_labels"])
    z_0, image = latents["latents"], latents["image_latents"]
    still, index, noise = image.expand_as(z_0), torch.tensor(indices), draw_noise(z_0)

    prior, channels = still, []
    if kind == "bridge_neural_prior":
        prior = specification.adapter.prior_network(still, None, labels).sample
        channels = [torch.cat([image, prior], dim=1)]
    z_t = scheduler.add_noise(z_0, prior, noise, index)
    shown, time = scheduler.align(z_t, prior, index)
    inputs = torch.cat([torch.cat([image, shown], dim=1), *channels], dim=2)
    expected = transformer(inputs, time, labels).sample[:, 1:]
    torch.testing.assert_close(prediction, expected)
    torch.testing.assert_close(wanted, scheduler.get_target(z_0, z_t, prior, noise, index))
    if target == "eps_psi":
        sigma = scheduler.schedule.coefficients(index).sigma.float().view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(wanted, (z_t - z_0) / sigma)
    per_sample = (prediction - wanted).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(finetrainers_loss(scheduler, prediction, wanted, sigmas), per_sample)


def test_forward_of_the_diffusion_baseline_is_the_mean_square_of_eps(models):
    steps = torch.tensor([253, 511])
    _, transformer, scheduler, prediction, target, sigmas = forward("diffusion", models, steps.tolist())
    assert type(scheduler) is CogVideoXDDIMScheduler
    conditions, latents = make_latte_batch()
    z_0, noise = latents["latents"], draw_noise(latents["latents"])
    # DDPM: linear betas from 1e-4 to .02.
    ratio = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[steps].view(-1, 1, 1, 1, 1)
    noisy = (ratio.sqrt() * z_0 + (1 - ratio).sqrt() * noise).float()
    inputs = torch.cat([latents["image_latents"], noisy], dim=1)
    output = transformer(inputs, steps, torch.tensor(conditions["class_labels"])).sample[:, 1:]
    expected = (output - noise).square().flatten(1).mean(dim=1)
    # finetrainers finds the weight by truncating sigma * 1000: 253 and 511 must not become 252 and 510.
    loss = finetrainers_loss(scheduler, prediction, target, sigmas)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_a_baseline_from_scratch_predicts_v_if_it_is_told_to(models):
    steps, (conditions, latents) = torch.tensor([0, 999]), make_latte_batch()
    specification = make_from_scratch("diffusion", models, latte_size="S/8", target="v")
    loaded = specification.load_diffusion_models()
    scheduler = loaded["scheduler"]
    generator = torch.Generator().manual_seed(4)
    _, v = specification.loss_terms(loaded["transformer"], scheduler, conditions, latents, steps, generator)
    z_0, noise = latents["latents"], draw_noise(latents["latents"])
    ratio = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[steps].view(-1, 1, 1, 1, 1)
    alpha, sigma = ratio.sqrt(), (1 - ratio).sqrt()
    torch.testing.assert_close(v, (alpha * noise - sigma * z_0).float())
    # diffusers' sampler finds the video by it.
    noisy = (alpha * z_0 + sigma * noise).float()
    scheduler.set_timesteps(1000)
    for row, step in enumerate(steps):
        found = scheduler.step(v[row], step, noisy[row]).pred_original_sample
        torch.testing.assert_close(found, z_0[row], rtol=1e-4, atol=1e-4)


def test_forward_of_the_neural_prior_is_the_mean_square_of_the_video(models):
    _, network, scheduler, prediction, target, sigmas = forward("neural_prior", models, [0, 999])
    conditions, latents = make_latte_batch()
    still = latents["image_latents"].expand_as(latents["latents"])
    assert torch.equal(target, latents["latents"])
    torch.testing.assert_close(prediction, network(still, None, torch.tensor(conditions["class_labels"])).sample)
    per_sample = (prediction - target).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(finetrainers_loss(scheduler, prediction, target, sigmas), per_sample)
    # No time and no noise: neither the drawn index nor the generator matters.
    assert torch.equal(forward("neural_prior", models, [500, 7], seed=8)[3], prediction)


def test_the_neural_prior_is_frozen_and_no_part_of_what_is_trained(models):
    specification = make_latte_specification("bridge_neural_prior", models / "bridge_neural_prior")
    loaded = specification.load_diffusion_models()
    prior, network = specification.adapter.prior_network, loaded["transformer"]
    assert set(loaded) == {"transformer", "scheduler"}
    assert not {id(p) for p in prior.parameters()} & {id(p) for p in network.parameters()}
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    conditions, latents = make_latte_batch()
    network.train()
    prediction, target, _ = specification.forward(
        network, loaded["scheduler"], conditions, latents, torch.tensor([0.3, 0.9]), torch.Generator().manual_seed(1)
    )
    (prediction - target).square().mean().backward()
    assert not prior.training
    assert not any(p.requires_grad or p.grad is not None for p in prior.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in prior.state_dict().items())


def test_the_neural_prior_has_its_own_precision(models):
    """It is the end point of the bridge, whatever the network computes in."""
    specification = make_latte_specification(
        "bridge_neural_prior", models / "bridge_neural_prior", transformer_dtype=torch.bfloat16
    )
    assert specification.load_diffusion_models()["transformer"].dtype == torch.bfloat16
    assert specification.adapter.prior_network.dtype == torch.float32


@pytest.mark.parametrize("kind", ["bridge", "bridge_neural_prior", "neural_prior"])
def test_every_tensor_follows_the_latents_to_their_device(models, kind):
    """Also the neural prior, which no trainer knows of and none moves."""
    specification = make_latte_specification(kind, models / kind)
    loaded = specification.load_diffusion_models()
    conditions, latents = make_latte_batch()
    prediction, target, _ = specification.forward(
        transformer=loaded["transformer"].to("meta"),
        scheduler=loaded["scheduler"],
        condition_model_conditions=conditions,
        latent_model_conditions={name: tensor.to("meta") for name, tensor in latents.items()},
        sigmas=torch.tensor([0.3, 0.9]),
    )
    assert prediction.device.type == target.device.type == "meta"
    if kind == "bridge_neural_prior":
        assert specification.adapter.prior_network.device.type == "meta"


@pytest.mark.parametrize("kind", ["bridge", "diffusion"])
def test_forward_draws_from_its_generator_alone(models, kind):
    first, again, other = (forward(kind, models, [300, 900], seed)[4] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_any_precision_gives_float32(models, kind, dtype):
    specification = make_latte_specification(kind, models / kind, transformer_dtype=dtype)
    loaded = specification.load_diffusion_models()
    conditions, latents = make_latte_batch()
    latents = {name: tensor.to(dtype) for name, tensor in latents.items()}  # as the stock trainer casts them
    prediction, target, _ = specification.forward(
        transformer=loaded["transformer"],
        scheduler=loaded["scheduler"],
        condition_model_conditions=conditions,
        latent_model_conditions=latents,
        sigmas=torch.tensor([0.3, 0.9]),
    )
    assert prediction.dtype == target.dtype == torch.float32
    assert prediction.shape == target.shape == latents["latents"].shape


# SNR alignment


STEPS = (0, 1, 2, 3, 7, 20, 50, 100, 150, 200, 250, 300, 400, 500, 600, 650, 700, 750, 800, 850, 900, 940, 960, 970)


@pytest.mark.parametrize("prior_scale", [0.01, 50.0], ids=["prior-near-zero", "prior-of-std-50"])
def test_the_bridge_loss_of_a_diffusion_model_is_its_own_diffusion_loss(models, prior_scale):
    """A Latte trained as a diffusion model predicts eps; an aligned bridge with that target shows it what it knows.

    Compared at the real-valued bridge indices whose signal-to-noise ratio is that of whole diffusion steps.
    """
    from framebridge_plugin.backbones.latte.networks import call_latte
    from framebridge_plugin.training.objective import bridge_prediction

    specification = make_latte_specification("bridge", models / "diffusion", target="noise", snr_aligned=True)
    loaded = specification.load_diffusion_models()
    network, scheduler = loaded["transformer"].requires_grad_(False), loaded["scheduler"]
    conditions, latents = make_latte_batch(3)
    labels, image = torch.tensor(conditions["class_labels"]), latents["image_latents"]
    z_0, noise = latents["latents"], draw_noise(latents["latents"])
    prior = prior_scale * draw_noise(z_0, seed=9)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def latte(shown: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return call_latte(network, shown, time, labels, image)

    def diffusion_loss(step: int) -> float:
        alpha, sigma = alphas_cumprod[step].sqrt().item(), (1 - alphas_cumprod[step]).sqrt().item()
        output = latte(alpha * z_0 + sigma * noise, torch.full((len(z_0),), step))
        return torch.nn.functional.mse_loss(output, noise).item()

    def bridge_loss(step: int) -> float:
        ratio = torch.sqrt(alphas_cumprod[step] / (1 - alphas_cumprod[step]))
        index = scheduler.schedule.index_of_ratio(ratio).expand(len(z_0))
        return torch.nn.functional.mse_loss(*bridge_prediction(latte, scheduler, z_0, prior, noise, index)).item()

    expected = [diffusion_loss(step) for step in STEPS]
    assert len({round(loss, 3) for loss in expected}) > 10  # the loss does depend on the step
    assert [bridge_loss(step) for step in STEPS] == pytest.approx(expected, rel=1e-4)


def test_the_network_is_not_aligned_by_default(models):
    *_, scheduler = load("bridge", models)
    assert (scheduler.config.target, scheduler.config.alignment) == ("eps_psi", "none")
    z_t, prior = torch.randn(2, 1, 4, 2, 2), torch.randn(2, 1, 4, 2, 2)
    shown, time = scheduler.align(z_t, prior, torch.tensor([3, 900]))
    assert torch.equal(shown, z_t)
    assert time.tolist() == [3.0, 900.0]
