"""The proof that the bridge shows a pretrained flow-matching network exactly what it was trained on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    ModelMixin,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)

from framebridge_plugin.backbones.ltx.adapter import call_ltx
from framebridge_plugin.backbones.wan.adapter import call_wan
from framebridge_plugin.bridge import FlowMatchingAlignment, NoAlignment
from framebridge_plugin.models.widening import widen_input_channels
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training.objective import ObjectiveSettings, bridge_prediction, build_scheduler
from tests.tiny_ltx import make_ltx_backbone, make_tiny_ltx_network
from tests.tiny_models import LATENT_CHANNELS
from tests.tiny_wan import make_tiny_wan_network, make_wan_backbone

# Whole, since UniPC's are; the bridge reaches those from 6 to 991.
TIMES = (20, 50, 100, 200, 300, 400, 500, 600, 700, 750, 800, 850, 900, 950, 966, 990)
Backbone = FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler
ROPE = (0.3, 32.0, 32.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pretrained network, the same one widened, and a batch of data, [B, T, C, h, w]."""

    plain: ModelMixin
    widened: ModelMixin
    z_0: torch.Tensor
    eps: torch.Tensor
    image_latents: torch.Tensor
    text: torch.Tensor

    def network(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        latents = torch.cat([latents, self.image_latents], dim=2)
        if isinstance(self.widened, WanTransformer3DModel):
            return call_wan(self.widened, latents, time, self.text)
        return call_ltx(self.widened, latents, time, self.text, torch.ones(3, 8), ROPE)

    def plain_network(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Of the network as it was, by diffusers alone; [B, C, T, h, w]."""
        if isinstance(self.plain, WanTransformer3DModel):
            return self.plain(latents, time, self.text, return_dict=False)[0]
        tokens = LTXPipeline._pack_latents(latents)
        shape = dict(zip(("num_frames", "height", "width"), latents.shape[2:], strict=True))
        output = self.plain(tokens, self.text, time, torch.ones(3, 8), rope_interpolation_scale=ROPE, **shape).sample
        return LTXPipeline._unpack_latents(output, *shape.values())

    def prior(self, scale: float) -> torch.Tensor:
        return scale * torch.randn(self.z_0.shape, generator=torch.Generator().manual_seed(9))


def make_case(make_network: Any, projection: str) -> Case:
    generator = torch.Generator().manual_seed(1)
    latents = (3, 3, LATENT_CHANNELS, 8, 8)
    return Case(
        plain=make_network().requires_grad_(False),
        widened=widen_input_channels(make_network().requires_grad_(False), projection),
        z_0=torch.randn(latents, generator=generator),
        eps=torch.randn(latents, generator=generator),
        image_latents=torch.randn(latents, generator=generator),
        text=torch.randn(3, 8, 16, generator=generator),
    )


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {
        "wan": make_case(make_tiny_wan_network, "patch_embedding"),
        "ltx": make_case(make_tiny_ltx_network, "proj_in"),
    }


def own_loss(case: Case, backbone: Backbone, time: int) -> float:
    """The pretrained model's own loss, with nothing but diffusers and the network as it was."""
    z_0, eps = case.z_0.transpose(1, 2), case.eps.transpose(1, 2)
    tau = (time + 1e-7) / 1000  # UniPC cuts its times off to whole ones
    if backbone.config.get("use_dynamic_shifting"):
        # Without a shift (log 1) that the number of tokens makes, and of two levels, as the last is stretched to .1.
        backbone.set_timesteps(sigmas=[tau, 0.1], mu=0.0)
    else:
        # The level that the scheduler's shift turns into tau.
        backbone.set_timesteps(1, sigmas=np.array([tau / (3.0 - 2.0 * tau)]))
    times = backbone.timesteps[:1].expand(len(z_0))
    if isinstance(backbone, UniPCMultistepScheduler):
        noisy = backbone.add_noise(z_0, eps, times)
    else:
        noisy = backbone.scale_noise(z_0, times, eps)
    return torch.nn.functional.mse_loss(case.plain_network(noisy, times), eps - z_0).item()


def bridge_loss(case: Case, scheduler: FrameBridgeScheduler, time: int, prior: torch.Tensor) -> float:
    """The bridge loss of the widened model at the real-valued index that the time belongs to."""
    ratio = torch.tensor((1000 - time) / time, dtype=torch.float64)
    index = scheduler.schedule.index_of_ratio(ratio).expand(len(case.z_0))
    prediction, target = bridge_prediction(case.network, scheduler, case.z_0, prior, case.eps, index)
    return torch.nn.functional.mse_loss(prediction, target).item()


@pytest.mark.parametrize("prior_scale", [0.01, 50.0], ids=["prior-near-zero", "prior-of-std-50"])
@pytest.mark.parametrize(
    ("name", "backbone"),
    [("wan", make_wan_backbone()), ("wan", make_wan_backbone(unipc=True)), ("ltx", make_ltx_backbone())],
    ids=["wan-euler", "wan-unipc", "ltx"],
)
def test_the_bridge_loss_of_a_pretrained_model_is_its_own_loss(cases, name, backbone, prior_scale):
    case, scheduler = cases[name], build_scheduler(backbone, ObjectiveSettings(target="flow"))
    expected = [own_loss(case, backbone, time) for time in TIMES]
    assert len({round(loss, 3) for loss in expected}) > 10  # the loss does depend on the time
    found = [bridge_loss(case, scheduler, time, case.prior(prior_scale)) for time in TIMES]
    assert found == pytest.approx(expected, rel=1e-6)


class WithoutThePrior(FlowMatchingAlignment):
    """The alignment with its -b z_T left out."""

    def latent(self, z_t, z_T, index):
        return super().latent(z_t, torch.zeros_like(z_T), index)


class RoundedTime(FlowMatchingAlignment):
    """The time in bfloat16."""

    def timestep(self, index):
        return super().timestep(index).bfloat16().float()


@pytest.mark.parametrize("broken", [WithoutThePrior, RoundedTime, NoAlignment, "target"])
def test_the_proof_fails_where_something_is_wrong(cases, broken):
    case, backbone = cases["wan"], make_wan_backbone()
    target = "v" if broken == "target" else "flow"
    scheduler = build_scheduler(backbone, ObjectiveSettings(target=target))
    if broken is NoAlignment:
        scheduler.alignment = NoAlignment()
    elif broken != "target":
        scheduler.alignment = broken(scheduler.alignment.schedule, scheduler.alignment.time_scale)
    for time in (301, 505, 703, 945, 965):
        expected = pytest.approx(own_loss(case, backbone, time), rel=1e-6)
        assert bridge_loss(case, scheduler, time, case.prior(1.0)) != expected
