"""The loss on held-out clips: what it is of, and that it means the same for bridge and diffusion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler

from framebridge_plugin.backbones.latte.networks import latte_backbone
from framebridge_plugin.bridge.schedule import BridgeCoefficients, as_float64, broadcast
from framebridge_plugin.bridge.targets import compute_target
from framebridge_plugin.data import BadFilePolicy, load_dataset_config
from framebridge_plugin.data.folders import index_heldout
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training import CogVideoXBridgeSpecification
from framebridge_plugin.training.heldout import RATIOS, HeldoutClips
from framebridge_plugin.training.objective import video_prediction
from tests.tiny_models import make_clips
from tests.training.bridge_runs import make_specification
from tests.training.conftest import SIZE
from tests.training.run_results import heldout, succeeded

STD = 0.5


def gaussian_network(
    target: str, prior: torch.Tensor, coefficients: Callable[[torch.Tensor], BridgeCoefficients]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What knows of the data that it is N(0, STD^2), and answers with its mean given the noisy latents.

    `coefficients` are those of the latents that it is shown, as its own time says them.
    """

    def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        k = coefficients(time.double())
        a, b, c = (broadcast(value, latents) for value in (k.a, k.b, k.c))
        y = latents - b * prior
        mean = a * STD**2 / (a**2 * STD**2 + c**2) * y
        return compute_target(target, mean, latents, prior, (y - a * mean) / c, k)

    return network


def plain(a: torch.Tensor, c: torch.Tensor) -> BridgeCoefficients:
    return BridgeCoefficients(a, torch.zeros_like(a), c, c)


def of_steps(backbone: Any) -> Callable[[torch.Tensor], BridgeCoefficients]:
    """Signal and noise of a variance-preserving backbone at fractional steps, its ratio linear between two of them."""
    alphas = backbone.alphas_cumprod.double()
    ratios = (alphas / (1 - alphas)).sqrt()

    def coefficients(time: torch.Tensor) -> BridgeCoefficients:
        below = time.long().clamp(max=len(ratios) - 2)
        ratio = torch.lerp(ratios[below], ratios[below + 1], time - below)
        return plain(ratio / (1 + ratio**2).sqrt(), 1 / (1 + ratio**2).sqrt())

    return coefficients


def of_levels(time: torch.Tensor) -> BridgeCoefficients:
    return plain(1 - time / 1000, time / 1000)


def cases() -> dict[str, tuple[Any, str, Any]]:
    """Scheduler, target, and coefficients by time, of every process that can be trained."""
    latte, flow = latte_backbone(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    cogvideox = CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False
    )
    scratch = FrameBridgeScheduler(target="eps_psi")
    return {
        "diffusion, noise": (latte, "noise", of_steps(latte)),
        "diffusion, v": (cogvideox, "v", of_steps(cogvideox)),
        "flow": (flow, "flow", of_levels),
        "bridge from scratch": (scratch, "eps_psi", scratch.schedule.coefficients),
        "bridge on diffusion": (
            FrameBridgeScheduler.from_backbone(cogvideox, target="v"),
            "v",
            of_steps(cogvideox),
        ),
        "bridge on flow": (FrameBridgeScheduler.from_backbone(flow, target="flow"), "flow", of_levels),
    }


def test_the_same_knowledge_of_the_data_has_the_same_error_in_every_process():
    """That of the conditional mean of a Gaussian, 1 / (1 / STD^2 + ratio^2)."""
    draw = torch.Generator().manual_seed(0)
    z_0, prior, noise = (torch.randn(len(RATIOS), 4096, generator=draw, dtype=torch.float64) for _ in range(3))
    ratio, z_0 = as_float64(torch.tensor(RATIOS)), STD * z_0
    errors = {}
    for name, (scheduler, target, coefficients) in cases().items():
        # What SNR alignment shows holds nothing of the prior.
        shown = torch.zeros_like(prior) if name.startswith("bridge on") else prior
        network = gaussian_network(target, shown, coefficients)
        errors[name] = (video_prediction(network, scheduler, z_0, prior, noise, ratio) - z_0).square().mean(1)
    expected = errors["bridge from scratch"]
    torch.testing.assert_close(expected, 1 / (STD**-2 + ratio**2), rtol=0.1, atol=0)
    for name, error in errors.items():
        torch.testing.assert_close(error, expected, rtol=1e-3, atol=0, msg=name)


# In a run


