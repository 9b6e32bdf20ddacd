"""Training in less than float32, on tiny models: what autocast does to the loss, bfloat16 weights to small updates.

    python benchmarks/precision.py --output benchmarks/results/precision.json

The first part trains tiny models of the four backbones in float32 and by `precision.autocast=bf16`, from several
seeds: runs of one seed see the same clips and the same noise. The second trains a tiny CogVideoX at a learning rate of
1e-5 with weights in float32 and in bfloat16, all from the same weights, and compares how far they came.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from framebridge_plugin.cli import main as run_command

REPOSITORY = Path(__file__).parents[1]
SIZE, FRAMES, CLIPS = 32, 9, 8
WINDOW = 25
"""Updates over which a loss is averaged."""
RATE, SMALL_RATE = 1e-3, 1e-5
BACKBONES = ("cogvideox", "latte", "wan", "ltx")
BFLOAT16 = ("precision.transformer_dtype=bf16",)
ROUNDED = (*BFLOAT16, "optimization.stochastic_rounding=true")
WEIGHTS = {
    "float32": (),
    "float32, autocast in bfloat16": ("precision.autocast=bf16",),
    "bfloat16": BFLOAT16,
    "bfloat16, stochastic rounding": ROUNDED,
    "bfloat16, stochastic rounding, 8-bit AdamW": (*ROUNDED, "optimization.optimizer=adamw-torchao-8bit"),
}
QUICK = ("float32", "bfloat16", "bfloat16, stochastic rounding")


def make_inputs(folder: Path) -> None:
    """Writes clips, and the tiny models, whose weights bfloat16 holds."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_ltx import make_tiny_ltx
    from tests.tiny_models import CLASS_NAMES, make_clips, make_tiny_cogvideox, make_tiny_latte
    from tests.tiny_wan import make_tiny_wan

    make_clips(folder / "clips", count=CLIPS, frames=FRAMES, size=SIZE)
    for number, name in enumerate(CLASS_NAMES):
        (folder / "classes" / name).mkdir(parents=True)
        for clip in range(number, CLIPS, len(CLASS_NAMES)):
            (folder / f"classes/{name}/{clip}.mp4").symlink_to(folder / f"clips/{clip}.mp4")
    make_tiny_cogvideox(folder / "cogvideox", sample_size=SIZE, dtype=torch.bfloat16)
    make_tiny_latte(folder / "latte", num_frames=FRAMES, size=SIZE)
    make_tiny_wan(folder / "wan")
    make_tiny_ltx(folder / "ltx")


class Runs:
    """Makes runs of the inputs in `folder`, one after the other."""

    def __init__(self, folder: Path, updates: int) -> None:
        self._folder, self._updates, self._number = folder, updates, 0

    def losses(self, backbone: str, seed: int, options: Sequence[str], rate: float = RATE) -> list[float]:
        """The loss of every update."""
        run = self._run(backbone, seed, options, rate)
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    def weights(self, backbone: str, seed: int, options: Sequence[str], rate: float) -> torch.Tensor:
        """All weights of the trained network, one after the other, in float64."""
        run = self._run(backbone, seed, options, rate)
        tensors = load_file(run / "model/transformer/diffusion_pytorch_model.safetensors")
        return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])

    def _run(self, backbone: str, seed: int, options: Sequence[str], rate: float) -> Path:
        self._number += 1
        output, recipe = self._folder / f"run{self._number}", self._folder / "recipe.yaml"
        store = self._folder / f"{backbone} {seed}"
        source = {"class_root": str(self._folder / "classes")} if backbone == "latte" else {}
        source = source or {"data_root": str(self._folder / "clips")}
        content: dict[str, Any] = {
            "model": {
                "model_name": f"{backbone}_bridge",
                "pretrained_model_name_or_path": str(self._folder / backbone),
            },
            "framebridge": {"data": {**source, "num_frames": FRAMES, "height": SIZE, "width": SIZE}},
            "training": {"training_type": "full-finetune", "batch_size": 4, "seed": seed},
            "optimization": {
                "train_steps": self._updates,
                "lr": rate,
                "lr_scheduler": "constant",
                "lr_warmup_steps": 0,
            },
            "precision": {"transformer_dtype": "fp32", "vae_dtype": "fp32"},
            "checkpoints": {"output_dir": str(output), "checkpointing_steps": self._updates},
        }
        if backbone != "latte":
            content["precision"]["text_encoder_dtype"] = "fp32"
        recipe.write_text(yaml.safe_dump(content))
        if not store.exists():
            _command("precompute", "--recipe", str(recipe), "--output", str(store))
        _command("train", "--recipe", str(recipe), f"framebridge.precomputed={store}", *options)
        return output


def _command(*arguments: str) -> None:
    if run_command(arguments) != 0:
        raise SystemExit(f"this failed: finetrainers {' '.join(arguments)}")


