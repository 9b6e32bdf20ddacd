"""Kills runs and damages checkpoints, for real and at random moments: what comes of it, as a table.

    python benchmarks/kill_test.py --output benchmarks/results/kill_test.json

Every run is the command `finetrainers train` on a tiny model; it is started again by the same command, or by torchrun,
and at its end compared bit for bit with one that nothing befell. A damaged checkpoint is the newest of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import yaml

import framebridge_plugin

REPOSITORY = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).with_name("finetrainers"))
SIZE = 32
STEPS, SAVED_EVERY = 24, 3
LORA = ("training.training_type=lora", "lora.rank=4", "lora.lora_alpha=8")
MOMENTS = ("start", "update", "save")
SECONDS_TO_START = 300


@dataclass(frozen=True)
class Configuration:
    """A kind of run: its options, and how its processes are started."""

    options: tuple[str, ...] = ()
    processes: int = 1
    torchrun: bool = False
    """torchrun starts the run again by itself; one of its processes is killed."""

    def command(self, recipe: Path, output: Path) -> list[str]:
        train = ["train", "--recipe", str(recipe), f"checkpoints.output_dir={output}", *self.options]
        if self.torchrun:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
            return [sys.executable, *torchrun, "--max-restarts=100", "--no-python", COMMAND, *train]
        return [COMMAND, *train, *(["--nproc", str(self.processes)] if self.processes > 1 else [])]


CONFIGURATIONS = {
    "one process, full": Configuration(("framebridge.ema_decay=0.9",)),
    "one process, LoRA, workers": Configuration((*LORA, "dataloader.dataloader_num_workers=2")),
    "DDP, 2 processes": Configuration(("training.gradient_accumulation_steps=2",), processes=2),
    "FSDP2, 2 processes": Configuration(("parallelism.dp_shards=2", "framebridge.ema_decay=0.9"), processes=2),
    "8-bit AdamW, stochastic rounding": Configuration(
        (
            *("optimization.optimizer=adamw-torchao-8bit", "optimization.stochastic_rounding=true"),
            "precision.transformer_dtype=bf16",
        )
    ),
    "captions in a folder, 2 processes": Configuration(("framebridge.caption_cache_dir=captions",), processes=2),
    "precomputed": Configuration(("framebridge.precomputed=store",)),
    "torchrun --max-restarts, 2 processes": Configuration(processes=2, torchrun=True),
}


@dataclass
class Outcome:
    """What came of the kills of one configuration."""

    kills: int = 0
    moments: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    survived: int = 0
    """Kills after which the run went on by itself, or by its own command."""
    bit_equal: int = 0
    """Kills of runs that ended with the bits of the one that nothing befell."""
    seconds_lost: list[float] = field(default_factory=list)
    """From a kill until the run is further than it was."""
    failures: list[str] = field(default_factory=list)


class Run:
    """A run of the command in its own session, with what its folder says of it."""

    def __init__(self, configuration: Configuration, recipe: Path, output: Path) -> None:
        self._torchrun, self.output = configuration.torchrun, output
        self.reached, self.further_at = last_step(output), 0.0
        """Where the run was when it was killed last, and the time at which it was further."""
        self._log = output.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            configuration.command(recipe, output),
            cwd=recipe.parent,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait_for(self, condition: Callable[[], bool], seconds: float = SECONDS_TO_START) -> bool:
        """Waits until a condition holds; False if the run ended before, or the time is up."""
        deadline = time.monotonic() + seconds
        while not self.ended and time.monotonic() < deadline:
            if not self.further_at and last_step(self.output) > self.reached:
                self.further_at = time.monotonic()
            if condition():
                return True
            time.sleep(0.005)
        return False

    def kill(self, generator: random.Random) -> None:
        """Kills one process of the run or all of them; where none starts it again, waits until it has ended."""
        ranks = [pid for pid in descendants(self.process.pid) if "RANK" in environment_of(pid)]
        if self._torchrun or (ranks and generator.random() < 0.5):
            victims = [generator.choice(ranks)] if ranks else []
        else:
            victims = [self.process.pid, *descendants(self.process.pid)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not self._torchrun:
            self.process.wait(120)
            self._log.close()


def kill_again_and_again(
    configuration: Configuration, recipe: Path, folder: Path, kills: int, generator: random.Random
) -> Outcome:
    """Makes runs of one configuration until they have been killed so often."""
    outcome, number = Outcome(), 0
    expected = result_of(finished(configuration, recipe, folder / "whole"))
    while outcome.kills < kills and len(outcome.failures) < 3:
        number += 1
        killed_here, output = _kill_one_run(
            configuration, recipe, folder / f"killed{number}", kills, generator, outcome
        )
        if output is None:
            continue
        result = result_of(output)
        if result == expected:
            outcome.bit_equal += killed_here
        else:
            names = sorted(name for name in {*result, *expected} if result.get(name) != expected.get(name))
            outcome.failures.append(f"{output.name}: other bits than the run that nothing befell: {', '.join(names)}")
        shutil.rmtree(output)
    return outcome


def _kill_one_run(
    configuration: Configuration, recipe: Path, output: Path, kills: int, generator: random.Random, outcome: Outcome
) -> tuple[int, Path | None]:
    """Kills one run until it comes to its end; how often, and its folder if it came there."""
    killed, killed_at = 0, 0.0
    run = Run(configuration, recipe, output)
    while True:
        moment = MOMENTS[outcome.kills % len(MOMENTS)] if outcome.kills < kills else None
        first = last_step(output)
        came = _wait_for(moment, run, first, generator) if moment is not None else run.wait_for(lambda: False, 900)
        if killed_at and run.further_at:
            outcome.seconds_lost.append(round(run.further_at - killed_at, 1))
        if not came:
            if run.ended and run.process.returncode == 0:
                outcome.survived += killed
                return killed, output
            outcome.failures.append(f"{output.name}: exit code {run.process.poll()} after {killed} kills")
            run.kill(generator)
            return killed, None
        run.reached, run.further_at, killed_at = last_step(output), 0.0, time.monotonic()
        run.kill(generator)
        killed += 1
        outcome.kills += 1
        outcome.moments[str(moment)] += 1
        if not configuration.torchrun:
            run = Run(configuration, recipe, output)


def _wait_for(moment: str | None, run: Run, first: int, generator: random.Random) -> bool:
    if moment == "start":
        time.sleep(generator.uniform(0, 8))
        return not run.ended
    if moment == "update":
        updates = generator.randint(1, 5)
        came = run.wait_for(lambda: last_step(run.output) >= first + updates)
        time.sleep(generator.uniform(0, 0.2))
    else:
        # A checkpoint is being written: it has no name yet that counts.
        came = run.wait_for(lambda: any((run.output / "checkpoints").glob(".step_*")))
        time.sleep(generator.uniform(0, 0.05))
    return came and not run.ended


def finished(configuration: Configuration, recipe: Path, output: Path) -> Path:
    """The folder of a run that nothing befell."""
    run = Run(configuration, recipe, output)
    if run.process.wait(900) != 0:
        raise SystemExit(f"a run that nothing befell failed: {output.with_suffix('.log').read_text()[-2000:]}")
    return output


def result_of(run: Path) -> dict[str, str]:
    """Digests of all that a run ends with: its losses, what it exports, and the last checkpoint's training state."""
    last = max((run / "checkpoints").glob("step_*"))
    files = [*run.glob("model/**/*.safetensors"), *run.glob("lora/*.safetensors"), *last.glob("trainer/*.safetensors")]
    digests = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    losses = {str(line["step"]): str(line["loss"]) for line in metrics(run)}
    return digests | losses


