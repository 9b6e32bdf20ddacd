"""The bridge against its diffusion twin: same network, data, updates, seeds and conditioning, by the real commands.

    python benchmarks/bridge_vs_diffusion.py --part latte --folder runs/comparison --minutes 100
    python benchmarks/bridge_vs_diffusion.py --part latte --table
    python benchmarks/bridge_vs_diffusion.py --quick

Part `latte` trains from scratch on the clips of examples/doom, `choices` the bridge with one thing changed at a time
(what is predicted, the schedule, where sampling starts); part `text` fine-tunes a text-to-video diffusion model
to image-to-video on the clips of the quickstart, and `flow` a flow-matching one (which the override
model.pretrained_model_name_or_path names); part `made` is `latte` on small made clips, in minutes. Every arm runs at
three learning rates from one seed, and from two more at the best of the three. A run that time ends is taken up by the
same command; each that is done writes its own file into benchmarks/results/bridge_vs_diffusion, and the table, which
says what is missing, is made of these files. The quality of an arm is that of the best of its samplers, so that the
twin has what it can have: DDIM, DDIM with z_0 clamped, DPM-Solver++ of order 2. No guidance anywhere.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from comparison_parts import PARTS, Part
from comparison_report import draw, table
from heldout_clips import HeldOut, figure, measured, motion_distance, sample
from reports import environment

from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.recipe import Recipe, resolve_recipe
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.settings.data import ClipSection
from framebridge_plugin.training.precomputation.store import read_manifest

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks/results/bridge_vs_diffusion"
HEADLINE_CALLS = 20
PATIENCE = 300
"""Seconds that a run has to save itself."""


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file and of its folder."""
        words = "-".join(self.arm.replace(",", "").lower().split())
        return f"{words}-{self.rate:g}-{self.seed}" if self.rate else words


