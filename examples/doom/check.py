"""Measure whether a model's videos move as the action says, on levels that nothing was trained on.

    python examples/doom/check.py --run runs/doom_bridge --data doom-data --output runs/doom_bridge/check

It prints every number, and writes them (`check.json`) and the clips with the largest, the median and the smallest
error of each action, true above sampled (`check.png`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from framebridge_plugin import FrameBridgeLattePipeline
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.data import ClipSettings, index_dataset, read_clip
from framebridge_plugin.evaluation import measures
from framebridge_plugin.media import contact_sheet

BATCH = 16
GATE = {"shift_correlation": 0.5, "block_residual": 0.4}
"""Above and below which more is worth building on these videos."""


def load_heldout(data: Path, pipeline: FrameBridgeLattePipeline, per_class: int) -> tuple[list[str], torch.Tensor]:
    """Read held-out clips, evenly spread over the levels; their classes, and pixels [B, F, 3, H, W] in [0, 1]."""
    config = pipeline.transformer.config
    height, width = (size * pipeline.vae_scale_factor for size in (config.sample_height, config.sample_width))
    settings = ClipSettings(config.num_frames, height, width, window="start")
    rows: dict[str, list[str]] = {}
    for path, name in sorted(index_dataset({"class_root": str(data / "clips"), "split": "test"})):
        rows.setdefault(name, []).append(path)
    chosen = [(name, paths[k * len(paths) // per_class]) for name, paths in rows.items() for k in range(per_class)]
    clips = [read_clip(path, settings, torch.Generator()) for _, path in chosen]
    return [name for name, _ in chosen], torch.stack(clips) / 2 + 0.5


def sample(
    pipeline: FrameBridgeLattePipeline, images: torch.Tensor, classes: list[str], **call: object
) -> torch.Tensor:
    """Videos [B, F, 3, H, W] in [0, 1] from images [B, 3, H, W] and classes, each with its own seed."""
    videos = []
    for some in torch.arange(len(classes)).split(BATCH):
        generators = [torch.Generator().manual_seed(int(i)) for i in some]
        names = [classes[i] for i in some]
        result = pipeline(image=images[some], class_label=names, generator=generators, output_type="pt", **call)
        videos.append(result.frames.float().clamp(0, 1))
    return torch.cat(videos)


def measure(videos: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """Every number of videos and of the true clips."""
    return {
        "first_frame_psnr": measures.psnr(videos[:, 0], true[:, 0]).mean().item(),
        "error": 4 * (videos - true)[:, 1:].square().mean().item(),
        "motion": (measures.motion_amount(videos).mean() / measures.motion_amount(true).mean()).item(),
        "block_residual": measures.block_residual(videos).mean().item(),
        "shift_correlation": measures.shift_correlation(videos, true),
    }


def main() -> None:
    """Sample, measure, and write."""
    parser = argparse.ArgumentParser(description="Measure the example's videos.")
    parser.add_argument("--run", type=Path, required=True, help="run of recipes/doom_bridge.yaml, or a model")
    parser.add_argument("--data", type=Path, default=Path("doom-data"), help="what render.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--clips", type=int, default=20, help="of each action")
    parser.add_argument("--steps", type=int, default=20, help="calls of the network")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    pipeline = open_pipeline(str(arguments.run))
    pipeline.set_progress_bar_config(disable=True)
    classes, true = load_heldout(arguments.data, pipeline, arguments.clips)
    call = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    videos = sample(pipeline, true[:, 0], classes, **call)
    with torch.no_grad():
        flat = (true * 2 - 1).flatten(0, 1)
        decoded = [pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mode()).sample for part in flat.split(64)]
    rebuilt = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1).unflatten(0, true.shape[:2])
    still = true[:, :1].expand_as(true)
    found = {"sampled": measure(videos, true), "autoencoder": measure(rebuilt, true), "true": measure(true, true)}
    found["still image"] = measure(still, true)
    for name in dict.fromkeys(classes):
        some = torch.tensor([number for number, other in enumerate(classes) if other == name])
        found[name] = measure(videos[some], true[some])
    for name, numbers in found.items():
        print(f"{name:>14}: " + ", ".join(f"{what} {value:.3f}" for what, value in numbers.items()))
    reached = found["sampled"]["shift_correlation"] > GATE["shift_correlation"]
    reached = reached and found["sampled"]["block_residual"] < GATE["block_residual"]
    print(f"the gate (shift correlation above .5, block residual below .4) is {'' if reached else 'not '}reached")
    (arguments.output / "check.json").write_text(
        json.dumps({"protocol": call, "clips": len(classes), **found}, indent=1)
    )
    errors = (videos - true).square().flatten(1).mean(1)
    shown, labels = [], []
    for name in dict.fromkeys(classes):
        some = sorted(
            (number for number, other in enumerate(classes) if other == name), key=lambda k: errors[k].item()
        )
        for place, number in (("best", some[0]), ("median", some[len(some) // 2]), ("worst", some[-1])):
            shown += [true[number], videos[number]]
            labels += [f"{name}, true", f"{name}, sampled: {place} of {len(some)}"]
    contact_sheet(shown, arguments.output / "check.png", labels=labels)


if __name__ == "__main__":
    main()
