import functools
import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from framebridge_plugin import FrameBridgeScheduler
from framebridge_plugin.bridge import (
    GRIDS,
    TARGETS,
    BridgeSchedule,
    NoAlignment,
    VariancePreservingAlignment,
)
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers.backbone import build_backbone
from framebridge_plugin.settings.bridge import ProcessSection
from framebridge_plugin.settings.sampling import SamplerSection
from tests.reference_vectors import load_vectors, predicted_z_0, relative_error

VECTORS, DESCRIPTION = load_vectors("cogvideox_scheduler")
BACKBONE = {"_class_name": "CogVideoXDDIMScheduler", **DESCRIPTION["scheduler_config"]}
AS_THE_REFERENCE = {
    "alignment_edge": "reference",
    "sampler": "sde",
    "grid": "trailing",
    "start": "clean_prior",
}
ALIGNED_TO_DIFFUSION = {"alignment": "variance_preserving"}
ALL_SAMPLERS = [
    {"sampler": "sde"},
    {"sampler": "dbim"},
    {"sampler": "dbim", "order": 2, "grid": "lambda"},
    {"sampler": "dbim", "eta": 0.5, "order": 2, "grid": "linspace"},
]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def latents(seed, count=2, dtype=torch.float32):
    return torch.randn(count, 3, 4, 6, 5, generator=seeded(seed), dtype=torch.float64).to(dtype)


def run(scheduler, prior, generator, steps=6, start=None):
    """Sample with a network that is a fixed function of all that it is shown."""
    scheduler.set_timesteps(steps)
    z = scheduler.initial_latent(prior, generator) if start is None else start
    for t in scheduler.timesteps:
        shown, time = scheduler.align(z, prior, t)
        output = torch.tanh(shown.float() + time.reshape(-1, 1, 1, 1, 1) / 500 - 1).to(z.dtype)
        z = scheduler.step(output, t, z, prior, generator).prev_sample
    return z


# The reference's numbers, with its options by name


@pytest.mark.parametrize("name", ["A", "B"])
def test_training_side_of_the_reference(name):
    scheduler = FrameBridgeScheduler.from_backbone(BACKBONE, **AS_THE_REFERENCE)
    z_0, noise, prior, output = (VECTORS[f"{name}.{key}"] for key in ("X0", "noise", "prior", "model_output"))
    for t in VECTORS[f"{name}.timesteps"].tolist():
        stored = {key: VECTORS[f"{name}.t{t}.{key}"] for key in ("x_t", "v_target", "aligned_x_t", "aligned_t")}
        for index in (t, torch.full((len(z_0),), t)):
            z_t = scheduler.add_noise(z_0, prior, noise, index)
            shown, time = scheduler.align(z_t, prior, index)
            assert relative_error(z_t, stored["x_t"]) < 2e-5
            assert relative_error(scheduler.get_target(z_0, z_t, prior, noise, index), stored["v_target"]) < 2e-5
            assert relative_error(shown, stored["aligned_x_t"]) < 2e-5
            assert time.shape == (len(z_0),)
            assert relative_error(time, stored["aligned_t"]) < 2e-5
            z_0_back = predicted_z_0(scheduler, output, z_t, prior, index)
            assert relative_error(z_0_back, VECTORS[f"{name}.t{t}.x0_from_random_v"]) < 2e-5


@pytest.mark.parametrize("name", ["A", "B"])
def test_sampling_side_of_the_reference(name):
    # Five trailing steps pass 999 -> 799 and end at 199; the scheduler's own draw is exchanged for the stored one.
    scheduler = FrameBridgeScheduler.from_backbone(BACKBONE, **AS_THE_REFERENCE)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    z, eps, output, prior = (VECTORS[f"{name}.{key}"] for key in ("step.x_t", "step.noise", "model_output", "prior"))
    assert scheduler.initial_latent(prior) is prior
    first = scheduler.step(output, 999, z, prior, seeded(3)).prev_sample
    own = torch.randn(z.shape, generator=seeded(3))
    s, t = (scheduler.schedule.coefficients(index) for index in (999, 799))
    exchanged = first + float(t.sigma * torch.sqrt(1 - t.sigma**2 / s.sigma**2)) * (eps - own)
    assert relative_error(exchanged, VECTORS[f"{name}.step.999_799"]) < 2e-5
    last = scheduler.step(output, 199, z, prior)
    assert relative_error(last.prev_sample, VECTORS[f"{name}.step.199_None"]) < 2e-5
    assert torch.equal(last.prev_sample, last.pred_original_sample)


