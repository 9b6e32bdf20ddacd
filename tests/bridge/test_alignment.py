import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from framebridge_plugin.bridge import (
    BridgeSchedule,
    FlowMatchingAlignment,
    NoAlignment,
    VariancePreservingAlignment,
    sample_bridge,
)
from framebridge_plugin.errors import FrameBridgeError
from tests.reference_vectors import load_vectors, relative_error

SCHEDULE = BridgeSchedule()
VECTORS, DESCRIPTION = load_vectors("cogvideox_scheduler")
ALPHAS_CUMPROD = CogVideoXDDIMScheduler(**DESCRIPTION["scheduler_config"]).alphas_cumprod
EXACT = VariancePreservingAlignment(SCHEDULE, ALPHAS_CUMPROD)
REFERENCE = VariancePreservingAlignment(SCHEDULE, ALPHAS_CUMPROD, edge="reference")
ALL = [EXACT, REFERENCE, FlowMatchingAlignment(SCHEDULE, 1000), NoAlignment()]


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 2, 3, 4, 5, generator=generator, dtype=dtype) for _ in range(3)]


def test_the_backbone_is_the_one_of_the_vectors():
    assert relative_error(ALPHAS_CUMPROD, VECTORS["alphas_cumprod"]) < 1e-6
    assert float(EXACT.ratios[0]) == pytest.approx(19.79, abs=5e-3)


@pytest.mark.parametrize("name, betas", [("table", {}), ("table_b0.1_10", {"beta_min": 0.1, "beta_max": 10.0})])
def test_the_reference_times(name, betas):
    alignment = VariancePreservingAlignment(BridgeSchedule(**betas), ALPHAS_CUMPROD, edge="reference")
    times = alignment.timestep(torch.arange(1000))
    expected = VECTORS[f"{name}.aligned_t"]
    assert relative_error(times, expected) < 2e-5
    # Relative to 965 the first times would be free: hold them by themselves.
    assert relative_error(times[:30], expected[:30]) < 2e-5


@pytest.mark.parametrize("name", ["A", "B"])
def test_the_reference_latents(name):
    for t in [*VECTORS[f"{name}.timesteps"].tolist()]:
        z_t, prior = VECTORS[f"{name}.t{t}.x_t"], VECTORS[f"{name}.prior"]
        latent = REFERENCE.latent(z_t, prior, t)
        assert relative_error(latent, VECTORS[f"{name}.t{t}.aligned_x_t"]) < 2e-5
        assert relative_error(latent, VECTORS[f"{name}.t{t}.aligned_x_t_from_ori"]) < 2e-5
        time = REFERENCE.timestep(torch.full((len(z_t),), t))
        assert relative_error(time, VECTORS[f"{name}.t{t}.aligned_t"]) < 2e-5


def test_the_reference_with_one_time_per_sample():
    index = VECTORS["A.mixed.t"]
    latent = REFERENCE.latent(VECTORS["A.mixed.x_t"], VECTORS["A.prior"], index)
    assert relative_error(latent, VECTORS["A.mixed.aligned_x_t"]) < 2e-5
    assert relative_error(REFERENCE.timestep(index), VECTORS["A.mixed.aligned_t"]) < 2e-5


def test_exact_times():
    times = EXACT.timestep(torch.arange(1000))
    assert times[:9].tolist() == [0.0] * 9
    assert float(times[9]) == pytest.approx(0.027, abs=5e-4)
    assert float(times[999]) == pytest.approx(965.716, abs=5e-4)
    assert bool((times[9:].diff() > 0).all())


def test_the_edge_rules_differ_only_at_the_edge():
    exact, reference = (alignment.timestep(torch.arange(1000)) for alignment in (EXACT, REFERENCE))
    assert float(reference[0]) == pytest.approx(0.113, abs=5e-4)
    assert float(reference[13]) == pytest.approx(0.998, abs=6e-4)
    assert bool((exact[:14] != reference[:14]).all())
    assert torch.equal(exact[14:], reference[14:])


def test_the_exact_rule_finds_the_step_of_the_same_ratio():
    steps = torch.arange(0, 966, dtype=torch.float64)
    index = SCHEDULE.index_of_ratio(EXACT.ratios[:966])
    torch.testing.assert_close(EXACT.timestep(index).double(), steps, rtol=1e-7, atol=1e-6)
    # There a / n and c / n are the backbone's own alpha and sigma.
    k = SCHEDULE.coefficients(index)
    torch.testing.assert_close((k.a / k.norm) ** 2, ALPHAS_CUMPROD[:966], rtol=1e-12, atol=0)
    torch.testing.assert_close((k.c / k.norm) ** 2, 1 - ALPHAS_CUMPROD[:966], rtol=1e-10, atol=0)


