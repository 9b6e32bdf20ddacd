"""The ODE sampler of the reference's Latte code: the steps in which it is right, and why the others differ from ours.

Each of its faults is shown twice: with it put in, our functions give the stored numbers; without it they do not.
The names of the groups are those of `test_latte_vectors`; `order1` calls the network once a step, `order2` twice.
A position counts from the end of the run: 0 is index 0, 9 is index 998, 10 is index 999.
"""

from __future__ import annotations

import pytest
import torch

from framebridge_plugin.backbones.latte.networks import call_latte
from framebridge_plugin.bridge import BridgeSchedule, dbim_step, sde_step, timestep_grid
from tests.backbones.test_latte_vectors import NO_CLASS, VECTORS, make_pipeline
from tests.latte_stand_in import StandInLatte, make_scheduler
from tests.reference_vectors import predicted_z_0, relative_error

INDEX_AT = VECTORS["timestep_map_ode.10"].tolist()
# The reference's tables are float32 from the start, and eleven calls of the network enlarge what is missing in them.
ODE_RUN = 2e-4
CASES = [(is_aligned, prior_kind) for is_aligned in (True, False) for prior_kind in ("None", "prior")]


class ReferenceRun:
    """Our functions on the reference's grid, with its faults to choose."""

    def __init__(self, is_aligned: bool, prior_kind: str, frame_scale: float = 1.0) -> None:
        self.scheduler = make_scheduler(is_aligned)
        self.condition = VECTORS["s.frame_cond1"]
        self.first_frame = self.condition.expand(-1, 4, -1, -1, -1)
        self.coarse = VECTORS["s.coarse_video"] if prior_kind == "prior" else None
        self.prior = self.first_frame if self.coarse is None else self.coarse
        self.network = StandInLatte(VECTORS, self.coarse is not None, frame_scale)
        self.is_aligned = is_aligned
        # The faults.
        self.tells_positions = False
        self.steps_to = self.prior

    def with_faults(self) -> ReferenceRun:
        self.tells_positions = not self.is_aligned
        self.steps_to = self.first_frame
        return self

    def predict_z_0(self, z: torch.Tensor, position: int) -> torch.Tensor:
        shown, time = self.scheduler.align(z, self.prior, INDEX_AT[position])
        if self.tells_positions and position < 10:
            time = torch.full_like(time, position)
        output = call_latte(self.network, shown, time, NO_CLASS, self.condition, self.coarse)
        return predicted_z_0(self.scheduler, output, z, self.prior, INDEX_AT[position])

    def step(self, z: torch.Tensor, position: int) -> torch.Tensor:
        """One step of order 1 from a position to the one before it, or to the data."""
        z_0 = self.predict_z_0(z, position)
        return z_0 if position == 0 else dbim_step(z, z_0, self.steps_to, self.at(position), self.at(position - 1))

    def step_of_order_2(self, z: torch.Tensor, position: int) -> torch.Tensor:
        """As the reference takes it: half of this interval's change and half of the next one's, by their lengths."""
        after_1 = self.step(z, position)
        if position == 0:
            return after_1
        after_2 = self.step(after_1, position - 1)
        index, next_index, third_index = *INDEX_AT[position - 1 : position + 1][::-1], [-1, *INDEX_AT][position - 1]
        stretch = (index - next_index) / (next_index - third_index)
        return z + ((after_1 - z) + stretch * (after_2 - after_1)) / 2

    def first_step(self, noise: torch.Tensor) -> torch.Tensor:
        """From the clean prior, as if it were a sample of index 999, to index 998."""
        return sde_step(self.prior, self.predict_z_0(self.prior, 10), noise, self.at(10), self.at(9))

    def at(self, position: int):
        return self.scheduler.schedule.coefficients(INDEX_AT[position])


def assert_told(run: ReferenceRun, group: str) -> None:
    """The network was told the stored times. Relative to 1000, for the time at index 0 is 0."""
    told, expected = torch.stack(run.network.seen_times), VECTORS[f"{group}.model_t"]
    assert told.shape == expected.shape
    assert (told - expected).abs().max() < 2e-5 * 1000


