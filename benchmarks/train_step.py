"""How fast an update of training is: from the reference's arithmetic to this package's, one change at a time.

    python benchmarks/train_step.py --output benchmarks/results/train_step_cpu
    python benchmarks/train_step.py --device cuda --batch-size 8 --output train_step_cuda

Every row is one change in addition to all rows above it, on one network with random weights, and all rows take turns,
so that what else the machine does falls on all of them alike. On a CPU CogVideoX-2B and Latte-S/2 have their real
widths, with fewer layers and smaller clips, and one thread, whose own processor time is taken; on a GPU they are
whole. What they would compute at full size is counted with tensors that have a shape and no data. It writes
OUTPUT.json and OUTPUT.md; docs/speed.md says how to read them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import framebridge_plugin  # noqa: F401  (before diffusers: it repairs torchvision)

# isort: split
from random_models import make_specification, model_recipe
from reports import environment, environment_line, write_results
from step_loop import measure_loop
from step_measures import AddedBytes, counted, matmul_peak, seconds
from step_rows import Row, Stepper, Way, rows_of

from framebridge_plugin.backbones.encoding import decode_video, encode_video

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
"""How far the loss of the first update may be from the reference's, relative: in float32 only the order of sums."""
RECIPES = {"CogVideoX-2B": "cogvideox_bridge", "Latte-S/2": "ucf101_bridge"}
FULL_CLIPS = {"CogVideoX-2B": ((17, 256, 256), (49, 480, 720)), "Latte-S/2": ((16, 256, 256),)}
_SMALL_LAYERS = {
    "transformer": {"num_layers": 2},
    "text_encoder": {"num_layers": 1},
    "vae": {"layers_per_block": 1},
}
TINY_ENCODERS = {
    "text_encoder": {"num_layers": 1, "d_kv": 8, "d_ff": 64, "num_heads": 2},
    "vae": {"layers_per_block": 1, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2},
}
_TINY = {
    "transformer": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 16}
    | {"text_embed_dim": 32, "max_text_seq_length": 16},
    "text_encoder": TINY_ENCODERS["text_encoder"] | {"d_model": 32},
    "vae": TINY_ENCODERS["vae"],
}
SIZES: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpu": {"CogVideoX-2B": ((9, 64, 64), _SMALL_LAYERS), "Latte-S/2": ((8, 128, 128), {})},
    "quick": {
        "CogVideoX-2B": ((9, 64, 64), _TINY),
        "Latte-S/2": ((4, 64, 64), {"vae": _TINY["vae"]}, "framebridge.latte_size=Ti/8"),
    },
    "full": {name: (clips[0], {}) for name, clips in FULL_CLIPS.items()},
}
"""Clip, changes of the configs, and overrides of the recipe."""


def make_stepper(
    name: str, clip: tuple[int, int, int], changes: Any, *overrides: str, device: torch.device, batch_size: int = 1
) -> Stepper:
    """Makes a model and all that an update of it needs."""
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        recipe = model_recipe(RECIPES[name], Path(folder), clip, changes, *overrides)
        return Stepper(*make_specification(recipe), device, batch_size)


