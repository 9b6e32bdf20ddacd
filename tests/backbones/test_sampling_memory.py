"""What sampling takes of memory: of models that are here against what it took, of a published one by its configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from framebridge_plugin import FrameBridgeCogVideoXPipeline, FrameBridgeLattePipeline, FrameBridgeLTXPipeline
from framebridge_plugin.backbones.examination import examine
from framebridge_plugin.backbones.facts import find_backbone
from framebridge_plugin.backbones.memory import GIB, Allocations
from framebridge_plugin.backbones.published import write_published
from framebridge_plugin.backbones.sampling_memory import SamplingMemory, sampling_memory
from framebridge_plugin.cli import main
from tests.backbones.latte_calls import picture
from tests.tiny_ltx import make_tiny_ltx


@pytest.mark.parametrize("backbone", ["cogvideox", "ltx", "latte"])
def test_what_is_said_is_what_it_takes(request, tmp_path, backbone):
    call: dict[str, Any] = {"prompt": "red", "num_frames": 17, "height": 96, "width": 96}
    pipeline_class: Any = FrameBridgeCogVideoXPipeline
    if backbone == "cogvideox":
        folder = request.getfixturevalue("bridge_folder")
    elif backbone == "ltx":
        pipeline_class, folder = FrameBridgeLTXPipeline, make_tiny_ltx(tmp_path / "ltx")
    else:
        pipeline_class, call = FrameBridgeLattePipeline, {"class_label": "up"}
        folder = request.getfixturevalue("latte_folders")["bridge_neural_prior"]
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    denoise, counted = pipeline.denoise, Allocations()

    def count(*args: Any, **kwargs: Any) -> Any:
        with counted:
            return denoise(*args, **kwargs)

    pipeline.denoise = count
    three = {"image": [picture()] * 3, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    latents = pipeline(**call, **three).frames
    with Allocations() as decoding:
        pipeline.decode_latents(latents[:1], "off")

    clip = tuple(call.get(name) for name in ("num_frames", "height", "width"))
    memory = sampling_memory(examine(Path(folder)), clip, torch.float32)
    assert memory is not None
    parts = {name: getattr(pipeline, name) for name in memory.weights}
    assert memory.weights == {
        name: sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers())) for name, part in parts.items()
    }
    first, further = memory.network
    assert first + 5 * further == pytest.approx(counted.peak, rel=0.1)
    assert memory.decode(False) == pytest.approx(decoding.peak, rel=0.02)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> SamplingMemory:
    """A bridge on CogVideoX-2B at 49 x 480 x 720 in bfloat16."""
    folder = tmp_path_factory.mktemp("published")
    assert write_published("zai-org/CogVideoX-2b", folder)
    parts = ("transformer", "vae", "text_encoder")
    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in parts}
    configs["transformer"]["in_channels"] = 32
    return SamplingMemory(find_backbone("cogvideox_bridge"), configs, (49, 480, 720), torch.bfloat16)


def test_the_2b_model_at_its_own_size_on_a_card_of_16_gb(large):
    assert large.is_tiled("auto")
    whole, offloaded = (large.needed(2, offload, True) for offload in ("none", "model"))
    # Its text encoder alone has 4.76 billion weights.
    assert whole - offloaded > 2 * 4.7e9 - large.decode(True)
    assert offloaded < 14e9 < whole
    assert large.needed(1, "sequential", True) < large.needed(1, "group", True) < offloaded
    assert large.decode(False) / GIB == pytest.approx(14.7, rel=0.02)
    assert large.decode(True) / GIB == pytest.approx(3.8, rel=0.02)
    assert large.inputs_in(14e9, "model") > 8
    assert large.inputs_in(4e9, "model") == 1


def test_what_does_not_fit_is_said_before_it_is_loaded(bridge_folder, tmp_path, capsys):
    picture().save(tmp_path / "0.png")
    given = ["--model", str(bridge_folder), "--image", str(tmp_path / "0.png"), "--prompt=red"]
    size = ["--height=960", "--width=1600", "--num-frames=80001", f"--output={tmp_path / 'video.mp4'}"]
    assert main(["sample", *given, *size, "--device=cpu"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "80001 frames of 960 x 1600 need " in said
    assert "take fewer or smaller frames (--num-frames, --height, --width)" in said
    size = ["--height=100000", "--width=100000", "--num-frames=9", f"--output={tmp_path / 'video.mp4'}"]
    assert main(["sample", *given, *size, "--device=cpu"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "videos of this size cannot be computed; take fewer or smaller frames" in said
