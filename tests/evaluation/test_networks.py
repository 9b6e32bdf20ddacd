"""Trained networks: a torchscript called as FVD's I3D is, and those of wheels where they are installed."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.evaluation.measuring import frechet
from framebridge_plugin.evaluation.networks import load_fvd, load_network
from framebridge_plugin.evaluation.requirements import network_problem
from framebridge_plugin.settings.sampling import NETWORKS
from tests.evaluation.test_measures import moving, textures

CPU = torch.device("cpu")


class Detector(nn.Module):
    """Random features of short moving details, with the arguments of FVD's I3D."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(24, 3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        assert rescale, resize
        x = x / 127.5 - 1
        return F.conv3d(x, self.weight, stride=(1, 2, 2)).relu().flatten(2).mean(2)


def write_detector(path: Path) -> str:
    """Writes the detector as torchscript; returns its SHA-256."""
    torch.jit.script(Detector()).save(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    """24 videos that move, each in its own way: uint8 [24, F, 3, H, W]."""
    levels = torch.cat([moving(textures(8, seed=k), k + 1, 3 * k - 3) for k in range(3)])
    return (levels * 255).round().to(torch.uint8)


def spoilt(videos: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(videos.shape, generator=generator)
    small = F.avg_pool2d(videos.flatten(0, 1).float(), 4)
    blurred = F.interpolate(small, size=videos.shape[-2:], mode="bilinear").unflatten(0, videos.shape[:2])
    shuffled = videos[:, torch.randperm(videos.shape[1], generator=generator)]
    found = {"little noise": videos + 8 * noise, "noise": videos + 25 * noise, "blur": blurred}
    found |= {"frozen": videos[:, :1].expand_as(videos), "shuffled": shuffled}
    return {name: values.clamp(0, 255).round().to(torch.uint8) for name, values in found.items()}


def test_the_distance_rises_with_all_that_spoils_videos(videos, tmp_path):
    detector = load_fvd(str(tmp_path / "i3d.pt"), write_detector(tmp_path / "i3d.pt"), None, CPU)

    def features(some: torch.Tensor) -> torch.Tensor:
        return torch.stack([detector.of(video) for video in some])

    true = features(videos)
    same = frechet(true, true)
    assert same["mean"] == pytest.approx(0, abs=1e-6 * true.square().mean().item())
    found = {name: frechet(features(some), true) for name, some in spoilt(videos).items()}
    assert all(figure["mean"] > 3 * figure["standard_error"] for figure in found.values())
    assert found["noise"]["mean"] > found["little noise"]["mean"]


def test_features_are_those_of_the_first_frames(videos, tmp_path):
    sha256 = write_detector(tmp_path / "i3d.pt")
    found = load_fvd(str(tmp_path / "i3d.pt"), sha256.upper(), 4, CPU)
    assert torch.equal(found.of(videos[0]), found.of(videos[0, :4]))
    assert found.facts == {"sha256": sha256, "frames": 4}
    with pytest.raises(FrameBridgeError, match="fvd: cannot look at videos of 2 frames of 48x48: "):
        found.of(videos[0, :2])


def test_another_file_is_refused(tmp_path):
    path, digest = tmp_path / "i3d.pt", write_detector(tmp_path / "i3d.pt")
    for given, message in (
        ("0" * 64, f"--fvd-sha256: {path} has the SHA-256 {digest}, not 0000"),
        (None, f"say by --fvd-sha256 which file is meant; the SHA-256 of {path} is {digest}"),
    ):
        with pytest.raises(UsageError, match=message):
            load_fvd(str(path), given, None, CPU)
    path.write_bytes(b"no torchscript")
    with pytest.raises(FrameBridgeError, match=f"{path}: is no torchscript"):
        load_fvd(str(path), hashlib.sha256(b"no torchscript").hexdigest(), None, CPU)
    with pytest.raises(UsageError, match="no such file"):
        load_fvd(str(tmp_path / "nowhere.pt"), digest, None, CPU)


def test_a_file_of_the_hub(videos, tmp_path, monkeypatch):
    repository, commit = tmp_path / "hub/models--tiny--i3d", "0123456789" * 4
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    digest = write_detector(snapshot / "i3d.pt")
    (snapshot / "README.md").write_text("what it is")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_fvd("tiny/i3d", digest, None, CPU).of(videos[0]).shape == (24,)
    (snapshot / "other.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="should hold one .pt file, not i3d.pt, other.pt; name the file itself"):
        load_fvd("tiny/i3d", digest, None, CPU)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_wheels(videos, name):
    if (problem := network_problem(name)) is not None:
        assert problem.endswith("pip install 'framebridge-plugin[evaluate]'")
        pytest.skip(problem)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    network = load_network(name, CPU)
    now = (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    assert now == states
    assert not torch.are_deterministic_algorithms_enabled()
    assert importlib.util.find_spec("torchsummary") is None  # its stand-in is gone
    video, blurred = videos[0], spoilt(videos[:1])["blur"][0]
    if network.compares:
        alike, unlike = network.of(video, video).item(), network.of(blurred, video).item()
        assert unlike > alike + 0.01 if name == "stlpips" else unlike < alike - 10
    else:
        assert network.of(video).ndim == 1
        assert not torch.equal(network.of(video), network.of(blurred))
        assert torch.equal(network.of(video), network.of(video))