def test_it_is_the_mean_of_what_the_network_loses_at_its_times(train, model_folder, tmp_path):
    clips = make_clips(tmp_path / "heldout", count=3, frames=12, size=SIZE, captions=("first", "not this", "third"))
    measuring = (f"validation.heldout.data_root={clips}", "validation.heldout.clips=2")
    options = ("optimization.train_steps=2", "validation.validation_steps=1", "training.batch_size=3")
    assert succeeded(train(*options, *measuring, "framebridge.data.horizontal_flip=true"))
    assert list(heldout(tmp_path / "run")) == [0, 1, 2]

    content = json.loads((tmp_path / "run/dataset_config.json").read_text())
    trained_on = load_dataset_config(tmp_path / "run/dataset_config.json")
    index, settings, count = index_heldout(content, trained_on)
    assert count == 2
    assert (trained_on[0][1].horizontal_flip, settings.horizontal_flip) == (True, False)
    read = HeldoutClips(index, settings, count, BadFilePolicy())
    assert read.captions == {"first", "not this"}
    found = by_hand(make_specification(model_folder), read)
    measured = heldout(tmp_path / "run")[0]
    for name in ("loss", "x0_error"):
        assert measured[f"heldout/{name}"] == pytest.approx(sum(found[name]) / 20, rel=1e-5)
        bands = [measured[f"heldout/{name}_band_{band}"] for band in range(10)]
        means = [(a + b) / 2 for a, b in zip(found[name][:10], found[name][10:], strict=True)]
        assert bands == pytest.approx(means, rel=1e-5)
    relative = sum(found["x0_error"]) / 20 / (sum(found["still"]) / 2)
    assert measured["heldout/x0_error_relative"] == pytest.approx(relative, rel=1e-5)


def by_hand(specification: CogVideoXBridgeSpecification, read: HeldoutClips) -> dict[str, list[float]]:
    """What an untrained network loses, clip by clip and band by band."""
    models, parts = specification.load_diffusion_models(), specification.load_condition_models()
    vae = specification.load_latent_models()["vae"]
    found: dict[str, list[float]] = {"loss": [], "x0_error": [], "still": []}
    for number, clip in enumerate(read._clips):
        latents = specification.prepare_latents(
            vae, clip.video_FCHW, sample_seed=derive_seed("held-out draws", number)
        )
        conditions = specification.adapter.encode_caption(parts, clip.caption, dropped=False)
        z_0 = latents["latents"]
        found["still"].append((latents["image_latents"].expand_as(z_0) - z_0).square().mean().item())
        for band in range(10):
            draw = torch.Generator().manual_seed(derive_seed("held-out", number, band))
            bridge_index = 100 * band + int(100 * torch.rand((), generator=draw))
            given = (models["transformer"].eval(), models["scheduler"], conditions, latents)
            with torch.no_grad():
                output, target = specification.loss_terms(*given, torch.tensor([bridge_index]), draw)
                video = specification.predicted_video(*given, torch.tensor([RATIOS[band]]), draw)
            found["loss"].append((output - target).square().mean().item())
            found["x0_error"].append((video - z_0).square().mean().item())
    return found


# Its clips


def content_of(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"heldout": {"data_root": str(folder), **settings}}


def test_what_cannot_be_read_is_replaced_or_refused(clips_folder, tmp_path, caplog):
    data = {"data_root": str(clips_folder), "video_resolution_buckets": [[9, SIZE, SIZE]]}
    (tmp_path / "data.json").write_text(json.dumps({"datasets": [data]}))
    trained_on = load_dataset_config(tmp_path / "data.json")
    clips = make_clips(tmp_path / "clips", count=4, frames=9, size=SIZE, captions=("0", "1", "2", "3"))
    (tmp_path / "link").symlink_to(clips_folder)
    with pytest.raises(UsageError, match="validation.heldout: .* clips are trained on, such as .*link/"):
        index_heldout(content_of(tmp_path / "link"), trained_on)
    (tmp_path / "classes/Walk").mkdir(parents=True)
    shutil.copy(next(clips.glob("*0.mp4")), tmp_path / "classes/Walk/v_Walk_g01_c01.mp4")
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist/testlist01.txt").write_text("Walk/v_Walk_g03_c01.mp4\n")
    with pytest.raises(FrameBridgeError, match="validation.heldout: .*none of its videos is in .*/testlist01.txt"):
        index_heldout({"heldout": {"class_root": str(tmp_path / "classes"), "split": "test"}}, trained_on)
    first = next(clips.glob("*0.mp4"))
    first.write_bytes(b"")
    rows = index_heldout(content_of(clips, clips=2), trained_on)
    assert HeldoutClips(*rows, BadFilePolicy()).captions == {"1", "2"}
    assert f"{first}: the file is empty; the next clip takes its place" in caplog.text
    for wanted, policy in ((2, BadFilePolicy(policy="raise")), (4, BadFilePolicy())):
        with pytest.raises(FrameBridgeError, match="validation.heldout: cannot read the clip .*the file is empty"):
            HeldoutClips(*rows[:2], wanted, policy)
