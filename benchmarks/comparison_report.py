"""The table and the picture of benchmarks/bridge_vs_diffusion.py, made of its result files."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from heldout_clips import figure, paired

FIGURES = ("error", "shift_correlation", "block_residual", "motion_distance", "motion_ratio", "first_psnr")
HEADS = ("squared error", "shift correlation", "block residual", "FD TransNetV2", "motion", "first frame, dB")
LEARNED = 0.2
"""Shift correlation from which on videos move as the true clips do, if little."""
ALONG = ("error", "shift_correlation", "block_residual")


def table(comparison: Any) -> str:
    """The results in Markdown, with what is missing."""
    lines = [f"# {comparison.name}", "", *_about(comparison), "", *_headline(comparison), ""]
    for section in (_pairs, _rates, _calls, _updates):
        lines += [*section(comparison), ""]
    return "\n".join(lines)


def runs_of(comparison: Any, arm: str) -> list[dict[str, Any]]:
    """The results of an arm at its best rate, by seed."""
    if not any(job.arm == arm and job.seed == comparison.part.seeds[0] for job in comparison.found):
        return []
    rate = comparison.best(arm).rate
    return [found for job, found in sorted(comparison.found.items(), key=str) if (job.arm, job.rate) == (arm, rate)]


def _of_seeds(values: Sequence[float | None], digits: int = 4) -> str:
    """Mean and standard deviation over runs."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" +- {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def _about(comparison: Any) -> Iterator[str]:
    part = comparison.part
    done = [found for arm in part.arms for found in runs_of(comparison, arm)]
    protocol = next((found["protocol"] for found in done if "headline_calls" in found["protocol"]), None)
    rates = ", ".join(f"{rate:g}" for rate in part.rates)
    yield f"{part.updates} updates of {Path(part.recipe).stem} each; learning rates {rates} from seed {part.seeds[0]},"
    yield f"the one with the lowest error from {len(part.seeds)} seeds."
    if protocol is not None:
        yield (
            f"{protocol['clips']} held-out clips, {protocol['headline_calls']} calls of the network without guidance, "
            "each arm by the sampler with the lowest error. Mean and standard deviation over seeds."
        )


def _headline(comparison: Any) -> Iterator[str]:
    rates, correlations = comparison.part.rates, []
    yield f"| arm | learning rate | runs | sampler | {' | '.join(HEADS)} |"
    yield "|---" * (len(HEADS) + 4) + "|"
    for name, arm in comparison.part.arms.items():
        runs = runs_of(comparison, name)
        wanted = len(comparison.part.seeds) if arm.is_trained else 1
        if not runs:
            yield f"| {name} | missing |{' |' * (len(HEADS) + 2)}"
            continue
        samplers = " / ".join(dict.fromkeys(run["protocol"].get("headline_sampler", "-") for run in runs))
        cells = [_of_seeds([run["headline"][key].get("mean") for run in runs]) for key in FIGURES]
        rate = f"{runs[0]['rate']:g}" if arm.is_trained else "-"
        if len(comparison.part.rates) > 1 and runs[0]["rate"] in (min(rates), max(rates)):
            rate += " (the end of those tried)"
        yield f"| {name} | {rate} | {len(runs)} of {wanted} | {samplers} | {' | '.join(cells)} |"
        correlations += [run["headline"]["shift_correlation"]["mean"] or 0 for run in runs]
    if correlations and max(correlations) < LEARNED:
        yield ""
        yield (
            f"No run has a shift correlation of {LEARNED}: none has learned how the clips move, and where none has, "
            "the squared error is the lower the blurrier the videos are."
        )


def _pairs(comparison: Any) -> Iterator[str]:
    """Each arm less each twin, or less the first arm where there is none, clip by clip."""
    arms = comparison.part.arms
    twins = [name for name in arms if name.startswith("diffusion")] or list(arms)[:1]
    yield "Squared error less that of the twin, clip by clip: mean and standard error over clips, seed by seed; in how"
    yield "many clips it is lower."
    yield ""
    yield f"| arm | {' | '.join(f'less {twin}' for twin in twins)} |"
    yield "|---" * (len(twins) + 1) + "|"
    for name, arm in arms.items():
        runs = {run["seed"]: run for run in runs_of(comparison, name)}
        if name in twins or not runs:
            continue
        cells = []
        for twin in twins:
            differences = []
            for theirs in runs_of(comparison, twin):
                ours = runs.get(theirs["seed"]) if arm.is_trained else next(iter(runs.values()))
                if ours is not None:
                    found = paired(ours["headline"]["errors"], theirs["headline"]["errors"])
                    differences.append(f"{figure(found)} ({found['lower']} of {found['of']})")
            cells.append("; ".join(differences) or "missing")
        yield f"| {name} | {' | '.join(cells)} |"


def _rates(comparison: Any) -> Iterator[str]:
    rates, seed = comparison.part.rates, comparison.part.seeds[0]
    found = {(job.arm, job.rate): run for job, run in comparison.found.items() if job.seed == seed}
    yield f"By learning rate, seed {seed}: squared error, shift correlation, block residual."
    yield ""
    yield f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |"
    yield "|---" * (len(rates) + 1) + "|"
    for name, arm in comparison.part.arms.items():
        if arm.is_trained:
            runs = [found.get((name, rate)) for rate in rates]
            cells = ["missing" if run is None else _in_short(run["headline"]) for run in runs]
            yield f"| {name} | {' | '.join(cells)} |"


def _in_short(found: dict[str, Any]) -> str:
    return ", ".join(_of_seeds([found[name]["mean"]], 3) for name in ALONG)


def _calls(comparison: Any) -> Iterator[str]:
    calls = [str(count) for count in comparison.part.calls]
    yield "By calls of the network: squared error, shift correlation (mean over seeds)."
    yield ""
    yield f"| arm | sampler | {' | '.join(calls)} |"
    yield "|---" * (len(calls) + 2) + "|"
    for name, arm in comparison.part.arms.items():
        runs = runs_of(comparison, name)
        for sampler in arm.samplers if runs else ():
            cells = []
            for count in calls:
                rows = [run["calls"][sampler][count] for run in runs if count in run["calls"].get(sampler, ())]
                values = [_of_seeds([row[key]["mean"] for row in rows]) for key in ALONG[:2]]
                cells.append(", ".join(value.partition(" +- ")[0] for value in values) if rows else "")
            yield f"| {name} | {sampler} | {' | '.join(cells)} |"


def _updates(comparison: Any) -> Iterator[str]:
    yield "Along the updates, on half of the clips: squared error, shift correlation, block residual."
    yield ""
    steps = sorted({int(step) for run in comparison.found.values() for step in run.get("updates", ())})
    yield f"| arm | {' | '.join(map(str, steps))} |"
    yield "|---" * (len(steps) + 1) + "|"
    for name in comparison.part.arms:
        runs = [run for run in runs_of(comparison, name) if run.get("updates")]
        cells = []
        for step in steps if runs else ():
            rows = [run["updates"][str(step)] for run in runs if str(step) in run["updates"]]
            cells.append(", ".join(_of_seeds([row[key]["mean"] for row in rows], 3) for key in ALONG))
        if runs:
            yield f"| {name} | {' | '.join(cells)} |"


def draw(comparison: Any, path: Path) -> None:
    """Error and shift correlation against calls, and along the updates; each arm by its best sampler."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 7), layout="constrained")
    grid = picture.subplots(2, 2)
    for number, name in enumerate(comparison.part.arms):
        runs, colour = runs_of(comparison, name), f"C{number}"
        for row, key in zip(grid, ALONG[:2], strict=True):
            for axes, series in zip(row, (_by_calls(runs), [run.get("updates", {}) for run in runs]), strict=True):
                curves = [found for found in series if found]
                for place, curve in enumerate(curves):
                    values = [float("nan") if row[key]["mean"] is None else row[key]["mean"] for row in curve.values()]
                    label = name if place == 0 else None
                    axes.plot([int(count) for count in curve], values, ".-", color=colour, label=label, alpha=0.8)
                if not curves and runs and (value := runs[0]["headline"][key]["mean"]) is not None:
                    axes.axhline(value, color=colour, linestyle=":", label=name)
            row[0].set(ylabel=key.replace("_", " "), xlabel="calls of the network", xscale="log")
            row[1].set(xlabel="updates")
    picture.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    picture.savefig(path, dpi=90)


def _by_calls(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run["calls"][run["protocol"]["headline_sampler"]] if "calls" in run else {} for run in runs]
