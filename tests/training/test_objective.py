"""The objective, and the proof that SNR alignment shows a pretrained network exactly what it was trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel, FlowMatchEulerDiscreteScheduler

from framebridge_plugin import register
from framebridge_plugin.bridge import NoAlignment, VariancePreservingAlignment
from framebridge_plugin.errors import UsageError
from framebridge_plugin.models.widening import widen_input_channels
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.schedulers.backbone import build_backbone
from framebridge_plugin.training.objective import (
    Network,
    ObjectiveSettings,
    bridge_prediction,
    build_scheduler,
    diffusion_prediction,
    draw_index,
    finetrainers_terms,
)
from tests.reference_vectors import predicted_z_0

# Within the ratios that the bridge reaches: index 0 has a higher one than step 0, index 999 that of step 965.7.
STEPS = (0, 1, 2, 3, 7, 20, 50, 100, 150, 200, 250, 300, 400, 500, 600, 650, 700, 750, 800, 850, 900, 940, 960, 965)


@dataclass(frozen=True)
class Case:
    """A pretrained network, the same one widened, and a batch of data."""

    plain: CogVideoXTransformer3DModel
    widened: CogVideoXTransformer3DModel
    backbone: CogVideoXDDIMScheduler
    z_0: torch.Tensor
    eps: torch.Tensor
    image_latents: torch.Tensor
    text: torch.Tensor

    def plain_network(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.plain(latents, self.text, time, return_dict=False)[0]

    def network(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.network_with_image(self.image_latents)(latents, time)

    def network_with_image(self, image_latents: torch.Tensor) -> Network:
        def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.widened(torch.cat([latents, image_latents], dim=2), self.text, time, return_dict=False)[0]

        return network

    def ratio(self, step: int) -> torch.Tensor:
        alphas_cumprod = self.backbone.alphas_cumprod[step].double()
        return torch.sqrt(alphas_cumprod / (1 - alphas_cumprod))

    def prior(self, scale: float) -> torch.Tensor:
        return scale * torch.randn(self.z_0.shape, generator=torch.Generator().manual_seed(9))


def make_backbone(**settings) -> CogVideoXDDIMScheduler:
    """The 2B model's scheduler."""
    return CogVideoXDDIMScheduler(
        **{
            "snr_shift_scale": 3.0,
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "timestep_spacing": "trailing",
            **settings,
        }
    )


@pytest.fixture(scope="module")
def case() -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=16,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=8,
        ).eval()
    plain.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    latents = (3, 3, 4, 8, 8)
    return Case(
        plain=plain,
        widened=widen_input_channels(copy.deepcopy(plain), "patch_embed.proj"),
        backbone=make_backbone(),
        z_0=torch.randn(latents, generator=generator),
        eps=torch.randn(latents, generator=generator),
        image_latents=torch.randn(latents, generator=generator),
        text=torch.randn(3, 8, 16, generator=generator),
    )


def diffusion_loss(case: Case, step: int) -> float:
    """The pretrained model's own loss, with nothing but diffusers."""
    steps = torch.full((len(case.z_0),), step)
    noisy = case.backbone.add_noise(case.z_0, case.eps, steps)
    velocity = case.backbone.get_velocity(case.z_0, case.eps, steps)
    return torch.nn.functional.mse_loss(case.plain_network(noisy, steps), velocity).item()


def bridge_loss(case: Case, scheduler: FrameBridgeScheduler, step: int, prior: torch.Tensor) -> float:
    """The bridge loss of the widened model at the real-valued index with the signal-to-noise ratio of `step`."""
    index = scheduler.schedule.index_of_ratio(case.ratio(step)).expand(len(case.z_0))
    prediction, target = bridge_prediction(case.network, scheduler, case.z_0, prior, case.eps, index)
    return torch.nn.functional.mse_loss(prediction, target).item()


