import pytest
import torch

from framebridge_plugin.bridge import (
    TARGETS,
    BridgeSchedule,
    compute_target,
    predict_z_0,
    sample_bridge,
    weight_from_v_to_eps_psi,
)
from framebridge_plugin.errors import FrameBridgeError
from tests.reference_vectors import load_vectors, relative_error

SCHEDULE = BridgeSchedule()
VECTORS, _ = load_vectors("cogvideox_scheduler")
# (set, suffix, index): every stored time of both shapes, and one time per sample
CASES = [(name, f"t{t}", int(t)) for name in "AB" for t in VECTORS[f"{name}.timesteps"]]
CASES.append(("A", "mixed", VECTORS["A.mixed.t"]))


def draw(seed, shape=(7, 2, 3, 4, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("name, suffix, index", CASES, ids=lambda value: str(value))
def test_the_reference_numbers(name, suffix, index):
    z_0, noise, prior, output = (VECTORS[f"{name}.{key}"] for key in ("X0", "noise", "prior", "model_output"))
    k = SCHEDULE.coefficients(index)
    z_t = sample_bridge(z_0, prior, noise, k)
    assert relative_error(z_t, VECTORS[f"{name}.{suffix}.x_t"]) < 2e-5
    target = compute_target("v", z_0, z_t, prior, noise, k)
    assert relative_error(target, VECTORS[f"{name}.{suffix}.v_target"]) < 2e-5
    prediction = predict_z_0("v", output, z_t, prior, k)
    assert relative_error(prediction, VECTORS[f"{name}.{suffix}.x0_from_random_v"]) < 2e-5
    if suffix != "mixed":
        again = predict_z_0("v", target, z_t, prior, k)
        assert relative_error(again, VECTORS[f"{name}.{suffix}.x0_from_v_target"]) < 2e-5


@pytest.mark.parametrize("name, betas", [("table", {}), ("table_b0.1_10", {"beta_min": 0.1, "beta_max": 10.0})])
def test_the_reference_training_weights(name, betas):
    schedule = BridgeSchedule(**betas)
    weights = weight_from_v_to_eps_psi(schedule.coefficients(torch.arange(1000)))
    assert relative_error(weights, VECTORS[f"{name}.training_weights"]) < 2e-5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "index",
    [0, 0.5, 500, 998.75, 999, torch.tensor([0.0, 1.5, 8.0, 250.25, 700.0, 998.9, 999.0])],
    ids=["0", "0.5", "500", "998.75", "999", "B"],
)
def test_every_target_leads_back_to_z_0(target, index):
    z_0, z_T, eps = draw(1)
    k = SCHEDULE.coefficients(index)
    z_t = sample_bridge(z_0, z_T, eps, k)
    output = compute_target(target, z_0, z_t, z_T, eps, k)
    error = (predict_z_0(target, output, z_t, z_T, k) - z_0).abs().max()
    assert float(error) < 1e-9


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("index", [0, 400.5, 999, torch.tensor([0.0, 1.5, 8.0, 250.25, 700.0, 998.9, 999.0])], ids=str)
def test_any_output_is_the_target_of_the_pair_that_it_predicts(target, index):
    # So that whatever a network returns converts from each target into every other.
    z_t, z_T, output = draw(8)
    k = SCHEDULE.coefficients(index)
    z_0 = predict_z_0(target, output, z_t, z_T, k)
    a, b, c = (part.reshape(-1, 1, 1, 1, 1) for part in (k.a, k.b, k.c))
    eps = (z_t - a * z_0 - b * z_T) / c
    again = compute_target(target, z_0, z_t, z_T, eps, k)
    torch.testing.assert_close(again, output, rtol=1e-8, atol=1e-8)
    if target == "flow":
        torch.testing.assert_close(eps - z_0, output, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("target", TARGETS)
def test_one_index_per_sample_equals_one_sample_at_a_time(target):
    z_0, z_T, eps = draw(2)
    index = torch.tensor([0.0, 1.5, 8.0, 250.25, 700.0, 998.9, 999.0])
    k = SCHEDULE.coefficients(index)
    z_t = sample_bridge(z_0, z_T, eps, k)
    output = compute_target(target, z_0, z_t, z_T, eps, k)
    back = predict_z_0(target, eps, z_t, z_T, k)
    for i in range(len(index)):
        one = slice(i, i + 1)
        k_i = SCHEDULE.coefficients(index[i])
        assert torch.equal(z_t[one], sample_bridge(z_0[one], z_T[one], eps[one], k_i))
        assert torch.equal(output[one], compute_target(target, z_0[one], z_t[one], z_T[one], eps[one], k_i))
        assert torch.equal(back[one], predict_z_0(target, eps[one], z_t[one], z_T[one], k_i))


@pytest.mark.parametrize("index", [3, 400.5, 999])
def test_the_weight_turns_a_v_loss_into_an_eps_psi_loss(index):
    z_0, z_T, eps = draw(3)
    guess = draw(4)[0]
    k = SCHEDULE.coefficients(index)
    z_t = sample_bridge(z_0, z_T, eps, k)
    loss = {
        target: (
            compute_target(target, guess, z_t, z_T, (z_t - k.a * guess - k.b * z_T) / k.c, k)
            - compute_target(target, z_0, z_t, z_T, eps, k)
        ).square()
        for target in ("v", "eps_psi")
    }
    torch.testing.assert_close(weight_from_v_to_eps_psi(k) * loss["v"], loss["eps_psi"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_is_only_the_storage(target, dtype):
    z_0, z_T, eps = (tensor.to(dtype) for tensor in draw(5))
    k = SCHEDULE.coefficients(torch.tensor([1.0, 8.0, 250.25, 640.0, 700.0, 900.0, 999.0]))
    z_t = sample_bridge(z_0, z_T, eps, k)
    assert torch.equal(z_t, sample_bridge(z_0.float(), z_T.float(), eps.float(), k).to(dtype))
    output = compute_target(target, z_0, z_t, z_T, eps, k)
    wide = compute_target(target, z_0.float(), z_t.float(), z_T.float(), eps.float(), k)
    assert torch.equal(output, wide.to(dtype))
    back = predict_z_0(target, output, z_t, z_T, k)
    assert torch.equal(back, predict_z_0(target, output.float(), z_t.float(), z_T.float(), k).to(dtype))


def test_an_unknown_target_is_refused():
    z_0, z_T, eps = draw(6)
    k = SCHEDULE.coefficients(5)
    with pytest.raises(FrameBridgeError, match="unknown target 'velocity': choose one of v, .*, flow"):
        compute_target("velocity", z_0, z_0, z_T, eps, k)
    with pytest.raises(FrameBridgeError, match="unknown target 'x0'"):
        predict_z_0("x0", eps, z_0, z_T, k)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("index_device", ["cpu", "cuda"])
def test_coefficients_follow_the_latents_to_the_gpu(index_device):
    z_0, z_T, eps = (tensor.cuda() for tensor in draw(7))
    index = torch.arange(7, device=index_device) * 150.5
    k = SCHEDULE.coefficients(index)
    z_t = sample_bridge(z_0, z_T, eps, k)
    assert z_t.is_cuda
    expected = sample_bridge(z_0.cpu(), z_T.cpu(), eps.cpu(), SCHEDULE.coefficients(index.cpu()))
    torch.testing.assert_close(z_t.cpu(), expected)
