"""Quality against calls of the network, 1 to 100, for every sampler, order, grid of times and start of the bridge.

    python benchmarks/sampling.py --output benchmarks/results/sampling_closed_form
    python benchmarks/sampling.py --model runs/doom_bridge --recipe recipes/doom_bridge.yaml --data doom-data/clips \\
        --split test --output benchmarks/results/sampling_doom

Without a model the data are mixtures of Gaussians, for which the best prediction is known, so that nothing is measured
but the sampler: the distance to the true distribution (Wasserstein-1 along random directions, in standard deviations
of the data along each). With one the clips are held out, and every way starts from the same images and seeds: squared
error to the true clip, correlation with its motion, and how much of the change no motion explains. The goal is 8 calls
that are as good as the reference's 50, and 25 as good as its 1000.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reports import environment, environment_line, write_results

from framebridge_plugin.bridge import BridgeSchedule
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.recipe import resolve_recipe
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.settings.data import ClipSection

CALLS = (1, 2, 4, 8, 15, 25, 50, 100)
QUICK_CALLS = (2, 8, 50)
REFERENCE = {
    "reference: sde, trailing, clean prior": {"grid": "trailing", "start": "clean_prior"},
    "reference: sde, linspace, clean prior": {"grid": "linspace", "start": "clean_prior"},
}
WAYS: dict[str, dict[str, Any]] = {
    **REFERENCE,
    **{f"sde, {grid}": {"grid": grid} for grid in ("trailing", "linspace", "lambda")},
    **{
        f"dbim, order {order}, {grid}": {"sampler": "dbim", "order": order, "grid": grid}
        for order in (1, 2)
        for grid in ("trailing", "linspace", "lambda")
    },
    **{
        f"dbim, eta {eta}, order 2, lambda": {"sampler": "dbim", "eta": eta, "order": 2, "grid": "lambda"}
        for eta in (0.3, 0.5, 0.7, 1.0)
    },
}
MIDDLE = "dbim, order 2, tanh of lambda"
"""A grid that no setting offers, denser where the data are told from the noise: is it worth one?"""
WAYS[MIDDLE] = {"sampler": "dbim", "order": 2}
PLAIN: dict[str, Any] = {"sampler": "sde", "order": 1, "eta": None, "start": "booted"}
GOALS = ((8, 50), (25, 1000))
"""So many calls shall be as good as so many of the reference."""
SAMPLES, QUICK_SAMPLES, DIRECTIONS = 40_000, 1_000, 32


@dataclass(frozen=True)
class Mixture:
    """Videos [D] as a mixture of Gaussians, given an image whose repetition is `prior`.

    Attributes:
        weights: Of the modes, [K].
        means: Of the modes, [K, D].
        stds: Of the modes, [K].
        prior: z_T, [D].
    """

    weights: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor
    prior: torch.Tensor

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """True videos [count, D]."""
        modes = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[modes] + self.stds[modes, None] * noise

    def predict(self, z_t: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """E[z_0 | z_t] for z_t = a z_0 + b z_T + c eps."""
        variances = a**2 * self.stds**2 + c**2
        difference = (z_t - b * self.prior)[:, None] - a * self.means  # [N, K, D]
        logits = self.weights.log() - difference.square().sum(-1) / (2 * variances)
        shares = (logits - z_t.shape[1] / 2 * variances.log()).softmax(-1)
        gains = a * self.stds**2 / variances
        return (shares[..., None] * (self.means + gains[:, None] * difference)).sum(1)


def _mixture(weights: Sequence[float], means: Sequence[Any], stds: Sequence[float], prior: Sequence[float]) -> Mixture:
    return Mixture(*(torch.tensor(part, dtype=torch.float64) for part in (weights, means, stds, prior)))


def _motions() -> Mixture:
    """Eight frames that stand, drift up or drift down from the image, each with a noise of its own."""
    frames = [frame / 7 for frame in range(8)]
    means = [[0.5 + speed * frame for frame in frames] for speed in (-1.5, 0.0, 1.0)]
    return _mixture([0.3, 0.3, 0.4], means, [0.1, 0.1, 0.1], [0.5] * 8)


CASES = {
    "one Gaussian": _mixture([1.0], [[1.0]], [0.5], [-0.5]),
    "two narrow modes": _mixture([0.3, 0.7], [[-1.0], [1.0]], [0.1, 0.1], [0.0]),
    "three motions of 8 frames": _motions(),
}


def distance(some: torch.Tensor, others: torch.Tensor) -> float:
    """Mean Wasserstein-1 distance along directions, in standard deviations of the others."""
    size = some.shape[1]
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(size, DIRECTIONS if size > 1 else 1, dtype=torch.float64, generator=generator)
    directions /= directions.norm(dim=0)
    lines, true = (some @ directions).sort(dim=0).values, (others @ directions).sort(dim=0).values
    return ((lines - true).abs().mean(0) / true.std(0)).mean().item()


def times_of(way: str, calls: int, schedule: BridgeSchedule) -> dict[str, Any]:
    """What the scheduler is told of the times: how many, or which."""
    if way != MIDDLE:
        return {"num_inference_steps": calls}
    # Uniform in tanh(lambda / 3), lambda = log(a / c), from the last index to one a little before the data.
    ends = [torch.tanh(schedule.coefficients(index).log_ratio / 3) for index in (schedule.last_index, 4)]
    shares = torch.linspace(0, 1, calls, dtype=torch.float64)
    times = schedule.index_of_ratio(torch.exp(3 * torch.atanh(ends[0] + (ends[1] - ends[0]) * shares)))
    return {"timesteps": times.clamp(max=schedule.last_index).tolist()}


def sample_exactly(case: Mixture, way: str, calls: int, count: int) -> torch.Tensor:
    """Samples [count, D] by the exact prediction."""
    scheduler = FrameBridgeScheduler(target="data", alignment="none", **WAYS[way])
    generator = torch.Generator().manual_seed(2)
    prior = case.prior.expand(count, -1)
    scheduler.set_timesteps(**times_of(way, calls, scheduler.schedule))
    z = scheduler.initial_latent(prior, generator)
    for time in scheduler.timesteps:
        k = scheduler.schedule.coefficients(time.item())
        z = scheduler.step(case.predict(z, k.a, k.b, k.c), time, z, prior, generator).prev_sample
    return z


def counts_of(way: str, calls: Sequence[int]) -> Iterator[int]:
    """The numbers of calls that a way is measured at; the reference also at its own 1000."""
    yield from calls
    if way in REFERENCE and len(calls) > len(QUICK_CALLS):
        yield 1000


def closed_form(calls: Sequence[int], count: int) -> dict[str, Any]:
    """The distance of every way at each number of calls, by case, and what two true samples have between them."""
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        true = case.draw(count, torch.Generator().manual_seed(3))
        rows = {
            way: {
                str(number): distance(sample_exactly(case, way, number, count), true)
                for number in counts_of(way, calls)
            }
            for way in WAYS
        }
        again = distance(case.draw(count, torch.Generator().manual_seed(4)), true)
        results[name] = {"two true samples": again, "ways": rows}
    return results


def trained(pipeline: Any, heldout: Any, calls: Sequence[int], ways: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is measured of a trained model's samples, by way and number of calls."""
    from heldout_clips import figure, measured, sample

    config, rows = pipeline.scheduler.config, dict[str, dict[str, Any]]()
    for way in ways:
        pipeline.scheduler = FrameBridgeScheduler.from_config(config, **{**PLAIN, **WAYS[way]})
        for number in counts_of(way, calls):
            call = times_of(way, number, pipeline.scheduler.schedule)
            found = measured(sample(pipeline, heldout, guidance_scale=1.0, **call), heldout)
            rows.setdefault(way, {})[str(number)] = found
            print(f"{way}, {number} calls: error {figure(found['error'])}", flush=True)
    return rows


