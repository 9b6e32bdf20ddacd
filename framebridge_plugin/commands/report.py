"""`finetrainers report`: one HTML file of a run, or of several side by side, that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from framebridge_plugin import __version__
from framebridge_plugin.commands.report_runs import RunRecord, note_other_clips, read_run, thinned
from framebridge_plugin.commands.report_videos import collect_rows, collect_sheets
from framebridge_plugin.errors import UsageError, escaped
from framebridge_plugin.files import write_whole, writing

MOST_RUNS = 6
"""More could not be told apart by their colours."""

_MOST_BAD_FILES = 100
_CHARTS = {
    "loss": "Loss",
    "heldout/loss": "Held-out loss",
    "heldout/x0_error": "Held-out error of the predicted video",
    "heldout/x0_error_relative": "Held-out error, repeated image = 1",
    "lr": "Learning rate",
    "samples_per_second": "Speed, clips a second",
    "grad_norm": "Norm of the gradient before clipping",
    "heldout/loss_band": "Held-out loss in bands of time: 0 next to the video",
    "heldout/x0_error_band": "Held-out error of the predicted video in bands of noise: 0 with the least",
}
"""Titles, in the order of the page; other metrics come after them under their own names."""

_LOGARITHMIC = ("loss", "grad_norm", "heldout/loss_band", "heldout/x0_error_band")
_NOT_DRAWN = ("samples_seen", "bad_files")  # both are in the summary
_NUMBERED = re.compile(r"(.*?([^/_]*))[/_]?(\d+)")


def write_report(folders: Sequence[Path], output: Path) -> str:
    """Writes the page; returns what to say of it, a line each. `UsageError` for folders that are no runs."""
    if len(folders) > MOST_RUNS:
        raise UsageError(f"--compare: {len(folders)} runs, of {MOST_RUNS} at most that a chart can show")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("--compare: the same run twice; name each once")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    runs = [read_run(folder, escaped(name)) for folder, name in zip(folders, names, strict=True)]
    note_other_clips(runs)
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file")
    rows, notes = collect_rows(runs)
    page = _render(runs, rows=rows, notes=notes, sheets=[sheet for run in runs for sheet in collect_sheets(run)])
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page)
    return "\n".join([f"report: {output} ({len(page) / 1e6:.1f} MB)", *map(escaped, notes)])


def _render(runs: Sequence[RunRecord], **content: Any) -> str:
    """The page, of which only its own style and script are obeyed by a browser, and data: URLs alone are opened."""
    style, script = _part("report.css"), _part("report.js")
    environment = Environment(autoescape=True, finalize=_shown, trim_blocks=True, lstrip_blocks=True)
    names = list(dict.fromkeys(name for run in runs for name in run.series if name not in _NOT_DRAWN))
    return environment.from_string(_part("report.html")).render(
        runs=runs,
        title=runs[0].name if len(runs) == 1 else " and ".join(run.name for run in runs),
        version=__version__,
        now=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        plotted={"charts": _charts(names), "runs": [_plotted(run, names) for run in runs]},
        summary=_table(runs, "summary"),
        differences=_differing(_table(runs, "recipe")) if len(runs) > 1 else [],
        measures=_table(runs, "measures"),
        protocol=_table(runs, "protocol"),
        recipe=_table(runs, "recipe"),
        versions=_table(runs, "versions"),
        most_bad_files=_MOST_BAD_FILES,
        **content,
    )


def _part(name: str) -> Markup:
    return Markup((files(__package__) / name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _shown(value: Any) -> Any:
    """What strangers named is shown as on a terminal: no secrets, no characters that turn the line round."""
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _charts(names: Sequence[str]) -> list[dict[str, Any]]:
    """A chart for each metric, and one of small panels for those whose names differ by a number at their end."""
    charts: dict[str, dict[str, Any]] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        match = _NUMBERED.fullmatch(name)
        family, label = (match[1], f"{match[2]} {match[3]}") if match else (name, "")
        chart = charts.setdefault(
            family,
            {
                "title": _CHARTS.get(family, family),
                "panels": [],
                "log": family in _LOGARITHMIC,
                "exact": family == "lr" or family.startswith("heldout/"),
            },
        )
        chart["panels"].append({"name": name, "label": label})
    known = [charts[family] for family in _CHARTS if family in charts]
    return known + [chart for family, chart in charts.items() if family not in _CHARTS]


def _plotted(run: RunRecord, names: Sequence[str]) -> dict[str, Any]:
    series = {}
    for name in names:
        if name in run.series:
            steps, values, block = thinned(run.series[name])
            series[name] = {"steps": steps, "values": values, "block": block}
    return {"name": run.name, "restarts": sorted(run.restarts), "series": series}


def _table(runs: Sequence[RunRecord], what: str) -> list[tuple[str, list[str]]]:
    """A row for each name that one of the runs has, a cell for each run."""
    contents = [getattr(run, what) for run in runs]
    names = dict.fromkeys(name for content in contents for name in content)
    return [(name, [content.get(name, "-") for content in contents]) for name in names]


def _differing(table: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    return [(name, cells) for name, cells in table if len(set(cells)) > 1]
