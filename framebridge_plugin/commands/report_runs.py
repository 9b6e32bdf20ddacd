"""What a run has left in its folder, read for a report: of a run that is done, stopped, killed or still going on."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

from framebridge_plugin.data.bad_files import read_bad_files
from framebridge_plugin.data.tables import read_json, read_text
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import leads_out, open_regular
from framebridge_plugin.folder_lock import FREE_AFTER_S
from framebridge_plugin.recipe.yaml_text import read_yaml
from framebridge_plugin.training.abandoned import METRICS_FILE

_RECIPES = ("recipe-resumed.yaml", "recipe.yaml")
_EVALUATIONS = ("evaluation.json", "*/evaluation.json", "evaluations/*/evaluation.json")
_RECENT = 100  # logged updates, of which the summary's loss is the mean
_WENT_BACK = re.compile(r"\d+-after-step-(\d+)")
_STARTED = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
_OF_CLIPS = ("evaluated", "count", "clips", "clip_seed", "resolution", "frames")
_WHOSE = ("", "; of the true clips", "; of the image repeated")


@dataclass
class RunRecord:
    """All of a run but its videos."""

    folder: Path
    name: str
    step: int = 0
    """The last update in the metrics."""
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    """Of each metric, its value at each step that has one."""
    heldout: str = ""
    """What its held-out losses are of."""
    restarts: set[int] = field(default_factory=set)
    """Steps to which the run went back."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers has to know, a line each."""
    recipe: dict[str, str] = field(default_factory=dict)
    """The resolved recipe of the last start, by dotted path."""
    versions: dict[str, str] = field(default_factory=dict)
    bad_files: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Path] = field(default_factory=list)
    """The files of `finetrainers evaluate` in the run's folder."""
    measures: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, str] = field(default_factory=dict)
    summary: dict[str, str] = field(default_factory=dict)

    def file(self, name: str | Path) -> Path | None:
        """A file in the folder; None if it is not there, or a link that leads out."""
        path = self.folder / name
        return path if path.is_file() and not leads_out(path, self.folder) else None