# Configs


def test_defaults():
    scheduler = FrameBridgeScheduler()
    assert scheduler.schedule == BridgeSchedule()
    assert isinstance(scheduler.alignment, NoAlignment)
    assert scheduler.config.alignment == "none"
    assert build_backbone(scheduler.config.backbone) is None
    assert len(scheduler) == 1000
    assert scheduler.order == 1
    assert (scheduler.config.sampler, scheduler.config.grid, scheduler.config.start) == ("sde", "trailing", "booted")
    assert scheduler.eta == 1.0
    assert FrameBridgeScheduler(sampler="dbim").eta == 0.0


@pytest.mark.parametrize("backbone_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_from_backbone_takes_a_scheduler_or_its_config(backbone_class, tmp_path):
    backbone = backbone_class(**DESCRIPTION["scheduler_config"])
    backbone.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    for given in (backbone, backbone_class.from_pretrained(tmp_path), saved):
        scheduler = FrameBridgeScheduler.from_backbone(given, target="data")
        assert scheduler.config.alignment == "variance_preserving"
        assert scheduler.config.target == "data"
        rebuilt = build_backbone(scheduler.config.backbone)
        assert type(rebuilt) is backbone_class
        assert torch.equal(rebuilt.alphas_cumprod, backbone.alphas_cumprod)
        assert isinstance(scheduler.alignment, VariancePreservingAlignment)
        assert torch.equal(scheduler.alignment.alphas_cumprod, backbone.alphas_cumprod)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"backbone": BACKBONE},
        {"backbone": BACKBONE, **AS_THE_REFERENCE},
        {
            "beta_min": 0.1,
            "beta_max": 10.0,
            "num_train_timesteps": 500,
            "target": "eps_psi",
            "sampler": "dbim",
            "order": 2,
            "eta": 0.25,
            "grid": "lambda",
        },
    ],
)
def test_save_and_load(settings, tmp_path):
    scheduler = FrameBridgeScheduler(**settings)
    scheduler.save_pretrained(tmp_path)
    loaded = FrameBridgeScheduler.from_pretrained(tmp_path)
    copied = FrameBridgeScheduler.from_config(scheduler.config)
    for key, value in settings.items():
        assert loaded.config[key] == value
        assert copied.config[key] == value
    public = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == public
    prior = latents(0)
    expected = run(scheduler, prior, seeded(1))
    assert torch.equal(run(loaded, prior, seeded(1)), expected)
    assert torch.equal(run(copied, prior, seeded(1)), expected)


def test_numbers_of_numpy_and_torch_are_saved_as_pythons_own(tmp_path):
    numbers = {"beta_max": 50.0, "num_train_timesteps": 1000, "eta": 0.5, "order": 2, "sampler": "dbim"}
    betas = np.linspace(1e-4, 0.02, 1000)
    given = {
        "beta_max": np.float32(50),
        "num_train_timesteps": torch.tensor(1000),
        "eta": np.float32(0.5),
        "order": np.int64(2),
        "sampler": np.str_("dbim"),
        "backbone": {"_class_name": "DDIMScheduler", "trained_betas": betas, "steps_offset": np.int64(1)},
    }
    scheduler = FrameBridgeScheduler(**given)
    scheduler.save_pretrained(tmp_path)
    for config in (scheduler.config, FrameBridgeScheduler.from_pretrained(tmp_path).config):
        assert {name: config[name] for name in numbers} == numbers
        assert [type(config[name]) for name in numbers] == [type(value) for value in numbers.values()]
        assert config.backbone == given["backbone"] | {"trained_betas": betas.tolist()}
    assert "FrameBridgeScheduler" in repr(scheduler)