@pytest.mark.parametrize("position", [0, 1, 5, 9])
def test_aligned_steps_of_order_1_from_the_still_image_are_right(position):
    run = ReferenceRun(is_aligned=True, prior_kind="None")
    group = f"ode1.resp10.align1.None.order1.i{position}"
    assert relative_error(run.step(VECTORS["s.x"], position), VECTORS[f"{group}.sample"]) < 2e-5
    assert_told(run, group)


def test_so_is_such_a_run_after_its_first_step():
    run = ReferenceRun(is_aligned=True, prior_kind="None", frame_scale=0.3)
    z = run.first_step(VECTORS["odeloop.resp10.align1.None.order1.noises"][0])
    for position in range(9, -1, -1):
        z = run.step(z, position)
    assert relative_error(z, VECTORS["odeloop.resp10.align1.None.order1.final"]) < ODE_RUN
    assert_told(run, "odeloop.resp10.align1.None.order1")


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("is_aligned", "prior_kind"), CASES)
def test_whole_runs_differ_because_the_first_step_adds_too_little_noise(is_aligned, prior_kind, order):
    """It is the SDE's step from index 999, where a sample has noise .2232 already, but starts at the clean prior."""
    group = f"odeloop.resp10.align{is_aligned:d}.{prior_kind}.order{order}"
    noise, expected = VECTORS[f"{group}.noises"][0], VECTORS[f"{group}.final"]
    reference = ReferenceRun(is_aligned, prior_kind, frame_scale=0.3).with_faults()
    z = reference.first_step(noise)
    for position in range(9, -1, -1):
        z = reference.step(z, position) if order == 1 else reference.step_of_order_2(z, position)
    assert relative_error(z, expected) < ODE_RUN
    assert_told(reference, group)

    scheduler = make_scheduler(is_aligned, [noise], sampler="dbim", order=order)
    network = StandInLatte(VECTORS, prior_kind == "prior", frame_scale=0.3)
    pipeline = make_pipeline(network, scheduler)
    ours = pipeline.denoise(
        reference.condition, NO_CLASS, reference.coarse, num_inference_steps=10, guidance_scale=1.0
    )
    assert relative_error(ours, expected) > 1e-2
    # Ours calls it once a step, without a step to 998; only aligned are the reference's times right.
    stored = VECTORS[f"odeloop.resp10.align{is_aligned:d}.{prior_kind}.order1.model_t"]
    error = (torch.stack(network.seen_times) - torch.cat([stored[:1], stored[2:]])).abs().max()
    assert error < 2e-5 * 1000 if is_aligned else error == 888 - 8