def read_run(folder: Path, name: str) -> RunRecord:
    """Reads a run's folder; `UsageError` if it is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'it is no folder' if folder.exists() else 'no such folder'}")
    run = RunRecord(folder, name)
    if not any(map(run.file, (METRICS_FILE, *_RECIPES))):
        raise UsageError(f"{folder}: is no run's folder: neither {METRICS_FILE} nor {_RECIPES[-1]} is in it")
    if (path := run.file(METRICS_FILE)) is not None:
        _read_metrics(run, path)
    _read_recipe(run)
    run.versions = flat(_read(run, "versions.json", read_json) or {})
    _read_evaluations(run)
    run.bad_files = _read(run, "bad_files.jsonl", read_bad_files) or []
    run.summary = dict(_summary(run))
    return run


def note_other_clips(runs: list[RunRecord]) -> None:
    """Adds to the notes of runs whose figures are of other clips than those of a run before them."""
    for number, run in enumerate(runs):
        for other in runs[:number]:
            names = [name for name in _OF_CLIPS if name in run.protocol and name in other.protocol]
            if differing := [name for name in names if run.protocol[name] != other.protocol[name]]:
                run.notes.append(
                    f"its evaluation is of other clips than {other.name}'s: another {', '.join(differing)}"
                )
            digests = [each.heldout.partition(",")[0] for each in (run, other)]
            if all(digests) and digests[0] != digests[1]:
                run.notes.append(f"its held-out losses are of other clips than {other.name}'s")


def _read_metrics(run: RunRecord, path: Path) -> None:
    """Of steps that were made twice the later lines count, and what came after the earlier ones does not."""
    broken, is_whole, texts = 0, True, dict[str, list[int]]()
    with open_regular(path) as file:
        for line in file:
            is_whole = line.endswith(b"\n")
            try:
                entry = json.loads(line)
                step = entry.pop("step")
                if type(step) is not int or step < 0:
                    raise ValueError
                numbers = {key: float(value) for key, value in entry.items() if isinstance(value, int | float)}
            except (ValueError, AttributeError, KeyError, TypeError, RecursionError, OverflowError):
                broken += is_whole
                continue
            if step < run.step:
                run.restarts.add(max(step - 1, 0))
                for values in run.series.values():
                    for later in [known for known in values if known >= step]:
                        del values[later]
            run.step = step
            for key, number in numbers.items():
                run.series.setdefault(key, {})[step] = number
            for key, value in entry.items():
                if key == "heldout/clips":
                    if run.heldout not in ("", value):
                        run.notes.append(f"held-out losses are of others from update {step} on, before: {run.heldout}")
                    run.heldout = str(value)
                elif isinstance(value, str):
                    texts.setdefault(f"{key}: {value}", []).append(step)
    run.series = {key: values for key, values in run.series.items() if values}
    run.notes += [f"{text} (at update {', '.join(map(str, steps))})" for text, steps in texts.items()]
    if not is_whole:
        run.notes.append(f"the last line of {METRICS_FILE} was cut short, as by a kill, and is left out")
    if broken:
        run.notes.append(f"{METRICS_FILE}: lines that name no step are left out, {broken} of them")
    went_back = (_WENT_BACK.match(path.name) for path in run.folder.glob("abandoned/*"))
    run.restarts.update(int(match[1]) for match in went_back if match)
    if run.restarts:
        run.notes.append(f"the run went back to update {', '.join(map(str, sorted(run.restarts)))}, and on from there")


def _read_recipe(run: RunRecord) -> None:
    paths = [path for path in map(run.file, _RECIPES) if path is not None]
    latest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    contents = [_read(run, path.name, lambda path: read_yaml(read_text(path)).data) for path in latest_first]
    recipes = [flat(content) for content in contents if isinstance(content, dict)]
    if not paths:
        run.notes.append(f"there is no {_RECIPES[-1]}: it was another program that trained this")
    run.recipe, *earlier = recipes or [{}]
    for recipe in earlier:
        for key in {**recipe, **run.recipe}:
            before, since = (each.get(key, "not there") for each in (recipe, run.recipe))
            if before != since:
                run.notes.append(f"a later start had another recipe: {key} was {before}, then {since}")


def _read_evaluations(run: RunRecord) -> None:
    paths = sorted(path.relative_to(run.folder) for pattern in _EVALUATIONS for path in run.folder.glob(pattern))
    known = _digests_of_model(run) if paths else {}
    for path in paths:
        from framebridge_plugin.evaluation.measuring import OF_TRUTH
        from framebridge_plugin.evaluation.report import ROWS, figure_text

        where = f"{path.parent}: " if len(paths) > 1 else ""
        content = _read(run, path, read_json)
        try:
            measures, protocol = content["measures"], dict(content["protocol"])
            if any(known.get(name, digest) != digest for name, digest in protocol.get("weights", {}).items()):
                run.notes.append(f"{path} is of other weights than the run's model: of a checkpoint, or of before")
            protocol = {name: content[name] for name in ("evaluated", "trained_on") if name in content} | protocol
            for name, title in ROWS.items():
                for prefix, whose in zip(("", OF_TRUTH, "repeated."), _WHOSE, strict=True):
                    if prefix + name in measures:
                        run.measures[f"{where}{title}{whose}"] = figure_text(measures[prefix + name])
        except (KeyError, TypeError, ValueError):
            run.notes.append(f"{path} is no file of `finetrainers evaluate`, and left out")
        else:
            run.evaluations.append(path)
            run.protocol |= {where + name: text for name, text in flat(protocol).items()}


def _digests_of_model(run: RunRecord) -> dict[str, str]:
    """The SHA-256 of the files of what the run has trained, as far as it says them."""
    for name in ("model", "lora"):
        content = _read(run, f"{name}/manifest.json", read_json)
        with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError):
            return {file: facts[1] for file, facts in content["files"].items()}
    return {}


def _read(run: RunRecord, name: str | Path, read: Callable[[Path], Any]) -> Any:
    """What a file in the folder holds; None, with a note, if it cannot be read."""
    if (path := run.file(name)) is not None:
        try:
            return read(path)
        except FrameBridgeError as error:
            run.notes.append(str(error))
    return None


def flat(content: Any, prefix: str = "") -> dict[str, str]:
    """The values of nested dicts as text, by dotted path; whatever is no dict is one value."""
    if isinstance(content, dict):
        return {path: text for key, value in content.items() for path, text in flat(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}


def _summary(run: RunRecord) -> Iterator[tuple[str, str]]:
    planned = run.recipe.get("optimization.train_steps", "?")
    yield "state", _state(run, planned)
    yield "updates", f"{run.step:,} of {int(planned):,}" if planned.isdecimal() else f"{run.step:,}"
    if run.recipe:
        model, kind = run.recipe.get("model.model_name", "?"), run.recipe.get("training.training_type", "?")
        objective, target = (run.recipe.get(f"framebridge.{key}", "?") for key in ("objective", "target"))
        # The bridge's own target says nothing of a baseline, which predicts what its backbone does.
        said = "" if objective == "diffusion" and target == "eps_psi" else f", target {target}"
        yield "trained", f"{model}, {kind}: {objective}{said}"
    if loss := list(run.series.get("loss", {}).values())[-_RECENT:]:
        yield f"loss, mean of the last {len(loss)}", f"{fmean(loss):.4g}"
    for key, values in run.series.items():
        if key.startswith("heldout/") and "_band_" not in key:
            name, best = key.replace("heldout/", "held-out ").replace("_", " "), min(values, key=values.__getitem__)
            yield name, f"{values[max(values)]:.4g}, lowest {values[best]:.4g} at {best:,}"
    if run.heldout:
        yield "held-out clips", run.heldout
    if speed := run.series.get("samples_per_second"):
        yield "clips a second, median", f"{median(speed.values()):.3g}"
    if seen := run.series.get("samples_seen"):
        yield "clips seen", f"{max(seen.values()):,.0f}"
    yield "bad files", str(len(run.bad_files))
    begun = (_STARTED.match(path.name) for path in run.folder.glob("tensorboard/*"))
    if starts := sorted(int(match[1]) for match in begun if match):
        first = datetime.fromtimestamp(starts[0], UTC)
        yield "begun", f"{first:%Y-%m-%d %H:%M} UTC" + (f", started {len(starts)} times" if len(starts) > 1 else "")


def _state(run: RunRecord, planned: str) -> str:
    with contextlib.suppress(OSError):
        if time.time() - (run.folder / ".lock").stat().st_mtime < FREE_AFTER_S:
            return "running"
    seen, most = run.series.get("samples_seen", {0: 0.0}), run.recipe.get("training.max_data_samples", "")
    if (planned.isdecimal() and run.step >= int(planned)) or (most.isdecimal() and int(most) <= max(seen.values())):
        return "done"
    if crashes := sorted(path.name for path in run.folder.glob("crash-rank*.txt")):
        return f"incomplete; {crashes[0]} says how it failed once"
    return "incomplete" if planned.isdecimal() else "of unknown length"


def thinned(values: dict[int, float], most: int = 2000) -> tuple[list[int], list[float | None], int]:
    """Steps and values for a plot, of `most` points at most: of more, means of blocks, whose length is the third."""
    steps = sorted(values)
    length = math.ceil(len(steps) / most)
    blocks = [steps[first : first + length] for first in range(0, len(steps), length)]
    means = [fmean(values[step] for step in block) for block in blocks]
    plotted = [float(f"{mean:.5g}") if math.isfinite(mean) else None for mean in means]
    return [block[-1] for block in blocks], plotted, length