def test_settings_by_their_place_are_kept():
    scheduler = FrameBridgeScheduler(0.1, 10.0)
    assert FrameBridgeScheduler.from_config(scheduler.config).config.beta_max == 10.0


def test_the_sampler_of_a_loaded_model_can_be_changed(tmp_path):
    FrameBridgeScheduler.from_backbone(BACKBONE, target="data").save_pretrained(tmp_path)
    for scheduler in (
        FrameBridgeScheduler.from_pretrained(tmp_path, sampler="dbim", order=2, grid="lambda"),
        FrameBridgeScheduler.from_config(
            FrameBridgeScheduler.from_pretrained(tmp_path).config, sampler="dbim", order=2, grid="lambda"
        ),
    ):
        assert (scheduler.config.sampler, scheduler.config.order, scheduler.eta) == ("dbim", 2, 0.0)
        assert (scheduler.config.target, scheduler.config.backbone) == ("data", BACKBONE)


def test_unknown_keys_are_refused(tmp_path):
    for make in (FrameBridgeScheduler, functools.partial(FrameBridgeScheduler.from_backbone, BACKBONE)):
        with pytest.raises(FrameBridgeError, match="unknown argument 'samplr'; did you mean 'sampler'?"):
            make(samplr="sde")
    FrameBridgeScheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alignmnt_edge": "exact"}))
    with pytest.raises(FrameBridgeError, match="unknown key 'alignmnt_edge'; did you mean 'alignment_edge'"):
        FrameBridgeScheduler.from_pretrained(tmp_path)
    with pytest.raises(FrameBridgeError, match="unknown key 'steps'"):
        FrameBridgeScheduler.from_config({}, steps=3)
    assert FrameBridgeScheduler.from_config({}).config.target == "v"


