"""What the reference's Latte code computes without a network: tables, time grids, samples of the bridge, targets."""

import pytest
import torch

from framebridge_plugin.bridge import BridgeSchedule, VariancePreservingAlignment, timestep_grid
from tests.latte_stand_in import make_scheduler
from tests.reference_vectors import load_vectors, relative_error

VECTORS, _ = load_vectors("latte_diffusion")
TABLES = ["table1000", "table10", "table10_aligned", "table10_ode_aligned"]


@pytest.mark.parametrize("table", TABLES)
def test_tables(table):
    stored = {key: VECTORS[f"{table}.{key}"] for key in ("a_t", "b_t", "c_t", "sigma_t", "sigma_bar_t", "bridge_snr")}
    index = VECTORS[f"{table}.timestep_map"]
    schedule = BridgeSchedule()
    k = schedule.coefficients(index)
    assert relative_error(k.a, stored["a_t"]) < 2e-5
    assert relative_error(k.b, stored["b_t"]) < 2e-5
    assert relative_error(k.c, stored["c_t"]) < 2e-5
    assert relative_error(k.sigma, stored["sigma_t"]) < 2e-5
    assert relative_error(torch.sqrt(schedule.sigma_1_squared * k.a), stored["sigma_bar_t"]) < 2e-5
    assert relative_error(k.ratio, stored["bridge_snr"]) < 2e-5
    assert relative_error((index + 1) / 1001, VECTORS[f"{table}.t_frac"]) < 2e-5


def test_the_tables_of_the_reference_are_inexact_near_the_prior():
    """It subtracts nearly equal numbers in float32 there, which widens the tolerance of an aligned step from 999."""
    stored, exact = VECTORS["table1000.c_t"].double(), BridgeSchedule().c
    error = (stored - exact).abs() / exact
    assert error.argmax() == 999
    assert 3e-5 < error[999] < 5e-5
    assert error[:900].max() < 1e-6


@pytest.mark.parametrize("table", TABLES)
def test_aligned_times(table):
    index = VECTORS[f"{table}.timestep_map"]
    alignment = make_scheduler(is_aligned=True).alignment
    if table == "table10":
        # Without SNR alignment the reference aligns to its ten diffusion steps, and does not use the result.
        alignment = VariancePreservingAlignment(alignment.schedule, alignment.alphas_cumprod[index])
    assert relative_error(alignment.timestep(index), VECTORS[f"{table}.aligned_t"]) < 2e-5


@pytest.mark.parametrize("table", TABLES)
def test_the_backbone_is_ddpm_with_linear_betas(table):
    expected = VECTORS[f"{table}.diffusion_snr"]
    # The reference's diffusion has no index 998, also where its ODE grid has.
    ratios = make_scheduler(is_aligned=True).alignment.ratios[VECTORS[f"timestep_map.{len(expected)}"]]
    # Not 2e-5, for diffusers' table of alpha^2 is float32: 1 - alpha^2, which starts at 1e-4, keeps three digits.
    assert (ratios / expected - 1).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [10, 50, 250, 1000])
def test_respaced_times_are_the_linspace_grid(steps):
    expected = VECTORS[f"timestep_map.{steps}"].flip(0).double()
    assert torch.equal(timestep_grid("linspace", steps, BridgeSchedule()), expected)


@pytest.mark.parametrize("index", [0, 1, 3, 120, 500, 998, 999])
@pytest.mark.parametrize("is_aligned", [False, True])
def test_samples_of_the_bridge_and_targets(index, is_aligned):
    z_0, noise, coarse = VECTORS["x0"], VECTORS["noise"], VECTORS["coarse_video"]
    still = VECTORS["condition_frame"].expand_as(z_0)
    scheduler = make_scheduler(is_aligned)
    z_t = scheduler.add_noise(z_0, still, noise, index)
    assert relative_error(z_t, VECTORS[f"q.t{index}.x_t"]) < 2e-5
    assert relative_error(scheduler.add_noise(z_0, coarse, noise, index), VECTORS[f"q.t{index}.x_t_coarse"]) < 2e-5
    target = scheduler.get_target(z_0, z_t, still, noise, index)
    assert relative_error(target, VECTORS[f"q.t{index}.target_eps_psi"]) < 2e-5
