"""No step of sampling waits for the device that computes it.

The device is `meta`: what would read one of its values raises there, and what copies to it is counted here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from framebridge_plugin import (
    FrameBridgeCogVideoXPipeline,
    FrameBridgeLattePipeline,
    FrameBridgeLTXPipeline,
    FrameBridgeWanPipeline,
)
from framebridge_plugin.schedulers import FrameBridgeScheduler
from tests.backbones.latte_calls import picture, seeded
from tests.tiny_ltx import make_tiny_ltx
from tests.tiny_wan import make_tiny_wan

META = torch.device("meta")
_COPY, _TO = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default


class Waits(TorchDispatchMode):
    """Counts copies between devices that are waited for, in each step after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.counts and func in (_COPY, _TO):
            source = args[1] if func is _COPY else args[0]
            is_waited_for = not (kwargs or {}).get("non_blocking", func is _COPY and args[2:3] == (True,))
            self.counts[-1] += is_waited_for and source.device != result.device
        return result

    def step(self, *_: Any) -> dict[str, Any]:
        """The callback after every step."""
        self.counts.append(0)
        return {}


def waits_of(pipeline: Any, **call: Any) -> list[int]:
    """Those of a call with four steps; what it denoises, and the network, are moved to the device."""
    waits, denoise = Waits(), pipeline.denoise

    def move(value: Any) -> Any:
        return value.to(META) if isinstance(value, torch.Tensor) else value

    def denoise_there(*args: Any, **kwargs: Any) -> Any:
        pipeline.transformer.to(META)
        with waits:
            return denoise(*tree_map(move, args), **tree_map(move, kwargs))

    pipeline.denoise = denoise_there
    pipeline.set_progress_bar_config(disable=True)
    call |= {"image": picture(), "num_inference_steps": 4, "guidance_scale": 3.0, "generator": seeded()}
    latents = pipeline(**call, output_type="latent", callback_on_step_end=waits.step).frames
    assert latents.device == META
    return waits.counts


@pytest.fixture(scope="module")
def flow_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flow")
    return {"wan": make_tiny_wan(folder / "wan"), "ltx": make_tiny_ltx(folder / "ltx")}


@pytest.mark.parametrize(
    ("folder", "size", "settings"),
    [("bridge_folder", 64, {}), ("rotary_folder", 32, {"sampler": "dbim", "order": 2, "grid": "lambda"})],
)
def test_a_cogvideox_bridge(request, folder, size, settings):
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(request.getfixturevalue(folder))
    pipeline.scheduler = FrameBridgeScheduler.from_config(pipeline.scheduler.config, **settings)
    assert waits_of(pipeline, prompt="red", use_dynamic_cfg=True, height=size, width=size) == [0] * 4


def test_its_diffusion_baseline(baseline_folder):
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(baseline_folder)
    assert waits_of(pipeline, prompt="red", use_dynamic_cfg=True) == [0] * 4
    # diffusers copies the noise of its own stochastic sampler: one draw in each step, two after the first.
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(baseline_folder)
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    assert waits_of(pipeline, prompt="red") == [2, 2, 1, 0]


@pytest.mark.parametrize("objective", ["bridge", "diffusion"])
@pytest.mark.parametrize("backbone", ["wan", "ltx"])
def test_flow_matching(flow_folders, backbone, objective):
    pipeline_class: Any = {"wan": FrameBridgeWanPipeline, "ltx": FrameBridgeLTXPipeline}[backbone]
    own = FlowMatchEulerDiscreteScheduler.from_pretrained(flow_folders[backbone], subfolder="scheduler")
    scheduler = {"scheduler": own} if objective == "diffusion" else {}
    pipeline = pipeline_class.from_pretrained(flow_folders[backbone], **scheduler)
    size = {"height": 32, "width": 32, "num_frames": 9}
    assert waits_of(pipeline, prompt="red", use_dynamic_cfg=True, **size) == [0] * 4


@pytest.mark.parametrize("kind", ["bridge_neural_prior", "diffusion"])
def test_latte(latte_folders, kind):
    pipeline = FrameBridgeLattePipeline.from_pretrained(latte_folders[kind])
    assert waits_of(pipeline, class_label="up") == [0] * 4
