"""The samples of a run's validations for a report, each beside its input and what truly followed, as data: URLs."""

from __future__ import annotations

import base64
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from framebridge_plugin.commands.report_runs import RunRecord
from framebridge_plugin.data.tables import read_json
from framebridge_plugin.data.validation_rows import read_validation_rows
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import is_web_address

MOST_BYTES = 36_000_000
"""Of all videos together: a third more as text, so that the page stays below 50 MB."""

_NAME = re.compile(r"(?:step(\d+)|final)-(\d+)\.mp4")
_LARGEST_PICTURE = 512  # pixels a side, of inputs
_LARGEST_SHEET = 4 << 20


@dataclass
class Shown:
    """A picture or a video of the page."""

    label: str
    picture: str
    """A data: URL; of a video, of its first frame."""
    video: str = ""
    size: str = ""


@dataclass
class Row:
    """One row of a validation file: what was given, and what the runs made of it."""

    caption: str
    given: list[Shown] = field(default_factory=list)
    samples: dict[str, list[Shown]] = field(default_factory=dict)
    """By the run's name, over the updates."""


def collect_rows(runs: Sequence[RunRecord], most_bytes: int = MOST_BYTES) -> tuple[list[Row], list[str]]:
    """The rows of all runs, those of the same number and caption as one, and notes on what is left out."""
    rows: dict[tuple[int, str], Row] = {}
    notes: list[str] = []
    for run in runs:
        files = _find_samples(run, notes)
        if not files:
            notes.append(f"{run.name}: no validation has written a video")
            continue
        kept = _choose(files, most_bytes // len(runs))
        why = f"{run.name}: left out, for a file below 50 MB"
        if steps := sorted({step for step, _ in files} - {step for step, _ in kept}):
            notes.append(f"{why}: samples of updates {', '.join(f'{step:.0f}' for step in steps)}")
        if dropped := len({number for _, number in files}) - len({number for _, number in kept}):
            notes.append(f"{why}: the last {dropped} rows of the validation")
        inputs = _Inputs(run)
        for step, number in sorted(kept):
            row = rows.get(key := (number, inputs.caption(number)))
            if row is None:
                row = rows[key] = Row(
                    inputs.caption(number) or f"row {number} of the validation", inputs.given(number)
                )
            try:
                video = _video(_label(step, run), files[step, number])
            except (FrameBridgeError, OSError) as error:
                notes.append(f"{files[step, number]}: {error}")
                continue
            row.samples.setdefault(run.name, []).append(video)
        if inputs.problems:
            count = len(inputs.problems)
            others = f" and {count - 1} more" if count > 1 else ""
            notes.append(f"{run.name}: not shown of what the run was given: {inputs.problems[0]}{others}")
    return [rows[key] for key in sorted(rows)], notes


def collect_sheets(run: RunRecord) -> list[Shown]:
    """The pictures of the evaluations in the run's folder."""
    sheets = []
    for name in run.evaluations:
        path = run.file(name.with_suffix(".png"))
        if path is not None and path.stat().st_size <= _LARGEST_SHEET:
            sheets.append(Shown(f"{run.name}, {name.parent}", _data_url("image/png", path.read_bytes())))
    return sheets


def _find_samples(run: RunRecord, notes: list[str]) -> dict[tuple[float, int], Path]:
    """The videos by step, infinity for those at the end, and row."""
    found, abandoned = {}, set()
    logged = run.step + int(run.recipe.get("tracking.logging_steps", "1"))
    for path in run.folder.glob("validation/*.mp4"):
        match = _NAME.fullmatch(path.name)
        if match is None or run.file(f"validation/{path.name}") is None:
            continue
        if match[1] and run.step and int(match[1]) > logged:
            abandoned.add(int(match[1]))
        else:
            found[float(match[1] or "inf"), int(match[2])] = path
    if abandoned:
        steps = ", ".join(map(str, sorted(abandoned)))
        notes.append(f"{run.name}: left out are samples of updates that it went back from: {steps}")
    return found


def _label(step: float, run: RunRecord) -> str:
    if step != float("inf"):
        return f"update {step:.0f}"
    return f"at the end, update {run.step}" if run.summary["state"] == "done" else "at an earlier end"


def _choose(files: dict[tuple[float, int], Path], most_bytes: int) -> list[tuple[float, int]]:
    """All files; if they are too large, those of the first update, of some in between and of the last, as many as
    fit, or of the first rows at the last update.
    """
    sizes = {key: path.stat().st_size for key, path in files.items()}
    steps = sorted({step for step, _ in files})
    for count in range(len(steps), 0, -1):
        chosen = {steps[round(index * (len(steps) - 1) / max(count - 1, 1))] for index in range(count)}
        kept = [key for key in files if key[0] in (chosen if count > 1 else steps[-1:])]
        if sum(sizes[key] for key in kept) <= most_bytes:
            return kept
    kept.sort()
    while sum(sizes[key] for key in kept) > most_bytes:
        kept.pop()
    return kept


class _Inputs:
    """What a run's validation file says of its rows, as far as it is here."""

    def __init__(self, run: RunRecord) -> None:
        self._run = run
        self.problems: list[str] = []
        self._rows: list[dict[str, Any]] = []
        name = run.recipe.get("validation.validation_dataset_file", "null")
        if name != "null":
            self._try(lambda: self._rows.extend(read_validation_rows(self._find(name))))

    def caption(self, number: int) -> str:
        return str(self._rows[number].get("caption", "")) if number < len(self._rows) else ""

    def given(self, number: int) -> list[Shown]:
        row = self._rows[number] if number < len(self._rows) else {}
        shown: list[Shown] = []
        if "image_path" in row:
            self._try(lambda: shown.append(_picture("input", self._find(row["image_path"]))))
        if "video_path" in row:
            self._try(lambda: shown.extend(self._truth(self._find(row["video_path"]), has_input="image_path" in row)))
        return shown

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (FrameBridgeError, OSError) as error:
            self.problems.append(str(error))

    def _find(self, name: Any) -> Path:
        """A file that the run named, from the directory that it worked in, as far as that is known, or from here."""
        if is_web_address(str(name)):
            raise FrameBridgeError(f"{name} (a report fetches nothing)")
        folder, output_dir = self._run.folder.resolve(), Path(self._run.recipe.get("checkpoints.output_dir", "."))
        depth = len(folder.parts) - len(output_dir.parts)
        started = Path(*folder.parts[:depth]) if folder.parts[depth:] == output_dir.parts else Path()
        for path in (started / name, Path(name)):
            if path.is_file():
                return path
        raise FrameBridgeError(f"{name} (is not here any more)")

    def _truth(self, path: Path, *, has_input: bool) -> list[Shown]:
        """The clip that begins with the input, cut as the run cuts its data, and without an image its first frame."""
        import torch

        from framebridge_plugin.data.clips import ClipSettings, clip_rate, read_pixels
        from framebridge_plugin.media import DEFAULT_FPS, write_video
        from framebridge_plugin.settings.data import dataset_entries

        where = self._run.folder / "dataset_config.json"
        entry = dataset_entries(read_json(where), str(where))[0]
        values = entry.model_dump(include=set(ClipSettings.model_fields))
        settings = ClipSettings(**values | {"window": "start", "horizontal_flip": False})
        frames = read_pixels(str(path), settings, torch.Generator().manual_seed(0)).permute(0, 2, 3, 1).numpy()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "truth.mp4")
            write_video(frames, file, clip_rate(str(path), settings) or DEFAULT_FPS)
            truth = _video("truth", file)
        return [truth] if has_input else [Shown("input", truth.picture), truth]


def _video(label: str, path: Path) -> Shown:
    from PIL import Image

    from framebridge_plugin.data.decoding.exact import read_first_picture

    poster = Image.fromarray(read_first_picture(str(path)))
    content = path.read_bytes()
    size = f"{poster.width}x{poster.height}, {len(content) / 1000:,.0f} kB"
    return Shown(label, _jpeg(poster), _data_url("video/mp4", content), size)


def _picture(label: str, path: Path) -> Shown:
    from framebridge_plugin.media import read_image

    picture = read_image(path)
    return Shown(label, _jpeg(picture), size=f"{picture.width}x{picture.height}")


def _jpeg(picture: Any) -> Markup:
    picture.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return _data_url("image/jpeg", buffer.getvalue())


def _data_url(kind: str, content: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode()}")