def test_the_noise_of_the_first_step_is_less_than_three_quarters_of_the_bridges():
    run = ReferenceRun(is_aligned=True, prior_kind="None")
    noise = run.first_step(torch.ones(2, 4, 4, 4, 4)) - run.first_step(torch.zeros(2, 4, 4, 4, 4))
    assert float(noise.mean() / run.at(9).c) == pytest.approx(0.7077, abs=1e-3)
    booted = make_scheduler(True, [torch.ones(2, 4, 4, 4, 4)], sampler="dbim")
    booted.set_timesteps(10)
    ours = booted.initial_latent(run.prior) - run.prior
    assert float(ours.mean() / booted.schedule.c[999]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("position", [1, 5, 9])
@pytest.mark.parametrize("prior_kind", ["None", "prior"])
def test_unaligned_steps_differ_because_the_network_is_told_positions(prior_kind, position):
    """Without SNR alignment the reference feeds the number of the step, 9, where training fed the index, 998."""
    group = f"ode1.resp10.align0.{prior_kind}.order1.i{position}"
    expected = VECTORS[f"{group}.sample"]
    assert VECTORS[f"{group}.model_t"].unique().tolist() == [position]
    run = ReferenceRun(is_aligned=False, prior_kind=prior_kind).with_faults()
    assert relative_error(run.step(VECTORS["s.x"], position), expected) < 2e-5
    assert_told(run, group)
    run.tells_positions = False
    assert relative_error(run.step(VECTORS["s.x"], position), expected) > 1e-2
    assert run.network.seen_times[-1].unique().tolist() == [INDEX_AT[position]]


@pytest.mark.parametrize("position", [1, 5, 9])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_steps_from_a_neural_prior_differ_because_they_go_to_the_first_frame(is_aligned, position):
    """The reference takes the first frame as z_T, though the bridge was trained to end at the neural prior's video."""
    group = f"ode1.resp10.align{is_aligned:d}.prior.order1.i{position}"
    expected = VECTORS[f"{group}.sample"]
    run = ReferenceRun(is_aligned, "prior").with_faults()
    assert relative_error(run.step(VECTORS["s.x"], position), expected) < 2e-5
    assert_told(run, group)
    run.steps_to = run.prior
    assert relative_error(run.step(VECTORS["s.x"], position), expected) > 1e-4


@pytest.mark.parametrize("position", [1, 5, 9])
@pytest.mark.parametrize(("is_aligned", "prior_kind"), CASES)
def test_steps_of_order_2_differ_because_they_take_the_next_interval(is_aligned, prior_kind, position):
    """Heun's second slope is that at the end of the same interval; the reference takes the change over the next."""
    group = f"ode1.resp10.align{is_aligned:d}.{prior_kind}.order2.i{position}"
    expected = VECTORS[f"{group}.sample"]
    run = ReferenceRun(is_aligned, prior_kind).with_faults()
    assert relative_error(run.step_of_order_2(VECTORS["s.x"], position), expected) < 2e-5
    assert_told(run, group)
    if not is_aligned:
        assert VECTORS[f"{group}.model_t"].tolist() == [[position] * 2, [position - 1] * 2]  # no indices

    # Ours is multistep; its first step, with no prediction before it, is one of order 1.
    scheduler = make_scheduler(is_aligned, sampler="dbim", order=2)
    scheduler.set_timesteps(10)
    time = scheduler.timesteps[9 - position]
    shown, network_time = scheduler.align(VECTORS["s.x"], run.prior, time)
    output = call_latte(run.network, shown, network_time, NO_CLASS, run.condition, run.coarse)
    ours = scheduler.step(output, time, VECTORS["s.x"], run.prior).prev_sample
    assert relative_error(ours, expected) > 1e-2


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("prior_kind", ["None", "prior"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_last_step_returns_the_prediction_in_every_group(is_aligned, prior_kind, order):
    """So there the faults cannot show."""
    run = ReferenceRun(is_aligned, prior_kind)
    group = f"ode1.resp10.align{is_aligned:d}.{prior_kind}.order{order}.i0"
    assert relative_error(run.step(VECTORS["s.x"], 0), VECTORS[f"{group}.sample"]) < 2e-5
    assert_told(run, group)


class GaussianRun(ReferenceRun):
    """Data of standard deviation .5 around the prior, and their exact predictor."""

    def __init__(self) -> None:
        super().__init__(is_aligned=False, prior_kind="None")
        self.steps_to = torch.zeros_like(self.prior)

    def predict_z_0(self, z: torch.Tensor, position: int) -> torch.Tensor:
        k = self.at(position)
        return float(k.a * 0.25 / (k.a**2 * 0.25 + k.c**2)) * z


def test_order_2_is_worse_than_order_1_in_the_reference():
    """Not so here: see the Gaussian case among the tests of the bridge."""
    run = GaussianRun()
    k = run.at(9)
    one_deviation = torch.full_like(run.prior, float(torch.sqrt(k.a**2 * 0.25 + k.c**2)))
    ends = []
    for step in (run.step, run.step_of_order_2):
        z = one_deviation
        for position in range(9, -1, -1):
            z = step(z, position)
        ends.append(z.unique().item())
    assert ends == pytest.approx([0.3146, 0.2969], abs=1e-3)  # of .5


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_the_grid_of_the_reference_has_one_time_more(steps):
    """998, which ends its first step, a short one."""
    *grid, last = timestep_grid("linspace", steps, BridgeSchedule()).flip(0).long().tolist()
    assert VECTORS[f"timestep_map_ode.{steps}"].tolist() == [*grid, 998, last]


@pytest.mark.parametrize("steps", [667, 800, 1000])
def test_many_steps_differ_because_a_time_is_repeated(steps):
    """Where the grid has 998 already, the reference's extra 998 makes an interval of length 0: a slope of 0 / 0."""
    grid = timestep_grid("linspace", steps, BridgeSchedule())
    assert grid[1] == 998
    assert (grid.diff() < 0).all()
    if steps == 1000:
        repeated = VECTORS["timestep_map_ode.1000"]
        assert repeated.tolist() == [*grid.flip(0).long().tolist()[:-1], 998, 999]