def goals(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each goal the ways that are as good at its calls as the reference's two at its own, the nearest first."""
    found = {}
    for few, many in GOALS:
        theirs = [rows[way][str(many)] for way in REFERENCE if str(many) in rows.get(way, {})]
        ours = {way: row[str(few)] for way, row in rows.items() if str(few) in row and way not in REFERENCE}
        if theirs and ours:
            ways = [way for way, cell in ours.items() if all(as_good(cell, other) for other in theirs)]
            found[f"{few} calls as good as {many} of the reference"] = {
                "ways": sorted(ways, key=lambda way: _value(ours[way])),
                "best": min(map(_value, ours.values())),
                "reference": min(map(_value, theirs)),
            }
    return found


def as_good(ours: Any, theirs: Any) -> bool:
    """No farther away; of clips, worse by no figure, two standard errors allowed: blur alone would lower the error."""
    if not isinstance(ours, dict):
        return ours <= theirs
    from heldout_clips import paired

    farther = paired(ours["errors"], theirs["errors"])
    if farther["mean"] > 2 * farther["standard_error"]:
        return False
    for name, sign in (("shift_correlation", -1), ("block_residual", 1)):
        # A still picture has no shifts, which are as good as shifts by chance.
        means, errors = ([cell[name][of] or 0.0 for cell in (ours, theirs)] for of in ("mean", "standard_error"))
        if sign * (means[0] - means[1]) > 2 * math.hypot(*errors):
            return False
    return True


def _value(cell: Any) -> float:
    """What is drawn: the distance, or the error to the true clip."""
    return cell["error"]["mean"] if isinstance(cell, dict) else cell


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [environment_line(results["environment"]), ""]
    for name, part in results["parts"].items():
        rows = part["ways"]
        counts = list(dict.fromkeys(number for row in rows.values() for number in row))
        lines += [
            f"## {name}",
            "",
            part["about"],
            "",
            f"| calls | {' | '.join(counts)} |",
            "|---" * (len(counts) + 1) + "|",
        ]
        for way, row in rows.items():
            cells = [_cell(row[number]) if number in row else "" for number in counts]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines += [""]
        for goal, found in part["goals"].items():
            said = "; ".join(found["ways"]) or "none"
            lines.append(f"- {goal} ({found['reference']:.4f}; the best of all ways {found['best']:.4f}): {said}")
        lines += [""]
    return "\n".join(lines)


def _cell(cell: Any) -> str:
    if not isinstance(cell, dict):
        return f"{cell:.3f}"
    error, motion, residual = (cell[name] for name in ("error", "shift_correlation", "block_residual"))
    spread = error["standard_error"]
    return f"{error['mean']:.4f} +- {spread:.4f}; {motion['mean'] or math.nan:.2f}; {residual['mean']:.2f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """One picture for each part: quality against calls."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    parts = results["parts"]
    figure = Figure(figsize=(5.2 * len(parts), 4.8), layout="constrained")
    colours = colormaps["tab20"]
    for axes, (name, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        for number, (way, row) in enumerate(part["ways"].items()):
            style = ":" if way in REFERENCE else "--" if way.startswith("sde") else "-"
            calls, values = [int(count) for count in row], [_value(cell) for cell in row.values()]
            axes.plot(calls, values, style, marker=".", label=way, color=colours(number))
        if "two true samples" in part:
            axes.axhline(part["two true samples"], color="grey", linewidth=0.8)
        axes.set(title=name, xlabel="calls of the network", ylabel=part["measure"], xscale="log", yscale="log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=100)


def closed_form_parts(quick: bool) -> dict[str, Any]:
    """The parts of the report on data whose best prediction is known."""
    count, parts = QUICK_SAMPLES if quick else SAMPLES, {}
    for name, found in closed_form(QUICK_CALLS if quick else CALLS, count).items():
        about = (
            f"Distance to {count} true samples in standard deviations, by {count} samples; two true samples have "
            f"{found['two true samples']:.4f} between them."
        )
        parts[name] = {**found, "about": about, "measure": "distance"}
    return parts


def trained_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part of the report on a trained model."""
    from heldout_clips import HeldOut

    pipeline = open_pipeline(str(arguments.model))
    pipeline.set_progress_bar_config(disable=True)
    recipe, _ = resolve_recipe(arguments.recipe)
    clip = ClipSection.model_fields.keys()
    data = {"class_root": str(arguments.data), **({"split": arguments.split} if arguments.split else {})}
    heldout = HeldOut.read(data, recipe.framebridge.data.model_dump(include=clip), arguments.clips)
    rows = trained(pipeline, heldout, arguments.calls, arguments.ways)
    about = (
        f"{len(heldout.conditions)} held-out clips, no guidance. Squared error to the true clip in [-1, 1] after the "
        "first frame, with its standard error; shift correlation; block residual."
    )
    return {"about": about, "measure": "squared error to the true clip", "ways": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write them and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="OUTPUT.json, OUTPUT.md and OUTPUT.png are written")
    parser.add_argument("--quick", action="store_true", help="without a model: few numbers of calls, few samples")
    parser.add_argument("--model", type=Path, help="run or model of a Latte bridge; default: the closed form")
    parser.add_argument("--data", type=Path, help="folder of class folders with the held-out clips")
    parser.add_argument("--split", help="of the folder's lists, if it has any: test")
    parser.add_argument("--recipe", help="recipe that the model was trained by, for how clips are cut")
    parser.add_argument("--clips", type=int, default=60, help="how many (default: 60)")
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help="numbers of calls")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    arguments = parser.parse_args(argv)
    if len({given is None for given in (arguments.model, arguments.data, arguments.recipe)}) > 1:
        parser.error("--model, --data and --recipe go together")
    about = environment(torch.device("cpu"))
    parts = (
        closed_form_parts(arguments.quick)
        if arguments.model is None
        else {str(arguments.model): trained_part(arguments)}
    )
    results: dict[str, Any] = {"environment": about, "parts": parts}
    for part in parts.values():
        part["goals"] = goals(part["ways"])
    write_results(arguments.output, results, table)
    if arguments.output is not None:
        draw(results, Path(f"{arguments.output}.png"))


if __name__ == "__main__":
    main()
