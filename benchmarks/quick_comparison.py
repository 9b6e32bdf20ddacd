"""The comparison on made clips, with a network of two blocks: in seconds with two arms, for a statement that can fail;
in minutes with all that need no neural prior (`--part made`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from bridge_vs_diffusion import REPOSITORY, Comparison, report
from comparison_parts import LATTE_ARMS, OF_BRIDGE, OF_DIFFUSION, STILL, Arm, Part
from comparison_report import runs_of
from diffusers import AutoencoderKL
from heldout_clips import figure, paired

from framebridge_plugin import FrameBridgeLattePipeline
from framebridge_plugin.media import write_video
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.schedulers import FrameBridgeScheduler

MOTIONS = {"Down": (1, 0), "Left": (0, -1), "Right": (0, 1), "Up": (-1, 0)}
FRAMES, SIZE, OF_TRAINING, HELDOUT = 8, 32, 32, 12
PICTURE = 8
"""Pixels between the knots of a scene."""
UPDATES, RATE, SEED, CALLS = 40, 3e-3, 1, 10
TWIN, BRIDGE = "diffusion, v", "bridge, v"


def scenes(count: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Smooth pictures that pass by: the class says which way; frames uint8 [F, 32, 32, 3]."""
    generator = np.random.default_rng(seed)
    knots = (SIZE + 2 * FRAMES) // PICTURE + 1
    for number in range(count):
        name, (down, right) = list(MOTIONS.items())[number % len(MOTIONS)]
        wide = generator.uniform(0, 255, (knots, knots, 3))
        for axis in (0, 1):
            places = np.arange((knots - 1) * PICTURE) / PICTURE
            low = places.astype(int)
            share = (places - low).reshape(-1, *[1] * (2 - axis))
            wide = np.take(wide, low, axis) * (1 - share) + np.take(wide, low + 1, axis) * share
        middle = (len(wide) - SIZE) // 2
        corners = [(middle + down * frame, middle + right * frame) for frame in range(FRAMES)]
        yield name, np.stack([wide[y : y + SIZE, x : x + SIZE] for y, x in corners]).round().astype(np.uint8)


def make_inputs(folder: Path, training: int = OF_TRAINING, heldout: int = HELDOUT) -> None:
    """Writes clips to train on and to hold out, and an untrained network beside the example's autoencoder."""
    for part, count, seed in (("train", training, 0), ("heldout", heldout, 1)):
        for number, (name, frames) in enumerate(scenes(count, seed)):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            write_video(frames, folder / part / name / f"{number:03d}.mp4", fps=8)
    vae = AutoencoderKL.from_pretrained(REPOSITORY / "examples/ucf101/vae")
    places = {"sample_height": SIZE // 4, "sample_width": SIZE // 4, "num_frames": FRAMES}
    classes = {"class_names": sorted(MOTIONS), "num_classes": len(MOTIONS)}
    channels = {"in_channels": 4, "out_channels": 4, "patch_size": 2}
    network = LatteTransformer(
        num_layers=2, num_attention_heads=4, attention_head_dim=16, stage="bridge", **channels, **places, **classes
    )
    network.initialize_weights(0)
    FrameBridgeLattePipeline(vae, network, FrameBridgeScheduler(target="eps_psi")).save_pretrained(folder / "base")


def quick_part(folder: Path) -> Part:
    """Two arms at one rate from one seed, and the still image."""
    arms = {
        TWIN: Arm(LATTE_ARMS[TWIN].overrides, {"ddim, z_0 clamped": OF_DIFFUSION["ddim, z_0 clamped"]}),
        BRIDGE: Arm(LATTE_ARMS[BRIDGE].overrides, {"sde": OF_BRIDGE["sde"]}),
        **STILL,
    }
    size = {
        "num_frames": FRAMES,
        "height": SIZE,
        "width": SIZE,
        "window_frames": FRAMES,
        "class_root": folder / "train",
    }
    overrides = [
        *(f"framebridge.data.{name}={value}" for name, value in size.items()),
        *(f"model.pretrained_model_name_or_path={folder / 'base'}", "model.vae_id=null", "dataset=null"),
        *("framebridge.latte_size=null", "framebridge.data.window=start", "framebridge.ema_decay=0.9"),
        *("optimization.lr_warmup_steps=10", "framebridge.caption_dropout=0"),
        "training.batch_size=8",
    ]
    return Part(
        str(REPOSITORY / "recipes/motion_bridge.yaml"),
        arms,
        {"class_root": str(folder / "heldout")},
        rates=(RATE,),
        updates=UPDATES,
        clips=HELDOUT,
        seeds=(SEED,),
        calls=(CALLS,),
        checkpoints=1,
        overrides=overrides,
    )


def made_part(folder: Path) -> Part:
    """Both twins, the bridge and the still image, on a few hundred of these clips."""
    if not (folder / "base").is_dir():
        make_inputs(folder, 400, 60)
    arms = {name: arm for name, arm in LATTE_ARMS.items() if "neural" not in name}
    changes = {"rates": (1e-3, 3e-3), "updates": 1000, "clips": 60, "seeds": (1, 2, 3), "checkpoints": 4}
    overrides = [*quick_part(folder).overrides, "framebridge.ema_decay=0.98", "optimization.lr_warmup_steps=50"]
    return replace(quick_part(folder), arms=arms, calls=(2, 4, 8, 20, 50), overrides=overrides, **changes)


def run_quickly(output: Path | None = None) -> int:
    """Makes the runs and the table in `output`; 1 if the bridge is not nearer to the true clips than its twin."""
    with tempfile.TemporaryDirectory(prefix="comparison-") as name:
        folder = Path(name)
        make_inputs(folder)
        comparison = Comparison(
            "quick", quick_part(folder), folder / "runs", output or folder / "results", in_process=True
        )
        for job in comparison.plan():
            comparison.run(job)
        report(comparison)
    (bridge,), (twin,) = runs_of(comparison, BRIDGE), runs_of(comparison, TWIN)
    found = paired(bridge["headline"]["errors"], twin["headline"]["errors"])
    holds = found["mean"] + 2 * found["standard_error"] < 0
    print(f"{'holds' if holds else 'does not hold'}: the bridge is nearer to the true clips: {figure(found)}")
    return 0 if holds else 1