@pytest.mark.parametrize("prior_scale", [0.01, 50.0], ids=["prior-near-zero", "prior-of-std-50"])
def test_the_bridge_loss_of_a_pretrained_model_is_its_own_diffusion_loss(case, prior_scale):
    scheduler = build_scheduler(case.backbone, ObjectiveSettings())
    prior = case.prior(prior_scale)
    expected = [diffusion_loss(case, step) for step in STEPS]
    assert len(STEPS) >= 20
    assert len({round(loss, 3) for loss in expected}) > 10  # the loss does depend on the step
    assert [bridge_loss(case, scheduler, step, prior) for step in STEPS] == pytest.approx(expected, rel=1e-6)


def test_the_network_is_told_the_time_of_the_same_ratio(case):
    scheduler = build_scheduler(case.backbone, ObjectiveSettings())
    index = scheduler.schedule.index_of_ratio(torch.stack([case.ratio(step) for step in STEPS]))
    assert scheduler.alignment.timestep(index).tolist() == pytest.approx(list(STEPS), abs=1e-4)


class WithoutThePrior(VariancePreservingAlignment):
    """The alignment with its -b z_T left out."""

    def latent(self, z_t, z_T, index):
        return super().latent(z_t, torch.zeros_like(z_T), index)


class OneStepLate(VariancePreservingAlignment):
    def timestep(self, index):
        return super().timestep(index) + 1


@pytest.mark.parametrize("broken", [WithoutThePrior, OneStepLate, NoAlignment])
def test_the_proof_fails_where_the_alignment_is_wrong(case, broken):
    scheduler = build_scheduler(case.backbone, ObjectiveSettings())
    right = scheduler.alignment
    if broken is NoAlignment:
        scheduler.alignment = NoAlignment()
    else:
        scheduler.alignment = broken(right.schedule, right.alphas_cumprod, right.edge)
    wrong = [
        step
        for step in STEPS[5:]
        if bridge_loss(case, scheduler, step, case.prior(1.0)) != pytest.approx(diffusion_loss(case, step), rel=1e-6)
    ]
    assert wrong == list(STEPS[5:])