def test_the_config_of_another_scheduler_is_refused(tmp_path):
    with pytest.raises(FrameBridgeError, match="give a scheduler or its config, not None"):
        FrameBridgeScheduler.from_backbone(None)
    CogVideoXDDIMScheduler().save_pretrained(tmp_path)
    with pytest.raises(FrameBridgeError, match="config of a CogVideoXDDIMScheduler.*from_backbone"):
        FrameBridgeScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target": "x0"}, "target is 'x0'; it should be 'v', 'eps_psi', 'noise', 'data' or 'flow'"),
        ({"alignment": "vp"}, "alignment is 'vp'"),
        ({"alignment_edge": "clamp"}, "alignment_edge is 'clamp'"),
        ({"sampler": "ode"}, "sampler is 'ode'"),
        ({"order": 3}, "order is 3"),
        ({"grid": "leading"}, "grid is 'leading'"),
        ({"start": "noise"}, "start is 'noise'"),
        ({"sampler": "dbim", "eta": 1.5}, "eta is 1.5"),
        ({"sampler": "dbim", "eta": float("nan")}, "eta is nan"),
        ({"sampler": "dbim", "eta": "half"}, "eta is 'half'"),
        ({"beta_max": "50"}, "beta_max is '50'"),
        ({"beta_max": float("inf")}, "beta_max is inf"),
        ({"beta_min": -1.0}, "beta_min is -1.0"),
        ({"beta_min": 0.0, "beta_max": 0.0}, "beta_max: "),
        ({"beta_max": True}, "beta_max is True; it should be a number, at least 0"),
        ({"order": True}, "order is True; it should be 1 or 2"),
        ({"order": 2.0, "sampler": "dbim"}, "order is 2.0; it should be 1 or 2"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1; it should be a whole number, at least 2"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps is 1000.0; it should be a whole number, at least 2"),
        ({"backbone": "x"}, "backbone is 'x'; it should be a dictionary"),
        (
            {"backbone": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "3"}},
            "backbone config: shift is '3'; it should be a number",
        ),
        ({"sampler": "sde", "eta": 0.5}, "eta: the sampler sde has eta 1, not 0.5"),
        ({"sampler": "sde", "order": 2}, "order: the sampler sde has order 1"),
        ({"sampler": "dbim", "start": "clean_prior"}, "start: clean_prior needs eta 1, not 0"),
        ({"sampler": "dbim", "eta": 0.9, "start": "clean_prior"}, "start: clean_prior needs eta 1, not 0.9"),
        ({"alignment": "variance_preserving"}, "needs the config of the backbone's own diffusion scheduler"),
        ({"backbone": {"beta_start": 0.1}}, "_class_name=None is not a scheduler of diffusers"),
        ({"backbone": {"_class_name": "AutoencoderKL"}}, "_class_name='AutoencoderKL' is not a scheduler"),
        ({"alignment": "flow_matching"}, "needs the config of the backbone's own flow-matching scheduler"),
        (
            {"backbone": {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, **ALIGNED_TO_DIFFUSION},
            "not of a UniPC.*for flow",
        ),
        (
            {"backbone": {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}},
            "not of a FlowMatchEulerDiscreteScheduler for other processes",
        ),
        ({"backbone": {"_class_name": "EDMEulerScheduler"}}, "not of a EDMEulerScheduler for other processes"),
        (
            {"backbone": {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}},
            "for other processes",
        ),
        ({"backbone": {**BACKBONE, "beta_schedule": "cosine"}}, "backbone config: cosine is not implemented"),
        ({"backbone": BACKBONE, "alignment": "flow_matching"}, "needs the config of .* own flow-matching scheduler"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(FrameBridgeError, match=message) as error:
        FrameBridgeScheduler(**settings)
    assert "\n" not in str(error.value)


# The ways of diffusers


@pytest.mark.parametrize("settings", ALL_SAMPLERS)
def test_the_prior_may_be_set_once(settings):
    scheduler = FrameBridgeScheduler.from_backbone(BACKBONE, **settings)
    prior, draws = latents(0), seeded(1)
    expected = run(scheduler, prior, seeded(1))
    scheduler.set_prior(prior)
    scheduler.set_timesteps(6)
    z = prior + scheduler.init_noise_sigma * torch.randn(prior.shape, generator=draws)
    for t in scheduler.timesteps:
        shown, time = scheduler.align(z, None, t)
        assert torch.equal(scheduler.scale_model_input(torch.cat([z, z]), t), torch.cat([shown, shown]))
        output = torch.tanh(shown + time.reshape(-1, 1, 1, 1, 1) / 500 - 1)
        z = scheduler.step(output, t, z, generator=draws).prev_sample
    assert torch.equal(z, expected)
    with pytest.raises(FrameBridgeError, match=r"the prior has the shape \[2, .*the latents \[3, "):
        scheduler.scale_model_input(latents(0, count=3), 999)
    scheduler.set_prior(None)
    for call in (lambda: scheduler.scale_model_input(z, 999), lambda: scheduler.step(z, 999, z)):
        with pytest.raises(FrameBridgeError, match="a bridge has an end point; call set_prior"):
            call()


def test_the_start_has_the_noise_of_the_first_time():
    scheduler = FrameBridgeScheduler()
    assert scheduler.init_noise_sigma == pytest.approx(float(scheduler.schedule.coefficients(999).c))
    scheduler.set_timesteps(timesteps=[800, 3])
    assert scheduler.init_noise_sigma == pytest.approx(float(scheduler.schedule.coefficients(800).c))
    assert FrameBridgeScheduler(start="clean_prior").init_noise_sigma == 0
    assert torch.equal(scheduler.scale_model_input(latents(0), 800), latents(0))  # without an alignment


def test_times_may_be_given():
    scheduler = FrameBridgeScheduler.from_backbone(BACKBONE)
    prior = latents(0)
    expected = run(scheduler, prior, seeded(1))
    times = scheduler.timesteps
    for given in (times, times.long().tolist(), times.tolist()):
        scheduler.set_timesteps(timesteps=given)
        assert torch.equal(scheduler.timesteps, times)
        assert scheduler.num_inference_steps == 6
    scheduler.set_timesteps(timesteps=[998.5, 0])
    assert scheduler.timesteps.tolist() == [998.5, 0]
    assert not torch.equal(expected, prior)
    scheduler.set_timesteps(timesteps=np.array([998.5, 0]))
    assert scheduler.timesteps.tolist() == [998.5, 0]
    for wrong in ([], torch.tensor([[999, 3]]), [1000, 3], [3, 999], [5, 5], [5, -1], torch.tensor([torch.nan, 3])):
        with pytest.raises(FrameBridgeError, match="timesteps: should be bridge indices that fall, from at most 999"):
            scheduler.set_timesteps(timesteps=wrong)
    for wrong in ("10", ["a"], [[999, 3]], [float("nan"), 3]):
        with pytest.raises(FrameBridgeError, match="timesteps is .*; it should be a list of numbers"):
            scheduler.set_timesteps(timesteps=wrong)
    for wrong in (0, 2.5, True, "10"):
        with pytest.raises(FrameBridgeError, match="num_inference_steps is .*; it should be a whole number, at"):
            scheduler.set_timesteps(wrong)
    for call in ({}, {"num_inference_steps": 2, "timesteps": [999, 3]}):
        with pytest.raises(FrameBridgeError, match="give either num_inference_steps or timesteps"):
            scheduler.set_timesteps(**call)


# Training


@pytest.mark.parametrize("target", TARGETS)
def test_targets_round_trip_through_the_scheduler(target):
    scheduler = FrameBridgeScheduler(target=target)
    z_0, prior, noise = (latents(seed, dtype=torch.float64) for seed in (1, 2, 3))
    for index in (0, 17.25, 999, torch.tensor([0.5, 998.5])):
        z_t = scheduler.add_noise(z_0, prior, noise, index)
        output = scheduler.get_target(z_0, z_t, prior, noise, index)
        assert float((predicted_z_0(scheduler, output, z_t, prior, index) - z_0).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_networks_time_is_float32_for_every_sample_dtype(dtype):
    scheduler = FrameBridgeScheduler.from_backbone(BACKBONE)
    shown, time = scheduler.align(latents(1, dtype=dtype), latents(2, dtype=dtype), 999)
    assert shown.dtype == dtype
    assert time.dtype == torch.float32
    assert time.tolist() == pytest.approx([965.716] * 2, abs=5e-4)


# Sampling


@pytest.mark.parametrize("grid", GRIDS)
def test_set_timesteps(grid):
    scheduler = FrameBridgeScheduler(grid=grid)
    scheduler.set_timesteps(50)
    assert scheduler.num_inference_steps == 50
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps.shape == (50,)
    assert scheduler.timesteps[0] == 999
    assert scheduler.timesteps[-1] == (19 if grid == "trailing" else 0)
    with pytest.raises(FrameBridgeError, match="at least 1"):
        scheduler.set_timesteps(0)
    if grid != "lambda":
        with pytest.raises(FrameBridgeError, match="at most 1000"):
            scheduler.set_timesteps(1001)


def test_the_booted_start_has_the_noise_of_the_first_index():
    scheduler = FrameBridgeScheduler()
    scheduler.set_timesteps(10)
    prior = latents(0)
    noise = torch.randn(prior.shape, generator=seeded(5))
    expected = scheduler.add_noise(prior, prior, noise, 999)
    torch.testing.assert_close(scheduler.initial_latent(prior, seeded(5)), expected)


@pytest.mark.parametrize("settings", ALL_SAMPLERS, ids=str)
def test_every_draw_comes_from_the_callers_generator(settings):
    scheduler = FrameBridgeScheduler.from_backbone(BACKBONE, **settings)
    prior = latents(0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = run(scheduler, prior, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(run(scheduler, prior, seeded(1)), first)
    assert not torch.equal(run(scheduler, prior, seeded(2)), first)


@pytest.mark.parametrize("settings", ALL_SAMPLERS, ids=str)
def test_one_generator_per_sample_makes_samples_independent_of_their_batch(settings):
    scheduler = FrameBridgeScheduler.from_backbone(BACKBONE, **settings)
    prior = latents(0, count=3)
    together = run(scheduler, prior, [seeded(seed) for seed in (1, 2, 3)])
    for i, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(together[i : i + 1], run(scheduler, prior[i : i + 1], seeded(seed)))
    with pytest.raises(FrameBridgeError, match="2 generators for 3 samples"):
        run(scheduler, prior, [seeded(1), seeded(2)])


def test_without_a_generator_nothing_is_drawn():
    prior = latents(0)
    for settings in ({"sampler": "sde"}, {"sampler": "dbim", "eta": 0.1}):
        scheduler = FrameBridgeScheduler(**settings)
        scheduler.set_timesteps(4)
        with pytest.raises(FrameBridgeError, match="only from the caller's generator"):
            scheduler.initial_latent(prior)
        with pytest.raises(FrameBridgeError, match="only from the caller's generator"):
            scheduler.step(prior, 999, prior, prior)
    # Given its start, eta = 0 needs no noise at all.
    ode = FrameBridgeScheduler(sampler="dbim", order=2)
    assert torch.equal(run(ode, prior, None, start=prior + 0.2), run(ode, prior, None, start=prior + 0.2))


def test_dbim_with_eta_1_is_the_sde():
    prior = latents(0, dtype=torch.float64)
    for grid in GRIDS:
        sde = run(FrameBridgeScheduler(sampler="sde", grid=grid), prior, seeded(1))
        dbim = run(FrameBridgeScheduler(sampler="dbim", eta=1.0, grid=grid), prior, seeded(1))
        torch.testing.assert_close(sde, dbim, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", ALL_SAMPLERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_on_half_precision_is_computed_in_float32(settings, dtype):
    scheduler = FrameBridgeScheduler(**settings)
    z, output, prior = (latents(seed, dtype=dtype) for seed in (1, 2, 3))
    scheduler.set_timesteps(1000)
    results = []
    for tensors in ((output, z, prior), tuple(tensor.float() for tensor in (output, z, prior))):
        generator = seeded(4)
        for t in scheduler.timesteps[:2]:
            result = scheduler.step(tensors[0], t, tensors[1], tensors[2], generator)
        results.append(result)
    half, full = results
    for name in ("prev_sample", "pred_original_sample"):
        assert half[name].dtype == dtype
        assert torch.equal(half[name], full[name].to(dtype))


def test_the_last_step_returns_the_prediction():
    for settings in ALL_SAMPLERS:
        scheduler = FrameBridgeScheduler(**settings)
        scheduler.set_timesteps(3)
        z, output, prior = latents(1), latents(2), latents(3)
        for t in scheduler.timesteps:
            result = scheduler.step(output, t, z, prior, seeded(1))
        expected = predicted_z_0(scheduler, output, z, prior, scheduler.timesteps[-1])
        assert torch.equal(result.prev_sample, expected)
        as_tuple = scheduler.step(output, scheduler.timesteps[-1], z, prior, return_dict=False)
        assert torch.equal(as_tuple[0], expected)
        assert torch.equal(as_tuple[1], expected)


def test_order_2_remembers_one_step_of_one_run():
    prior = latents(0)
    scheduler = FrameBridgeScheduler(sampler="dbim", order=2, grid="lambda")
    first_order = FrameBridgeScheduler(sampler="dbim", grid="lambda")
    expected = run(scheduler, prior, seeded(1))
    assert not torch.equal(run(first_order, prior, seeded(1)), expected)
    # An abandoned run leaves nothing behind, with and without set_timesteps in between.
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:3]:
        scheduler.step(latents(9), t, prior, prior)
    assert torch.equal(run(scheduler, prior, seeded(1)), expected)
    z, output = latents(1), latents(2)
    first_order.set_timesteps(6)
    time = scheduler.timesteps[0]
    fresh = first_order.step(output, time, z, prior).prev_sample
    scheduler.step(latents(9), scheduler.timesteps[3], z, prior)
    assert torch.equal(scheduler.step(output, time, z, prior).prev_sample, fresh)


def test_a_time_off_the_grid_is_refused():
    scheduler = FrameBridgeScheduler()
    z = latents(0)
    with pytest.raises(FrameBridgeError, match="call set_timesteps"):
        scheduler.step(z, 999, z, z, seeded(0))
    with pytest.raises(FrameBridgeError, match="call set_timesteps before initial_latent"):
        scheduler.initial_latent(z, seeded(0))
    scheduler.set_timesteps(5)
    with pytest.raises(FrameBridgeError, match="time 998 is not on the grid of 5 steps"):
        scheduler.step(z, 998, z, z, seeded(0))


# The closed-form case: z_0 ~ N(1, .5^2), z_T = -.5, the exact prediction given to the scheduler as each of its targets


def sample_gaussian(scheduler, prior, generator, steps):
    scheduler.set_timesteps(steps)
    z = scheduler.initial_latent(prior, generator)
    start = z
    for t in scheduler.timesteps:
        k = scheduler.schedule.coefficients(t)
        gain = k.a * 0.25 / (k.a**2 * 0.25 + k.c**2)
        z_0 = 1 + gain * (z - k.b * prior - k.a)
        eps = (z - k.a * z_0 - k.b * prior) / k.c
        z = scheduler.step(scheduler.get_target(z_0, z, prior, eps, t), t, z, prior, generator).prev_sample
    return start, z


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("steps, known", [(8, 0.513), (20, 0.507), (50, 0.501)])
def test_order_2_on_the_closed_form_case(target, steps, known):
    scheduler = FrameBridgeScheduler(target=target, sampler="dbim", order=2, grid="lambda")
    prior = torch.full((2, 1), -0.5, dtype=torch.float64)
    start, end = sample_gaussian(scheduler, prior, seeded(0), steps)
    # Affine in the start's noise: two samples give its deviation exactly.
    noise = (start - prior) / scheduler.schedule.c[999]
    assert float(((end[1] - end[0]) / (noise[1] - noise[0])).abs()) == pytest.approx(known, abs=1e-3)
    mean = end[0] - (end[1] - end[0]) / (noise[1] - noise[0]) * noise[0]
    assert float(mean) == pytest.approx(1 - 1.5 * 0.0045, abs=3e-4)


def test_the_sde_on_the_closed_form_case():
    scheduler = FrameBridgeScheduler(sampler="sde", grid="linspace", start="clean_prior")
    prior = torch.full((100_000, 1), -0.5, dtype=torch.float64)
    _, end = sample_gaussian(scheduler, prior, seeded(0), 20)
    assert float(end.std()) == pytest.approx(0.364, abs=4e-3)
    assert float(end.mean()) == pytest.approx(1.0, abs=5e-3)


def test_loading_and_sampling_warn_about_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FrameBridgeScheduler.from_backbone(BACKBONE).save_pretrained(tmp_path)
        run(FrameBridgeScheduler.from_pretrained(tmp_path), latents(0), seeded(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", ALL_SAMPLERS, ids=str)
def test_sampling_follows_the_device(settings):
    scheduler = FrameBridgeScheduler.from_backbone(BACKBONE, **settings)
    prior = latents(0, dtype=torch.float64)
    expected = run(scheduler, prior, seeded(1))
    scheduler.set_timesteps(6, device="cuda")
    assert scheduler.timesteps.is_cuda
    z = scheduler.initial_latent(prior.cuda(), generator := seeded(1))
    for t in scheduler.timesteps:
        shown, time = scheduler.align(z, prior.cuda(), t)
        assert time.is_cuda
        output = torch.tanh(shown.float() + time.reshape(-1, 1, 1, 1, 1) / 500 - 1).to(z.dtype)
        z = scheduler.step(output, t, z, prior.cuda(), generator).prev_sample
    torch.testing.assert_close(z.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_the_settings_are_those_of_the_scheduler():
    fields = ProcessSection.model_fields | SamplerSection.model_fields
    parameters = dict(inspect.signature(FrameBridgeScheduler).parameters)
    own = {name: parameters.pop(name).default for name in ("backbone", "alignment", "num_train_timesteps")}
    assert own == {"backbone": None, "alignment": None, "num_train_timesteps": 1000}
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        name: field.default for name, field in fields.items()
    }