def compare_curves(runs: Runs, backbones: Sequence[str], seeds: int, window: int) -> dict[str, Any]:
    """The losses of each backbone, averaged over `window` updates, and what autocast does to them.

    Returns:
        For each backbone the curves by precision, [seeds, windows]; `noise`, the standard deviation between the seeds
        of float32, the mean over the windows; `difference`, autocast's loss less float32's of the same seed, the mean
        over the seeds, at the window where it is largest; and `of_noise`, the largest part of the deviation between
        seeds at a window that it is.
    """
    results = {}
    for backbone in backbones:
        curves = {}
        for name, options in {"float32": (), "autocast": ("precision.autocast=bf16",)}.items():
            losses = np.array([runs.losses(backbone, seed, options) for seed in range(1, seeds + 1)])
            curves[name] = losses.reshape(seeds, -1, window).mean(axis=2)
        difference = (curves["autocast"] - curves["float32"]).mean(axis=0)
        noise = curves["float32"].std(axis=0, ddof=1)
        results[backbone] = {
            "difference": float(difference[np.abs(difference).argmax()]),
            "noise": float(noise.mean()),
            "of_noise": float((np.abs(difference) / noise).max()),
            **{name: curve.round(6).tolist() for name, curve in curves.items()},
        }
    return results


def compare_small_updates(runs: Runs, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """How far the weights came at a learning rate of 1e-5, by how they are kept.

    Returns:
        For each way `moved`, the share of all weights that are not what they were, and `way_made`, the part of
        float32's way that they have come: 1 as far in its direction, 0 not at all.
    """
    # At such a rate float32 does not move.
    start = runs.weights("cogvideox", 1, (), 1e-30)
    results, whole = {}, torch.zeros_like(start)
    for name in names:
        way = runs.weights("cogvideox", 1, WEIGHTS[name], SMALL_RATE) - start
        whole = way if name == "float32" else whole
        results[name] = {
            "moved": (way != 0).double().mean().item(),
            "way_made": (way @ whole / (whole @ whole)).item(),
        }
    return results


def draw(curves: dict[str, Any], window: int, path: Path) -> None:
    """Draws the mean of each backbone's curves, and how far its seeds lie apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 2.8), layout="constrained")
    for axes, (backbone, result) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        for name, style in {"float32": "-", "autocast": "--"}.items():
            values = np.array(result[name])
            updates, mean, noise = (np.arange(values.shape[1]) + 0.5) * window, values.mean(axis=0), values.std(axis=0)
            (line,) = axes.plot(updates, mean, style, label=name)
            axes.fill_between(updates, mean - noise, mean + noise, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(title=backbone, xlabel="update", ylabel="loss")
        axes.legend()
    figure.savefig(path, dpi=100)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    updates, window, seeds = (results[name] for name in ("updates", "window", "seeds"))
    lines = [
        f"{updates} updates at a learning rate of {RATE:g}, {seeds} seeds, losses averaged over {window} updates:",
        "",
        "| network | loss, first and last, float32 | autocast | standard deviation between seeds | autocast less "
        "float32, at most | of the deviation, at most |",
        "|---|---|---|---|---|---|",
    ]
    for backbone, row in results["curves"].items():
        ends = [f"{curve[0]:.4f}, {curve[-1]:.4f}" for curve in (np.mean(row[n], 0) for n in ("float32", "autocast"))]
        numbers = f"{row['noise']:.4f} | {row['difference']:+.5f} | {row['of_noise']:.1%}"
        lines.append(f"| {backbone} | {' | '.join(ends)} | {numbers} |")
    lines += [
        "",
        f"{updates} updates at a learning rate of {SMALL_RATE:g}:",
        "",
        "| weights | weights that moved | of float32's way |",
        "|---|---|---|",
    ]
    for name, row in results["small_updates"].items():
        lines.append(f"| {name} | {row['moved']:.1%} | {row['way_made']:.1%} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs, prints the tables, and writes them and a picture beside the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two updates, from two seeds, of one backbone")
    parser.add_argument("--output", type=Path, help="JSON; tables and a picture are written beside it")
    arguments = parser.parse_args(argv)
    updates, window, seeds = (2, 1, 2) if arguments.quick else (300, WINDOW, 5)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("framebridge-plugin", "finetrainers", "torch", "torchao")},
        "updates": updates,
        "window": window,
        "seeds": seeds,
    }
    with tempfile.TemporaryDirectory(prefix="precision-") as name:
        make_inputs(Path(name))
        runs = Runs(Path(name), updates)
        results["curves"] = compare_curves(runs, BACKBONES[:1] if arguments.quick else BACKBONES, seeds, window)
        results["small_updates"] = compare_small_updates(runs, QUICK if arguments.quick else list(WEIGHTS))
    print(table(results))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(results) + "\n")
        draw(results["curves"], window, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
