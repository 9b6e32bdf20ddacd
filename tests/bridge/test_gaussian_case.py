"""The samplers where the answer is known: z_0 ~ N(m, .5^2) per element, z_T fixed, the exact prediction E[z_0 | z_t].

Every sampler is then affine in its noises, so that one batch gives its result exactly, without sampling: row 0 runs
without noise and is the mean; row j runs with a 1 in draw j alone, and its distance from row 0 is that draw's share
of the standard deviation.
"""

from itertools import pairwise

import pytest
import torch

from framebridge_plugin.bridge import (
    BridgeSchedule,
    FlowMatchingAlignment,
    booted_start,
    dbim_step,
    extrapolate_z_0,
    predict_z_0,
    sde_step,
    timestep_grid,
)

SCHEDULE = BridgeSchedule()
MEAN, STD, PRIOR = 1.0, 0.5, -0.5


def exact_prediction(z_t, z_T, index):
    k = SCHEDULE.coefficients(index)
    gain = k.a * STD**2 / (k.a**2 * STD**2 + k.c**2)
    return MEAN + gain * (z_t - k.b * z_T - k.a * MEAN)


def prediction_by_flow_matching(z_t, z_T, index):
    """The same by way of a flow-matching backbone, which sees nothing but its own latent and time."""
    alignment = FlowMatchingAlignment(SCHEDULE, time_scale=1000)
    x, tau = alignment.latent(z_t, z_T, index), alignment.timestep(index).double() / 1000
    variance = (1 - tau) ** 2 * STD**2 + tau**2
    velocity = -MEAN + (tau - (1 - tau) * STD**2) / variance * (x - (1 - tau) * MEAN)  # E[eps - z_0 | x]
    return predict_z_0("flow", velocity, z_t, z_T, SCHEDULE.coefficients(index))


def sample(sampler, grid, steps, eta=0.0, order=1, start="booted", predict=exact_prediction):
    """Return the mean and the standard deviation that a sampler reaches."""
    indices = timestep_grid(grid, steps, SCHEDULE)
    times = [SCHEDULE.coefficients(index) for index in indices]
    noise = [(torch.arange(steps + 1) == j).double().unsqueeze(-1) for j in range(steps + 1)]  # draw j is 1 in row j
    z_T = torch.full((steps + 1, 1), PRIOR, dtype=torch.float64)
    z = booted_start(z_T, noise[steps], times[0]) if start == "booted" else z_T
    before = None
    for j, s in enumerate(times):
        z_0 = predict(z, z_T, indices[j])
        if j == steps - 1:
            z = z_0
        elif sampler == "sde":
            z = sde_step(z, z_0, noise[j + 1], s, times[j + 1])
        else:
            better = z_0 if order == 1 or before is None else extrapolate_z_0(z_0, *before, s, times[j + 1])
            z = dbim_step(z, better, z_T, s, times[j + 1], eta, noise[j + 1])
        before = (z_0, s)
    return float(z[0]), float((z[1:] - z[0]).norm())


CALLS = (20, 40, 80, 160)


@pytest.mark.parametrize(
    "sampler, eta, order", [("sde", 1.0, 1), ("dbim", 0.0, 1), ("dbim", 0.5, 1), ("dbim", 1.0, 1)]
)
def test_order_1_converges_as_1_over_n(sampler, eta, order):
    errors = [abs(sample(sampler, "lambda", n, eta, order)[1] - STD) for n in CALLS]
    for coarse, fine in pairwise(errors):
        assert 1.8 < coarse / fine < 2.1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_order_2_converges_as_1_over_n_squared(eta):
    errors = [abs(sample("dbim", "lambda", n, eta, 2)[1] - STD) for n in CALLS]
    # At 160 calls the start's own error in the deviation, 3e-5, begins to show.
    for coarse, fine in pairwise(errors[:3]):
        assert 3.4 < coarse / fine < 4.6
    assert errors[3] < errors[2] / 3.4


def test_the_errors_are_the_known_ones():
    order_1 = [abs(sample("dbim", "lambda", n)[1] - STD) for n in CALLS]
    order_2 = [abs(sample("dbim", "lambda", n, order=2)[1] - STD) for n in CALLS]
    assert order_1 == pytest.approx([6.1e-2, 3.1e-2, 1.5e-2, 7.7e-3], rel=0.03)
    assert order_2 == pytest.approx([7.5e-3, 1.9e-3, 4.4e-4, 8.0e-5], rel=0.03)


@pytest.mark.parametrize("predict", [exact_prediction, prediction_by_flow_matching])
@pytest.mark.parametrize(
    "sampler, grid, order, start, calls, known",
    [
        ("sde", "linspace", 1, "clean_prior", (10, 20, 50), (0.291, 0.364, 0.425)),
        ("sde", "trailing", 1, "clean_prior", (10, 20, 50), (0.304, 0.368, 0.427)),
        ("dbim", "lambda", 1, "booted", (20, 40), (0.439, 0.469)),
        ("dbim", "linspace", 2, "booted", (8, 10, 20, 50), (0.68, 0.73, 0.72, 0.57)),
        ("dbim", "trailing", 2, "booted", (8, 10, 20, 50), (0.305, 0.346, 0.448, 0.500)),
        ("dbim", "lambda", 2, "booted", (8, 20, 50), (0.513, 0.507, 0.501)),
    ],
)
def test_known_standard_deviations(sampler, grid, order, start, calls, known, predict):
    reached = [sample(sampler, grid, n, order=order, start=start, predict=predict)[1] for n in calls]
    assert reached == pytest.approx(list(known), abs=5.1e-3 if grid == "linspace" and order == 2 else 1.1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_without_fresh_noise_the_mean_keeps_the_bias_of_the_start(order):
    bias = 0.0045 * (PRIOR - MEAN)
    error = sample("dbim", "lambda", 320, order=order)[0] - MEAN
    assert error == pytest.approx(bias, rel=0.02)
    # The bias belongs to the start, not to the steps: more of them leave it where it is.
    assert sample("dbim", "lambda", 640, order=order)[0] - MEAN == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("grid", ["trailing", "linspace", "lambda"])
@pytest.mark.parametrize("start", ["booted", "clean_prior"])
def test_the_sde_forgets_its_start(grid, start):
    assert abs(sample("sde", grid, 50, start=start)[0] - MEAN) < 5e-5


def test_from_the_clean_prior_the_ode_has_no_spread():
    assert sample("dbim", "lambda", 20, start="clean_prior")[1] == 0
