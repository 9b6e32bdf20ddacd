import dataclasses
from fractions import Fraction

import pytest
import torch

from framebridge_plugin.bridge import BridgeSchedule
from framebridge_plugin.errors import FrameBridgeError
from tests.reference_vectors import load_vectors, relative_error

VECTORS, _ = load_vectors("cogvideox_scheduler")
SCHEDULES = [
    BridgeSchedule(),
    BridgeSchedule(0.1, 10.0),
    BridgeSchedule(0.0, 20.0, 400),  # no noise at the data's end
    BridgeSchedule(3.0, 3.0),  # a Brownian bridge
    BridgeSchedule(9.0, 1.0),  # decreasing
]


@pytest.mark.parametrize("name, betas", [("table", {}), ("table_b0.1_10", {"beta_min": 0.1, "beta_max": 10.0})])
def test_tables_are_the_reference_ones(name, betas):
    schedule = BridgeSchedule(**betas)
    for ours, theirs in (("a", "a_t"), ("b", "b_t"), ("c", "c_t"), ("sigma", "sigma_t")):
        table = getattr(schedule, ours)
        assert table.shape == (1000,)
        assert table.dtype == torch.float64
        assert table.device.type == "cpu"
        assert relative_error(table, VECTORS[f"{name}.{theirs}"]) < 2e-5
    sbar = torch.sqrt(schedule.sigma_1_squared * schedule.a)
    assert relative_error(sbar, VECTORS[f"{name}.sigma_bar_t"]) < 2e-5


def test_known_values():
    schedule = BridgeSchedule()
    ratio = schedule.a / schedule.c
    assert float(ratio[0]) == pytest.approx(169, abs=0.5)
    assert float(schedule.a[499]) == pytest.approx(0.750, abs=5e-4)
    assert float(schedule.c[499]) == pytest.approx(2.164, abs=5e-4)
    assert float(schedule.a[899]) == pytest.approx(0.192, abs=5e-4)
    assert float(schedule.c[899]) == pytest.approx(1.968, abs=5e-4)
    assert float(schedule.a[999]) == pytest.approx(0.0020, abs=5e-5)
    assert float(schedule.c[999]) == pytest.approx(0.2232, abs=5e-5)
    assert float(schedule.c.max()) == pytest.approx(2.5, abs=5e-3)
    assert (int(schedule.c.argmax()) + 1) / 1001 == pytest.approx(0.707, abs=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_tables_have_all_digits_at_both_ends(schedule):
    beta_min, beta_max, n = Fraction(schedule.beta_min), Fraction(schedule.beta_max), schedule.num_train_timesteps
    for index in (0, 1, n // 2, n - 2, n - 1):
        t = Fraction(index + 1, n + 1)
        b = (beta_min * t + (beta_max - beta_min) * t**2 / 2) / ((beta_min + beta_max) / 2)
        exact = {"a": 1 - b, "b": b, "c^2": b * (1 - b) * (beta_min + beta_max) / 2}
        ours = {"a": schedule.a[index], "b": schedule.b[index], "c^2": schedule.c[index] ** 2}
        for name, value in exact.items():
            assert float(ours[name]) == pytest.approx(float(value), rel=1e-14), (name, index)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_identities_hold_at_real_valued_indices(schedule):
    index = torch.tensor([0.0, 0.25, 17.5, 200.125, schedule.last_index], dtype=torch.float64)
    k = schedule.coefficients(index)
    torch.testing.assert_close(k.a + k.b, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(k.b * schedule.sigma_1_squared, k.sigma**2)
    torch.testing.assert_close(k.c**2, k.sigma**2 * k.a)
    torch.testing.assert_close(k.norm**2, k.a**2 + k.c**2)
    torch.testing.assert_close(k.log_ratio.exp(), k.a / k.c)


def test_every_form_of_index_gives_the_same():
    schedule = BridgeSchedule()
    table = schedule.coefficients(torch.arange(1000))
    for scalar in (640, 640.0, torch.tensor(640), torch.tensor(640.0)):
        k = schedule.coefficients(scalar)
        for name in ("a", "b", "c", "sigma"):
            value = getattr(k, name)
            assert value.dtype == torch.float64
            assert value.shape == ()
            assert torch.equal(value, getattr(table, name)[640])
            assert torch.equal(value, getattr(schedule, name)[640])
    between = schedule.coefficients(640.5)
    assert table.a[641] < between.a < table.a[640]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_index_of_ratio_inverts_the_ratio(schedule):
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(200, generator=generator, dtype=torch.float64) * schedule.last_index
    index[:2] = torch.tensor([0.0, schedule.last_index])
    found = schedule.index_of_ratio(schedule.coefficients(index).ratio)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, index, rtol=0, atol=1e-9)
    one = schedule.index_of_ratio(float(schedule.coefficients(12.5).ratio))
    assert one.shape == ()
    assert float(one) == pytest.approx(12.5, abs=1e-9)


def test_index_of_ratio_at_the_ends_of_the_process():
    schedule = BridgeSchedule()
    ends = schedule.index_of_ratio(torch.tensor([float("inf"), 0.0]))
    torch.testing.assert_close(ends, torch.tensor([-1.0, 1000.0], dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.coefficients(ends).a, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_a_schedule_cannot_be_changed():
    schedule = BridgeSchedule()
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.beta_min = 1.0
    assert schedule == BridgeSchedule(0.01, 50.0, 1000)


@pytest.mark.parametrize(
    "arguments",
    [(-0.1, 50.0), (0.01, -1.0), (0.0, 0.0), (0.01, float("inf")), (float("nan"), 50.0), (0.01, 50.0, 1)],
)
def test_an_impossible_schedule_is_refused(arguments):
    with pytest.raises(FrameBridgeError, match="bridge schedule: ") as error:
        BridgeSchedule(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", [-1.5, 1000.5, float("nan"), torch.tensor([3.0, 1234.0])])
def test_an_index_outside_the_process_is_refused(index):
    with pytest.raises(FrameBridgeError, match="indices run from 0 to 999"):
        BridgeSchedule().coefficients(index)


def test_tables_ignore_the_default_device_and_dtype():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            table, one = BridgeSchedule().a, BridgeSchedule().coefficients(12.5).a
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(table, BridgeSchedule().a)
    assert torch.equal(one, BridgeSchedule().coefficients(12.5).a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_coefficients_follow_the_device_of_the_index():
    index = torch.tensor([0.0, 12.5, 999.0], device="cuda")
    k = BridgeSchedule().coefficients(index)
    assert k.a.device == index.device
    torch.testing.assert_close(k.a.cpu(), BridgeSchedule().coefficients(index.cpu()).a)
    assert BridgeSchedule().index_of_ratio(k.ratio).device == index.device
