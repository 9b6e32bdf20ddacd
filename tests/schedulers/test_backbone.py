"""A backbone's own process, against diffusers' own schedulers."""

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from framebridge_plugin import FrameBridgeScheduler
from framebridge_plugin.bridge import FlowMatchingAlignment
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers.backbone import backbone_loss_terms, build_backbone
from tests.reference_vectors import load_vectors, predicted_z_0

COGVIDEOX = load_vectors("cogvideox_scheduler")[1]["scheduler_config"]
WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
LTX = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
FLOW_BACKBONES = [
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchEulerDiscreteScheduler(**LTX),
    UniPCMultistepScheduler(**WAN),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
]


def settings_of(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def draw(count=3, shape=(2, 4, 3, 5, 6)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("backbone", FLOW_BACKBONES, ids=lambda backbone: type(backbone).__name__)
def test_a_flow_matching_backbone_is_known_by_its_config_and_reloads(backbone, tmp_path):
    scheduler = FrameBridgeScheduler.from_backbone(backbone, target="flow")
    assert scheduler.config.alignment == "flow_matching"
    scheduler.save_pretrained(tmp_path)
    loaded = FrameBridgeScheduler.from_pretrained(tmp_path)
    assert settings_of(loaded) == settings_of(scheduler)
    assert loaded.alignment == scheduler.alignment == FlowMatchingAlignment(scheduler.schedule, 1000)
    assert type(build_backbone(loaded.config.backbone)) is type(backbone)
    assert settings_of(build_backbone(loaded.config.backbone)) == settings_of(backbone)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("backbone_class", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("index", [0, 9.5, 500, 998.75])
def test_time_and_prediction_are_those_of_the_backbone_at_that_noise_level(index, backbone_class, shift):
    if backbone_class is FlowMatchEulerDiscreteScheduler:
        backbone = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        backbone = UniPCMultistepScheduler(**{**WAN, "flow_shift": shift})
    scheduler = FrameBridgeScheduler.from_backbone(backbone, target="flow")
    k = scheduler.schedule.coefficients(index)
    tau = float(k.c / (k.a + k.c))
    # The level that the backbone's shift turns into tau, and one step of the backbone from there to the data.
    backbone.set_timesteps(1, sigmas=np.array([tau / (shift - (shift - 1) * tau)]))
    assert float(backbone.sigmas[0]) == pytest.approx(tau, rel=1e-6)

    z_t, prior, output = draw()
    shown, time = scheduler.align(z_t, prior, index)
    assert time.dtype == torch.float32
    if backbone_class is FlowMatchEulerDiscreteScheduler:  # UniPC's own times are integers
        torch.testing.assert_close(time, backbone.timesteps.expand(2), rtol=1e-6, atol=0)
    assert time.tolist() == pytest.approx([1000 * tau] * 2, rel=1e-6)
    expected = backbone.step(output, backbone.timesteps[0], shown).prev_sample
    torch.testing.assert_close(predicted_z_0(scheduler, output, z_t, prior, index), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {**LTX, "shift": 3.0}], ids=str)
def test_the_loss_of_a_flow_matching_backbone(settings):
    backbone = FlowMatchEulerDiscreteScheduler(**settings)
    z_0, noise = draw(2, (4, 4, 3, 5, 6))
    index = torch.tensor([0.0, 250.0, 700.0, 999.0], dtype=torch.float64)
    noisy, time, target = backbone_loss_terms(backbone, z_0, noise, index)
    own_time = backbone.timesteps.flip(0)[index.long()]
    assert (time.dtype, time.shape) == (torch.float32, (4,))
    torch.testing.assert_close(time, own_time, rtol=1e-6, atol=0)
    torch.testing.assert_close(noisy, backbone.scale_noise(z_0, own_time, noise), rtol=1e-5, atol=1e-6)
    assert torch.equal(target, noise - z_0)
    # Between two indices the level is between theirs; half precision is only the storage.
    between = backbone_loss_terms(backbone, z_0, noise, index[1:2] + 0.5)[1]
    assert own_time[1] < between < backbone.timesteps.flip(0)[251]
    half = backbone_loss_terms(backbone, z_0.bfloat16(), noise.bfloat16(), index)
    wide = backbone_loss_terms(backbone, z_0.bfloat16().float(), noise.bfloat16().float(), index)
    assert torch.equal(half[0], wide[0].bfloat16())
    assert torch.equal(half[1], time)
    assert torch.equal(half[2], wide[2].bfloat16())


def test_unipc_and_euler_of_one_shift_have_one_loss():
    z_0, noise = draw(2)
    index = torch.tensor([3.25, 640.0])
    terms = [backbone_loss_terms(backbone, z_0, noise, index) for backbone in (FLOW_BACKBONES[0], FLOW_BACKBONES[2])]
    assert all(torch.equal(euler, unipc) for euler, unipc in zip(*terms, strict=True))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_the_loss_of_a_variance_preserving_backbone(prediction_type):
    backbone = CogVideoXDDIMScheduler(**{**COGVIDEOX, "prediction_type": prediction_type})
    z_0, noise = draw(2)
    index = torch.tensor([0.0, 999.0], dtype=torch.float64)
    noisy, time, target = backbone_loss_terms(backbone, z_0, noise, index)
    assert (time.dtype, time.tolist()) == (torch.int64, [0, 999])
    assert torch.equal(noisy, backbone.add_noise(z_0, noise, time))
    expected = noise if prediction_type == "epsilon" else backbone.get_velocity(z_0, noise, time)
    assert torch.equal(target, expected)


@pytest.mark.parametrize(
    "backbone",
    [
        UniPCMultistepScheduler(use_flow_sigmas=True),  # its prediction_type is "epsilon"
        CogVideoXDDIMScheduler(prediction_type="sample"),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ],
    ids=lambda backbone: type(backbone).__name__,
)
def test_a_loss_that_is_unknown_is_refused(backbone):
    with pytest.raises(FrameBridgeError, match=f"own loss of a {type(backbone).__name__}"):
        backbone_loss_terms(backbone, *draw(2), torch.tensor([5, 6]))