def metrics(run: Path) -> list[dict]:
    lines = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # one that is being written
                lines.append(json.loads(line))
    return [line for line in lines if "loss" in line]


def last_step(run: Path) -> int:
    return max((line["step"] for line in metrics(run)), default=0)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def environment_of(pid: int) -> set[str]:
    with contextlib.suppress(OSError):
        return {entry.partition(b"=")[0].decode() for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
    return set()


# Damage

Damage = Callable[[Path], None]


def _cut(share: float) -> Damage:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def _flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        position = random.Random(path.name).randrange(len(content) // 2, len(content))
        content[position] ^= 1 << 4
        path.unlink()  # it may be a link to a file that others use
        path.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "cut at 0 %": _cut(0.0),
    "cut at 50 %": _cut(0.5),
    "cut at 99 %": _cut(0.99),
    "one bit flipped": _flip_one_bit,
    "deleted": Path.unlink,
}


def damage_every_file(recipe: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Damages each file of a run's newest checkpoint in each way, and goes on with the run: what came of it."""
    framebridge_plugin.register()  # once, and not in each of the processes that are forked from this one

    saves = ("checkpoints.checkpointing_steps=2", "checkpoints.checkpointing_limit=5")
    options = ("framebridge.ema_decay=0.9", *saves)
    whole, begun = folder / "whole", folder / "begun"
    assert _in_fork(recipe, whole, *options, "optimization.train_steps=6") == 0
    assert _in_fork(recipe, begun, *options, "optimization.train_steps=4") == 0
    expected, newest = result_of(whole), max((begun / "checkpoints").glob("step_*"))
    outcomes: dict[str, dict[str, str]] = {}
    for file in sorted(path.relative_to(begun) for path in newest.rglob("*") if path.is_file()):
        row = outcomes.setdefault(str(file.relative_to(newest.relative_to(begun))), {})
        for name, damage in DAMAGES.items():
            run = folder / "damaged"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(begun, run)
            damage(run / file)
            code = _in_fork(recipe, run, *options, "optimization.train_steps=6")
            fell_back = "fell back, " if any(run.glob("abandoned/*/step_*")) else ""
            if code != 0:
                row[name] = f"refused ({code})"
            else:
                row[name] = fell_back + ("bit-equal" if result_of(run) == expected else "OTHER BITS")
        print(f"  {', '.join(dict.fromkeys(row.values()))}: {next(reversed(outcomes))}", flush=True)
    return outcomes


def _in_fork(recipe: Path, output: Path, *options: str) -> int:
    def train() -> None:
        from framebridge_plugin.cli import main

        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(recipe.parent)
        sys.exit(main(["train", "--recipe", str(recipe), f"checkpoints.output_dir={output}", *options]))

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join()
    return int(process.exitcode or 0)


# The whole


@contextlib.contextmanager
def inputs() -> Iterator[Path]:
    """A folder with a recipe, a tiny model, clips and their stored latents."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_models import make_clips, make_tiny_cogvideox

    with tempfile.TemporaryDirectory(prefix="kill-test-") as name:
        folder = Path(name)
        make_tiny_cogvideox(folder / "model", sample_size=SIZE)
        make_clips(folder / "clips", count=5, frames=12, size=SIZE)
        data = {"data_root": "clips", "num_frames": 9, "height": SIZE, "width": SIZE}
        recipe = {
            "model": {"pretrained_model_name_or_path": "model"},
            "framebridge": {"data": data},
            "training": {"training_type": "full-finetune", "batch_size": 2, "seed": 7},
            "optimization": {"train_steps": STEPS, "lr": 1e-3},
            "precision": dict.fromkeys(("transformer_dtype", "vae_dtype", "text_encoder_dtype"), "fp32"),
            "checkpoints": {"output_dir": "run", "checkpointing_steps": SAVED_EVERY},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        yield folder


def table(results: dict) -> str:
    """The results in Markdown."""
    lines = [
        "| configuration | kills (start / update / save) | survived | bit-equal | seconds lost, median (worst) |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["kills"].items():
        lost = row["seconds_lost"]
        seconds = f"{statistics.median(lost):.0f} ({max(lost):.0f})" if lost else "-"
        moments = " / ".join(str(row["moments"][moment]) for moment in MOMENTS)
        lines.append(f"| {name} | {row['kills']} ({moments}) | {row['survived']} | {row['bit_equal']} | {seconds} |")
    if results["damages"]:
        lines += ["", f"| file of the newest checkpoint | {' | '.join(DAMAGES)} |", "|---" * (len(DAMAGES) + 1) + "|"]
        lines += [f"| {file} | {' | '.join(row.values())} |" for file, row in results["damages"].items()]
    return "\n".join(lines)


def main() -> None:
    """Runs what the command line says, prints the table and writes it beside the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each configuration")
    parser.add_argument("--only", nargs="*", default=[*CONFIGURATIONS, "damage"], help="configurations, or damage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON; a table in Markdown is written beside it")
    arguments = parser.parse_args()
    versions = {name: version(name) for name in ("framebridge-plugin", "finetrainers", "torch")}
    results: dict = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}",
        "versions": versions,
        "kills": {},
        "damages": {},
    }
    with inputs() as folder:
        recipe = folder / "recipe.yaml"
        for name, configuration in CONFIGURATIONS.items():
            if name not in arguments.only:
                continue
            place, generator = folder / name.replace(" ", "-"), random.Random(f"{arguments.seed} {name}")
            place.mkdir()
            if any("precomputed" in option for option in configuration.options):
                store = [COMMAND, "precompute", "--recipe", str(recipe), "--output", "store"]
                subprocess.run(store, cwd=folder, check=True, capture_output=True)
            outcome = kill_again_and_again(configuration, recipe, place, arguments.kills, generator)
            results["kills"][name] = vars(outcome)
            print(f"{name}: {vars(outcome)}", flush=True)
        if "damage" in arguments.only:
            (folder / "damage").mkdir()
            results["damages"] = damage_every_file(recipe, folder / "damage")
    print(table(results))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(results) + "\n")
    failures = [line for row in results["kills"].values() for line in row["failures"]]
    wrong = [file for file, row in results["damages"].items() if "OTHER BITS" in row.values()]
    sys.exit(1 if failures or wrong else 0)


if __name__ == "__main__":
    main()