def test_image_channels_start_without_influence_on_the_loss(case):
    scheduler = build_scheduler(case.backbone, ObjectiveSettings())
    index = torch.tensor([10.0, 500.0, 990.0])
    losses = []
    for image_latents in (case.image_latents, 7 * torch.ones_like(case.z_0)):
        network = case.network_with_image(image_latents)
        prediction, target = bridge_prediction(network, scheduler, case.z_0, case.prior(1.0), case.eps, index)
        losses.append((prediction - target).square().mean().item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("target", ["v", "eps_psi", "noise", "data"])
def test_a_perfect_network_has_no_loss_and_gives_the_data_back(case, target):
    scheduler = build_scheduler(case.backbone, ObjectiveSettings(target=target))
    index, prior = torch.tensor([10.0, 500.0, 900.0]), case.prior(1.0)
    z_t = scheduler.add_noise(case.z_0, prior, case.eps, index)
    _, wanted = bridge_prediction(case.network, scheduler, case.z_0, prior, case.eps, index)
    prediction, _ = bridge_prediction(lambda latents, time: wanted, scheduler, case.z_0, prior, case.eps, index)
    torch.testing.assert_close(predicted_z_0(scheduler, prediction, z_t, prior, index), case.z_0, rtol=1e-4, atol=1e-4)


def test_the_diffusion_loss_as_finetrainers_weighs_it_is_the_mean_square_of_v(case):
    steps = torch.tensor([3, 420, 999])
    loss = weighted_diffusion_loss(case.network, case.backbone, case, steps)
    velocity = case.backbone.get_velocity(case.z_0, case.eps, steps)
    noisy = torch.cat([case.backbone.add_noise(case.z_0, case.eps, steps), case.image_latents], dim=2)
    output = case.widened(noisy, case.text, steps, return_dict=False)[0]
    torch.testing.assert_close(loss, (output - velocity).square().flatten(1).mean(dim=1), rtol=2e-5, atol=0)


def test_a_backbone_that_predicts_noise_is_compared_with_the_noise(case):
    # Latte's: plain linear betas, no zero terminal ratio.
    backbone = make_backbone(
        prediction_type="epsilon",
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        snr_shift_scale=1.0,
        rescale_betas_zero_snr=False,
    )
    steps = torch.tensor([0, 420, 999])
    output = torch.randn(case.z_0.shape, generator=torch.Generator().manual_seed(2))
    loss = weighted_diffusion_loss(lambda latents, time: output, backbone, case, steps)
    torch.testing.assert_close(loss, (output - case.eps).square().flatten(1).mean(dim=1), rtol=2e-5, atol=0)


def weighted_diffusion_loss(
    network: Network, backbone: CogVideoXDDIMScheduler, case: Case, steps: torch.Tensor
) -> torch.Tensor:
    def terms(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return diffusion_prediction(network, backbone, case.z_0, case.eps, index)

    prediction, target, sigmas = finetrainers_terms(backbone, steps / 1000, terms)
    assert (sigmas * 1000).long().tolist() == steps.tolist()
    weights = 1 / (1 - backbone.alphas_cumprod[steps])  # finetrainers.utils.prepare_loss_weights
    return (weights * (prediction - target).square().flatten(1).mean(dim=1)).float()


@pytest.mark.parametrize("kind", ["bridge", "diffusion", "flow matching"])
def test_indices_are_drawn_as_finetrainers_draws_its_sigmas(kind):
    register()
    from finetrainers import utils

    backbone = make_backbone() if kind != "flow matching" else FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = "bridge" if kind == "bridge" else "diffusion"
    scheduler = build_scheduler(backbone, ObjectiveSettings(objective=objective))
    sigmas = utils.prepare_sigmas(
        scheduler, utils.get_scheduler_sigmas(scheduler), 500, 1000, generator=torch.Generator().manual_seed(4)
    )
    seen: list[torch.Tensor] = []

    def terms(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(index)
        return torch.zeros(500), torch.zeros(500)

    finetrainers_terms(scheduler, sigmas, terms)
    index = draw_index(scheduler, [torch.Generator().manual_seed(4)] * 500)
    assert index.dtype == torch.int64
    assert index.min() < 10
    assert index.max() > 990
    torch.testing.assert_close(index.double(), seen[0], rtol=0, atol=1e-2)


def test_the_scheduler_has_the_settings_of_the_objective():
    backbone = make_backbone()
    default = build_scheduler(backbone, ObjectiveSettings())
    assert isinstance(default, FrameBridgeScheduler)
    assert (default.config.target, default.config.alignment) == ("v", "variance_preserving")
    assert default.config.alignment_edge == "exact"
    assert (default.config.beta_min, default.config.beta_max) == (0.01, 50.0)
    assert torch.equal(build_backbone(default.config.backbone).alphas_cumprod, backbone.alphas_cumprod)

    settings = ObjectiveSettings(
        target="eps_psi", snr_aligned=False, alignment_edge="reference", beta_min=0.1, beta_max=20.0
    )
    config = build_scheduler(backbone, settings).config
    assert (config.target, config.alignment, config.alignment_edge) == ("eps_psi", "none", "reference")
    assert (config.beta_min, config.beta_max) == (0.1, 20.0)

    assert build_scheduler(backbone, ObjectiveSettings(objective="diffusion")) is backbone


def test_the_defaults_are_the_references():
    settings = ObjectiveSettings()
    assert (settings.objective, settings.target, settings.snr_aligned) == ("bridge", "v", True)
    assert (settings.image_noise, settings.prior_noise) == (True, True)
    assert (settings.noise_log_mean, settings.noise_log_std) == (-3.0, 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "flow"},
        {"target": "x0"},
        {"alignment_edge": "round"},
        {"noise_log_std": -0.5},
        {"caption_dropout": 1.0},
        {"caption_dropout": -0.1},
        {"noise_log_std": 50.0},
        {"beta_max": float("nan")},
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line(wrong):
    with pytest.raises(UsageError) as error:
        ObjectiveSettings(**wrong)
    ((name, value),) = wrong.items()
    assert str(error.value).startswith(f"{name} is {value!r}; it should be ")
    assert "\n" not in str(error.value)
