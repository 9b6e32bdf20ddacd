import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from framebridge_plugin.bridge import (
    GRIDS,
    BridgeSchedule,
    booted_start,
    dbim_step,
    extrapolate_z_0,
    predict_z_0,
    sample_bridge,
    sde_step,
    timestep_grid,
)
from framebridge_plugin.errors import FrameBridgeError
from tests.reference_vectors import load_vectors, relative_error

SCHEDULE = BridgeSchedule()
VECTORS, DESCRIPTION = load_vectors("cogvideox_scheduler")
STEPS = [(999.0, 998.5), (999, 799), (640.25, 7), (250, 249.75), (7, 0)]


def draw(shape=(3, 2, 3, 4, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("current, following", DESCRIPTION["step_cases"], ids=str)
def test_the_reference_steps(name, current, following):
    z_s, eps, output, prior = (VECTORS[f"{name}.{key}"] for key in ("step.x_t", "step.noise", "model_output", "prior"))
    s = SCHEDULE.coefficients(current)
    z_0 = predict_z_0("v", output, z_s, prior, s)
    result = z_0 if following is None else sde_step(z_s, z_0, eps, s, SCHEDULE.coefficients(following))
    assert relative_error(result, VECTORS[f"{name}.step.{current}_{following}"]) < 2e-5


def test_trailing_is_diffusers_grid():
    theirs = CogVideoXDDIMScheduler(**DESCRIPTION["scheduler_config"])
    assert timestep_grid("trailing", 50, SCHEDULE).tolist() == list(range(999, 0, -20))
    compared = 0
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        if len(theirs.timesteps) == steps:  # for some counts a rounding error gives them one time more, -1
            compared += 1
            assert timestep_grid("trailing", steps, SCHEDULE).tolist() == theirs.timesteps.tolist(), steps
    assert compared > 900


def test_linspace_runs_evenly_to_index_0():
    assert timestep_grid("linspace", 10, SCHEDULE).tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    fifty = timestep_grid("linspace", 50, SCHEDULE).tolist()
    assert fifty[:3] == [999, 979, 958]
    assert fifty[-5:] == [82, 61, 41, 20, 0]
    assert timestep_grid("linspace", 1000, SCHEDULE).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("schedule", [SCHEDULE, BridgeSchedule(0.1, 10.0, 400)], ids=str)
def test_lambda_is_uniform_in_the_log_ratio(schedule):
    grid = timestep_grid("lambda", 30, schedule)
    assert grid[0] == schedule.last_index
    assert grid[-1] == 0
    spacing = schedule.coefficients(grid).log_ratio.diff()
    torch.testing.assert_close(spacing, spacing.mean().expand(29), rtol=1e-9, atol=0)
    assert bool((grid[1:-1] != grid[1:-1].round()).all())


@pytest.mark.parametrize("name", GRIDS)
def test_grids_descend_strictly_with_the_asked_length(name):
    for steps in [*range(1, 60), 333, 667, 999, 1000]:
        grid = timestep_grid(name, steps, SCHEDULE)
        assert grid.shape == (steps,)
        assert grid.dtype == torch.float64
        assert grid[0] == 999
        assert grid[-1] >= 0
        assert bool((grid.float().diff() < 0).all())


def test_impossible_grids_are_refused():
    with pytest.raises(FrameBridgeError, match="name is 'leading'; it should be 'trailing', 'linspace' or 'lambda'"):
        timestep_grid("leading", 10, SCHEDULE)
    for name in GRIDS:
        for steps in (0, 2.5, True):
            with pytest.raises(FrameBridgeError, match=f"steps is {steps}; it should be a whole number, at least 1"):
                timestep_grid(name, steps, SCHEDULE)
    for name in ("trailing", "linspace"):
        with pytest.raises(FrameBridgeError, match=f"steps is 1001: the {name} grid has at most 1000"):
            timestep_grid(name, 1001, SCHEDULE)
    assert len(timestep_grid("lambda", 1001, SCHEDULE)) == 1001


def test_the_booted_start_is_the_bridge_with_the_prior_as_its_video():
    z_T, eps, *_ = draw()
    first = SCHEDULE.coefficients(999)
    torch.testing.assert_close(booted_start(z_T, eps, first), sample_bridge(z_T, z_T, eps, first))


@pytest.mark.parametrize("index_s, index_t", STEPS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_dbim_with_eta_1_is_the_sde(index_s, index_t, per_sample):
    z_s, z_0, z_T, eps = draw()
    if per_sample:
        index_s, index_t = torch.tensor([index_s, 500.0, 999.0]), torch.tensor([index_t, 499.5, 0.0])
    s, t = SCHEDULE.coefficients(index_s), SCHEDULE.coefficients(index_t)
    same = dbim_step(z_s, z_0, z_T, s, t, eta=1.0, eps=eps)
    torch.testing.assert_close(same, sde_step(z_s, z_0, eps, s, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("index_s, index_t", STEPS)
def test_dbim_is_the_formula_of_its_paper(eta, index_s, index_t):
    z_s, z_0, z_T, eps = draw()
    s, t = SCHEDULE.coefficients(index_s), SCHEDULE.coefficients(index_t)
    rho = eta * t.sigma * torch.sqrt(1 - t.sigma**2 / s.sigma**2)
    eps_hat = (z_s - s.a * z_0 - s.b * z_T) / s.c
    expected = t.a * z_0 + t.b * z_T + torch.sqrt(t.c**2 - rho**2) * eps_hat + rho * eps
    torch.testing.assert_close(dbim_step(z_s, z_0, z_T, s, t, eta, eps), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("index_s, index_t", STEPS)
def test_a_step_with_the_true_z_0_keeps_the_marginals(eta, index_s, index_t):
    _, z_0, z_T, _ = draw()
    s, t = SCHEDULE.coefficients(index_s), SCHEDULE.coefficients(index_t)
    mean, none, unit = s.a * z_0 + s.b * z_T, torch.zeros_like(z_0), torch.ones_like(z_0)
    next_mean = dbim_step(mean, z_0, z_T, s, t, eta, none)
    torch.testing.assert_close(next_mean, t.a * z_0 + t.b * z_T, rtol=1e-10, atol=1e-10)
    # The step is affine: its answers to one standard deviation of either noise are the parts of the deviation.
    from_before = dbim_step(mean + s.c * unit, z_0, z_T, s, t, eta, none) - next_mean
    from_fresh = dbim_step(mean, z_0, z_T, s, t, eta, unit) - next_mean
    torch.testing.assert_close(from_before**2 + from_fresh**2, t.c**2 * unit, rtol=1e-9, atol=1e-12)


def test_extrapolation_is_exact_for_a_prediction_linear_in_the_log_ratio():
    value, slope, *_ = draw()
    before, s, t = (SCHEDULE.coefficients(index) for index in (900.0, 700.5, 650.0))
    at = [value + slope * time for time in (before.log_ratio, s.log_ratio, (s.log_ratio + t.log_ratio) / 2)]
    torch.testing.assert_close(extrapolate_z_0(at[1], at[0], before, s, t), at[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_the_storage(dtype):
    z_s, z_0, z_T, eps = (tensor.to(dtype) for tensor in draw())
    wide = [tensor.float() for tensor in (z_s, z_0, z_T, eps)]
    before, s, t = (SCHEDULE.coefficients(index) for index in (999, 998, 997))
    pairs = [
        (sde_step(z_s, z_0, eps, s, t), sde_step(wide[0], wide[1], wide[3], s, t)),
        (dbim_step(z_s, z_0, z_T, s, t), dbim_step(*wide[:3], s, t)),
        (booted_start(z_T, eps, s), booted_start(wide[2], wide[3], s)),
        (extrapolate_z_0(z_0, z_s, before, s, t), extrapolate_z_0(wide[1], wide[0], before, s, t)),
    ]
    for half, full in pairs:
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))


def test_a_dbim_step_that_draws_needs_noise():
    z_s, z_0, z_T, _ = draw()
    s, t = SCHEDULE.coefficients(500), SCHEDULE.coefficients(400)
    with pytest.raises(FrameBridgeError, match="eta=0.5 draws noise"):
        dbim_step(z_s, z_0, z_T, s, t, eta=0.5)