class Comparison:
    """A part, its runs in a folder, and its result files in another."""

    def __init__(
        self,
        name: str,
        part: Part,
        folder: Path,
        results: Path,
        overrides: Sequence[str] = (),
        in_process: bool = False,
    ) -> None:
        self.name, self.part, self.folder, self.results = name, part, folder, results
        self.overrides, self._in_process = [*part.overrides, *overrides], in_process
        self.found = self.read()

    def read(self) -> dict[Job, dict[str, Any]]:
        """The results that there are."""
        found = {}
        for path in sorted(self.results.glob(f"{self.name}-*.json")):
            result = json.loads(path.read_text())
            found[Job(result["arm"], result["rate"], result["seed"])] = result
        return found

    def plan(self) -> Iterator[Job]:
        """The next run until all are done: of every arm the three rates from one seed, then the best from others."""
        while (job := self._next()) is not None:
            yield job

    def _next(self) -> Job | None:
        first, *others = self.part.seeds
        arms = self.part.arms
        rates = {name: self.part.rates if arm.is_trained else (0.0,) for name, arm in arms.items()}
        for name in arms:
            for rate in rates[name]:
                if (job := Job(name, rate, first)) not in self.found:
                    return job
        for seed in others:
            for name in arms:
                if arms[name].is_trained and (job := Job(name, self.best(name).rate, seed)) not in self.found:
                    return job
        return None

    def best(self, arm: str) -> Job:
        """The rate whose run has the lowest error, on the first seed."""
        jobs = [job for job in self.found if job.arm == arm and job.seed == self.part.seeds[0]]
        return min(jobs, key=lambda job: self.found[job]["headline"]["error"]["mean"])

    # One run

    def run(self, job: Job, seconds: float | None = None) -> bool:
        """Makes a run and its result file; False if time ended it."""
        arm, output = self.part.arms[job.arm], self.folder / f"{self.name}-{job.name}"
        overrides, recipe, started = [], None, time.monotonic()
        if arm.is_trained:
            overrides = self._overrides(job, output)
            recipe, _ = resolve_recipe(self.part.recipe, overrides)
            store = self.folder / f"store-{self.name}-{job.seed}"
            command, commands = ["--recipe", self.part.recipe, *overrides], []
            manifest = read_manifest(store)  # of the clips of a seed, encoded once for all arms
            if manifest is None or any(manifest.missing(store)):
                variants = f"--variants={self.part.variants}"
                commands.append(["precompute", *command, "--output", str(store), variants])
            if not recipe.result_folder.exists():
                commands.append(["train", *command, f"framebridge.precomputed={store}"])
            for words in commands:
                left = None if seconds is None else seconds - (time.monotonic() - started)
                if not _command(words, left, self._in_process):
                    print(f"{job.name}: stopped; the same command goes on", flush=True)
                    return False
        result = {"part": self.name, "arm": job.arm, "rate": job.rate, "seed": job.seed, "overrides": overrides}
        result |= self._measure(job, recipe, output)
        about = environment(torch.device("cpu"))
        result |= {"environment": about, "seconds": round(time.monotonic() - started)}
        self.results.mkdir(parents=True, exist_ok=True)
        # Wherever the runs are: the file is to be published.
        text = json.dumps(result, indent=1).replace(str(self.folder.absolute()), "FOLDER")
        (self.results / f"{self.name}-{job.name}.json").write_text(text + "\n")
        self.found[job] = result
        print(f"{job.name}: error {figure(result['headline']['error'])}", flush=True)
        return True

    def _overrides(self, job: Job, output: Path) -> list[str]:
        arm = self.part.arms[job.arm]
        before = ""
        if arm.after is not None:
            best = self.best(arm.after)
            before = str(self.folder / f"{self.name}-{Job(arm.after, best.rate, job.seed).name}")
        own = [text.format(after=before) for text in arm.overrides]
        every = max(1, self.part.updates // self.part.checkpoints)
        return [
            *self.overrides,
            *own,
            *(f"optimization.train_steps={self.part.updates}", f"optimization.lr={job.rate:g}"),
            *(f"training.seed={job.seed}", f"checkpoints.output_dir={output}"),
            *(f"checkpoints.checkpointing_steps={every}", "checkpoints.checkpointing_limit=null"),
        ]

    def _measure(self, job: Job, recipe: Recipe | None, output: Path) -> dict[str, Any]:
        """Quality against calls by every sampler, and along the updates by the best of them."""
        if recipe is None:
            recipe, _ = resolve_recipe(self.part.recipe, self.overrides)
        assert recipe.framebridge.data is not None
        cut = recipe.framebridge.data.model_dump(include=ClipSection.model_fields.keys())
        heldout = HeldOut.read(self.part.heldout, cut, self.part.clips)
        protocol = {"heldout": dict(self.part.heldout), "clips": len(heldout.conditions), "updates": self.part.updates}
        arm = self.part.arms[job.arm]
        if not arm.samplers:
            still = heldout.clips[:, :1].expand_as(heldout.clips)
            videos = sample(open_quietly(output), heldout) if arm.is_trained else still
            found = measured(videos, heldout) | {"motion_distance": motion_distance(videos, heldout)}
            return {"protocol": protocol, "headline": found}
        middle = min(self.part.calls, key=lambda calls: abs(calls - HEADLINE_CALLS))
        of_calls: dict[str, dict[str, Any]] = {name: {} for name in arm.samplers}

        def measure_at(name: str, calls: int) -> None:
            pipeline = sampled_by(open_quietly(output), arm.samplers[name])
            videos = sample(pipeline, heldout, num_inference_steps=calls, guidance_scale=1.0)
            of_calls[name][str(calls)] = measured(videos, heldout)
            if calls == middle:
                of_calls[name][str(calls)]["motion_distance"] = motion_distance(videos, heldout)

        for name in arm.samplers:
            for calls in self.part.calls:
                if calls <= middle:
                    measure_at(name, calls)
        best = min(of_calls, key=lambda name: of_calls[name][str(middle)]["error"]["mean"])
        for calls in self.part.calls:
            if calls > middle:
                measure_at(best, calls)
        headline = of_calls[best][str(middle)]
        for rows in of_calls.values():  # each clip's own errors serve the paired differences alone
            rows |= {
                calls: {name: value for name, value in found.items() if name != "errors"}
                for calls, found in rows.items()
            }
        fewer, along = heldout.first(len(heldout.conditions) // 2), {}
        for folder in sorted((output / "checkpoints").glob("step_*")):
            pipeline = sampled_by(open_quietly(folder), arm.samplers[best])
            found = measured(sample(pipeline, fewer, num_inference_steps=middle, guidance_scale=1.0), fewer)
            found.pop("errors")
            along[str(int(folder.name.removeprefix("step_")))] = found
        protocol |= {"headline_calls": middle, "headline_sampler": best}
        return {"protocol": protocol, "headline": headline, "calls": of_calls, "updates": along}


def open_quietly(folder: Path) -> Any:
    """The model of a run or a checkpoint, without bars."""
    pipeline = open_pipeline(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled_by(pipeline: Any, settings: Mapping[str, Any]) -> Any:
    """A pipeline with another sampler for its process."""
    config, given = pipeline.scheduler.config, dict(settings)
    name = given.pop("class", None)
    scheduler_class = FrameBridgeScheduler if name is None else getattr(diffusers, name)
    pipeline.scheduler = scheduler_class.from_config(config, **given)
    return pipeline


def _command(arguments: Sequence[str], seconds: float | None, in_process: bool) -> bool:
    """Runs a command; False if it was told to stop after so many seconds, and saved what it had."""
    if in_process:
        from framebridge_plugin.cli import main as run_command

        code = run_command(list(arguments))
    else:
        process = subprocess.Popen([sys.executable, "-m", "framebridge_plugin", *arguments])
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=PATIENCE)
            return False
    if code != 0:
        raise SystemExit(f"this failed: finetrainers {' '.join(arguments)}")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Makes runs until all are done or time is up, and the table; 1 if a quick one has another result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "made"], default="latte")
    parser.add_argument("--folder", type=Path, default=Path("runs/comparison"), help="of the runs and stores")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--minutes", type=float, default=100, help="after which nothing new begins (default: 100)")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--updates", type=int, help="of every run")
    parser.add_argument("--clips", type=int, help="that are held out and sampled")
    parser.add_argument("--calls", type=int, nargs="+", help="of the network, divisors of 1000")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates")
    parser.add_argument("--table", action="store_true", help="only make the table of what there is")
    parser.add_argument("--quick", action="store_true", help="two small arms on made clips; checks their order")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, such as model.vae_id=FOLDER")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        from quick_comparison import run_quickly

        return run_quickly()
    if is_made := arguments.part == "made":
        from quick_comparison import made_part

        part: Part = made_part((arguments.folder / "made").absolute())
    else:
        part = PARTS[arguments.part]
    changes = {
        name: getattr(arguments, name) for name in ("updates", "clips", "rates", "calls") if getattr(arguments, name)
    }
    if arguments.arms:
        changes["arms"] = {name: part.arms[name] for name in arguments.arms}
    part = replace(part, **changes)
    comparison = Comparison(arguments.part, part, arguments.folder, arguments.results, arguments.overrides, is_made)
    end = time.monotonic() + 60 * arguments.minutes
    for job in () if arguments.table else comparison.plan():
        if time.monotonic() >= end or not comparison.run(job, end - time.monotonic()):
            break
    report(comparison)
    return 0


def report(comparison: Comparison) -> None:
    """Prints the table and writes it, and a picture, beside the result files."""
    text = table(comparison)
    print(text)
    comparison.results.mkdir(parents=True, exist_ok=True)
    (comparison.results / f"{comparison.name}.md").write_text(text)
    draw(comparison, comparison.results / f"{comparison.name}.png")


if __name__ == "__main__":
    sys.exit(main())