def measure_model(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures all rows of a model."""
    clip, changes, *overrides = SIZES[arguments.size][name]
    stepper = make_stepper(name, clip, changes, *overrides, device=device, batch_size=arguments.batch_size)
    tables = rows_of(bool(stepper.text))
    rows = [*tables["live"], *tables["precomputed"][1:]]
    measured = [_measure_once(stepper, row, device) for row in rows]
    times: list[list[float]] = [[] for _ in rows]
    peaks: list[dict[str, float]] = []
    for _ in range(arguments.rounds):
        peaks.append({key: matmul_peak(dtype, device, arguments.matmul) for key, dtype in PRECISIONS.items()})
        for row, row_times in zip(rows, times, strict=True):
            stepper.prepare(row.way)
            row_times.append(seconds(lambda way=row.way: stepper.update(way), device))
    for row, result, row_times in zip(rows, measured, times, strict=True):
        result |= _derived(row_times, times[0], result, measured[0], peaks)
        print(f"  {name}: {row.change}: {result['ratio']:.2f}x", flush=True)
    live = len(tables["live"])
    found = {"live": measured[:live], "precomputed": [measured[0], *measured[live:]]}
    return {
        "clip": "x".join(map(str, clip)),
        "batch_size": arguments.batch_size,
        "trained_parameters": sum(p.numel() for p in stepper.network.parameters() if p.requires_grad),
        "matmul_gflops": {key: _rounded(statistics.median(peak[key] for peak in peaks) / 1e9) for key in PRECISIONS},
        **found,
        "gains": {kind: gains(rows) for kind, rows in found.items()},
    }


def _measure_once(stepper: Stepper, row: Row, device: torch.device) -> dict[str, Any]:
    """What does not depend on the machine's load: the first loss, arithmetic, operations, memory."""
    stepper.prepare(row.way)
    stepper.start_anew()
    loss, flop, operations = counted(lambda: stepper.update(row.way))
    with AddedBytes(device) as added:
        stepper.update(row.way)
    return {
        "change": row.change,
        "gain": row.gain,
        "first_loss": loss.item(),
        "flop": flop,
        "operations": operations,
        "peak_gib": _rounded((stepper.held_bytes(row.way) + added.peak) / 2**30),
    }


def _derived(
    times: list[float], reference: list[float], result: dict, start: dict, peaks: list[dict[str, float]]
) -> dict[str, Any]:
    ratios = [first / own for first, own in zip(reference, times, strict=True)]
    deviation = abs(result["first_loss"] / start["first_loss"] - 1)
    ideal = [sum(count / peak[key] for key, count in result["flop"].items()) for peak in peaks]
    shares = [best / own for best, own in zip(ideal, times, strict=True)]
    return {
        "seconds": _rounded(statistics.median(times)),
        "ratio": _rounded(statistics.median(ratios)),
        "ratios": [_rounded(ratio) for ratio in ratios],
        "loss_deviation": float(f"{deviation:.1e}"),
        "of_matmul_peak": _rounded(statistics.median(shares)),
    }


def gains(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The product of the steps of each kind: together they are the last row's ratio."""
    products: dict[str, float] = {}
    for above, row in itertools.pairwise(rows):
        products[row["gain"]] = products.get(row["gain"], 1.0) * row["ratio"] / above["ratio"]
    return {kind: _rounded(product) for kind, product in products.items()}


def full_size_flop(name: str, clip: tuple[int, int, int]) -> dict[str, int]:
    """Floating-point operations of a sample at full size, by part and by update; nothing is computed."""
    stepper = make_stepper(name, clip, {}, device=torch.device("meta"))
    text, stored = bool(stepper.text), Way("stored", captions_known=True, attention="fused")

    def flop(step: Any) -> int:
        return sum(counted(step)[1].values())

    def update(**changes: Any) -> int:
        way = dataclasses.replace(stored, **{"recomputes": text, **changes})
        stepper.prepare(way)
        return flop(lambda: stepper.gradients(way))

    vae, video, found = stepper.parts["vae"], stepper.videos[0].unsqueeze(0), {}
    with torch.no_grad():
        if text:
            latents = stepper.stored[1]["latents"]
            found["encode a clip"] = flop(lambda: encode_video(vae, video))
            found["encode an image"] = flop(lambda: encode_video(vae, video[:, :1]))
            found["decode a clip"] = flop(lambda: decode_video(vae, latents))
            found["encode a caption"] = flop(lambda: stepper.encode_caption(""))
        found["network, forward"] = flop(lambda: stepper.loss(stored, *stepper.stored))
    found["update: the reference"] = update(encodes="reference", captions_known=False)
    found["update: live"] = update(encodes="needed", captions_known=False)
    if text:
        found["update: live, captions known"] = update(encodes="needed")
    found["update: precomputed"] = update()
    if text:
        found["update: precomputed, no recomputed activations"] = update(recomputes=False)
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def check(results: dict[str, Any]) -> list[str]:
    """Rows whose first loss is not the reference's."""
    wrong = []
    for name, model in results["models"].items():
        for row in (*model["live"], *model["precomputed"]):
            precision = "bf16" if "bf16" in row["flop"] else "fp32"
            if not row["loss_deviation"] <= TOLERANCES[precision]:
                wrong.append(f"{name}: {row['change']}: the first loss deviates by {row['loss_deviation']:.1e}")
    return wrong


# Tables


def as_table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [environment_line(results["environment"])]
    for name, model in results["models"].items():
        peaks = ", ".join(f"{value:g} GFLOP/s in {key}" for key, value in model["matmul_gflops"].items())
        lines += [
            *("", f"## {name}, {results['size']}", ""),
            f"Clips {model['clip']}, batch {model['batch_size']}, {model['trained_parameters'] / 1e6:.0f} M trained "
            f"parameters. A large matrix product reaches {peaks}.",
        ]
        for kind in ("live", "precomputed"):
            apart = ", ".join(f"{gain} {product:.2f}x" for gain, product in model["gains"][kind].items())
            lines += ["", *_rows_table(kind, model[kind]), "", f"Gains apart: {apart}."]
    for name, clips in results["full_size_flop"].items():
        lines += ["", f"| {name}, TFLOP of a sample | {' | '.join(clips)} |", "|---" * (1 + len(clips)) + "|"]
        for part in next(iter(clips.values())):
            lines.append(f"| {part} | {' | '.join(f'{found[part] / 1e12:.4g}' for found in clips.values())} |")
    lines += ["", "| our loop against a bare one | ms, ours | ms, bare | ratio |", "|---|---|---|---|"]
    for size, loop in results["loop"].items():
        lines.append(f"| {size} | {loop['ours_ms']:g} | {loop['bare_ms']:g} | {loop['ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def _rows_table(kind: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"| {kind}: each row adds a change | updates/s, ratio | peak memory, GiB | TFLOP (of it bf16) | operations "
        "| of the matmul peak | first loss off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        total = f"{sum(row['flop'].values()) / 1e12:.3g} ({row['flop'].get('bf16', 0) / 1e12:.3g})"
        off = f"{row['loss_deviation']:.0e}" if row["loss_deviation"] else "0"
        cells = (row["change"], f"{row['ratio']:.2f}", f"{row['peak_gib']:g}", total, row["operations"])
        cells += (f"{row['of_matmul_peak']:.0%}", off)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny widths, one round: whether it runs at all")
    parser.add_argument("--batch-size", type=int, default=1, help="clips of an update")
    parser.add_argument("--rounds", type=int, default=3, help="of all rows; medians are given")
    parser.add_argument("--output", type=Path, help="name of the results, without .json and .md")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("train_step.py: --device cuda: torch finds no GPU", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    arguments.size = "quick" if arguments.quick else {"cpu": "cpu", "cuda": "full"}[arguments.device]
    arguments.matmul = 256 if arguments.quick else {"cpu": 2048, "cuda": 8192}[arguments.device]
    arguments.rounds = 1 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    # The reference's precision on a GPU is float32 with TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    results: dict[str, Any] = {"environment": environment(device), "size": arguments.size}
    results["models"] = {name: measure_model(name, arguments, device) for name in RECIPES}
    full = {name: clips for name, clips in FULL_CLIPS.items() if not arguments.quick or name == "Latte-S/2"}
    results["full_size_flop"] = {
        name: {"x".join(map(str, clip)): full_size_flop(name, clip) for clip in clips} for name, clips in full.items()
    }
    tiny = ("tiny", (9, 64, 64), _TINY, 12 if arguments.quick else 60)
    wide = ("a block of CogVideoX-2B", (9, 64, 64), TINY_ENCODERS | {"transformer": {"num_layers": 1}}, 12)
    loops = [tiny] if arguments.quick else [tiny, wide]
    results["loop"] = {name: measure_loop(*loop) for name, *loop in loops}
    write_results(arguments.output, results, as_table)
    wrong = check(results)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