def test_between_steps_the_time_is_linear_in_the_ratio():
    ratio = 0.75 * EXACT.ratios[400] + 0.25 * EXACT.ratios[401]
    assert float(EXACT.timestep(SCHEDULE.index_of_ratio(ratio))) == pytest.approx(400.25, abs=1e-4)


def test_below_the_lowest_ratio_of_the_backbone_the_last_step_is_held():
    plain = CogVideoXDDIMScheduler(**{**DESCRIPTION["scheduler_config"], "rescale_betas_zero_snr": False})
    alignment = VariancePreservingAlignment(SCHEDULE, plain.alphas_cumprod)
    assert float(alignment.ratios[-1]) > float(SCHEDULE.coefficients(999).ratio)
    assert float(alignment.timestep(999)) == 999.0


@pytest.mark.parametrize("index", [0, 8, 9.5, 500, 999, torch.tensor([0.0, 3.25, 640.0, 999.0])], ids=str)
def test_flow_matching_in_closed_form(index):
    alignment = FlowMatchingAlignment(SCHEDULE)
    z_0, z_T, eps = draw()
    k = SCHEDULE.coefficients(index)
    latent = alignment.latent(sample_bridge(z_0, z_T, eps, k), z_T, index)
    exact_tau = k.c / (k.a + k.c)
    assert torch.equal(alignment.timestep(index), exact_tau.float())
    scaled = FlowMatchingAlignment(SCHEDULE, time_scale=1000).timestep(index)
    assert torch.equal(scaled, (1000 * exact_tau).float())
    tau = exact_tau.reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(latent, (1 - tau) * z_0 + tau * eps)


@pytest.mark.parametrize("index", [0, 499.5, torch.tensor([2.0, 3.25, 640.0, 999.0])], ids=str)
def test_variance_preserving_latents_do_not_know_the_prior(index):
    z_0, z_T, eps = draw()
    k = SCHEDULE.coefficients(index)
    alpha, sigma = ((part / k.norm).reshape(-1, 1, 1, 1, 1) for part in (k.a, k.c))
    for prior in (z_T, 100 * z_T + 3):
        latent = EXACT.latent(sample_bridge(z_0, prior, eps, k), prior, index)
        torch.testing.assert_close(latent, alpha * z_0 + sigma * eps, rtol=1e-7, atol=1e-9)


def test_without_alignment_everything_stays():
    z_t, z_T, _ = draw()
    assert NoAlignment().latent(z_t, z_T, 3.5) is z_t
    assert NoAlignment().timestep(torch.tensor([3.5, 999.0])).tolist() == [3.5, 999.0]


@pytest.mark.parametrize("alignment", ALL, ids=["exact", "reference", "flow", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_time_is_float32_and_latents_keep_their_type(alignment, dtype):
    z_t, z_T, _ = draw(torch.float64)
    z_t, z_T = z_t.to(dtype), z_T.to(dtype)
    index = torch.tensor([0.0, 9.5, 640.0, 999.0], dtype=torch.float64)
    assert alignment.latent(z_t, z_T, index).dtype == dtype
    assert alignment.timestep(index).dtype == torch.float32
    assert alignment.timestep(index).shape == (4,)
    assert alignment.timestep(7).shape == ()
    if dtype.itemsize == 2:
        wide = alignment.latent(z_t.float(), z_T.float(), index)
        assert torch.equal(alignment.latent(z_t, z_T, index), wide.to(dtype))


def test_what_cannot_be_aligned_is_refused():
    with pytest.raises(FrameBridgeError, match="unknown alignment_edge 'clamp': choose one of exact, reference"):
        VariancePreservingAlignment(SCHEDULE, ALPHAS_CUMPROD, edge="clamp")
    for table in (ALPHAS_CUMPROD.flip(0), ALPHAS_CUMPROD - 0.5, ALPHAS_CUMPROD[:1], ALPHAS_CUMPROD + 0.01):
        with pytest.raises(FrameBridgeError, match="strictly decreasing table within"):
            VariancePreservingAlignment(SCHEDULE, table)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alignment", ALL, ids=["exact", "reference", "flow", "none"])
def test_alignment_follows_the_device(alignment):
    z_t, z_T, _ = (tensor.cuda() for tensor in draw())
    index = torch.tensor([0.0, 9.5, 640.0, 999.0], device="cuda")
    assert alignment.latent(z_t, z_T, index).is_cuda
    assert alignment.latent(z_t, z_T, 9.5).is_cuda
    assert alignment.timestep(index).is_cuda
    torch.testing.assert_close(alignment.timestep(index).cpu(), alignment.timestep(index.cpu()))
