"""The videos of an evaluation by the names that VBench-I2V wants, and the command that measures them there."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.evaluation.clips import Clip, Inputs
from framebridge_plugin.evaluation.parts import Parts
from framebridge_plugin.files import writing
from framebridge_plugin.media import write_video

DIMENSIONS = (
    *("i2v_subject", "i2v_background", "subject_consistency", "background_consistency", "motion_smoothness"),
    *("dynamic_degree", "aesthetic_quality", "imaging_quality"),
)
"""What VBench-I2V measures of any videos; `camera_motion` wants its own prompts."""

_RATIOS = {"1-1": 1.0, "8-5": 1.6, "7-4": 1.75, "16-9": 16 / 9}
_LONGEST = 240  # bytes of a name


def export(parts: Parts, clips: Inputs, folder: Path, fps: float) -> str:
    """Writes `videos/PROMPT-INDEX.mp4` and `images/PROMPT.jpg`; returns a line for a shell in VBench's repository.

    Where several images have one prompt, or class, their numbers are put behind it.
    """
    found = parts.all()
    sources = [clips.source(number) for number in found.numbers]
    names = names_of(found.conditions, sources)
    seen: Counter[str] = Counter()
    with writing(folder):
        for inner in ("videos", "images"):
            (folder / inner).mkdir(parents=True, exist_ok=True)
        for number, name in zip(found.numbers, names, strict=True):
            video = parts.video(number)
            write_video(video.permute(0, 2, 3, 1), folder / "videos" / f"{name}-{seen[name]}.mp4", fps=fps)
            clip = clips.read(number)
            if not seen[name] and isinstance(clip, Clip):
                picture = Image.fromarray(clip.frames[0].permute(1, 2, 0).numpy())
                picture.save(folder / "images" / f"{name}.jpg", quality=95)
            seen[name] += 1
    height, width = video.shape[-2:]
    ratio = min(_RATIOS, key=lambda name: abs(_RATIOS[name] - width / height))
    places = [str(folder.absolute() / inner) for inner in ("videos", "images")]
    options = ["--mode=custom_input", "--ratio", ratio, "--videos_path", places[0], "--custom_image_folder", places[1]]
    command = f"python evaluate_i2v.py {shlex.join(options)} --dimension $dimension"
    return f"for dimension in {' '.join(DIMENSIONS)}; do {command}; done"


def names_of(conditions: Sequence[Any], sources: Sequence[str]) -> list[str]:
    """The names of videos by their conditions and images; a `FrameBridgeError` where one cannot be a file's."""
    images: dict[str, list[str]] = {}
    for condition, source in zip(map(str, conditions), sources, strict=True):
        if "/" in condition or "\0" in condition or not 0 < len(condition.encode()) < _LONGEST:
            raise FrameBridgeError(f"--vbench: {condition!r} cannot be the name of a file; give other captions")
        known = images.setdefault(condition, [])
        if source not in known:
            known.append(source)
    return [
        condition if len(images[condition]) == 1 else f"{condition} {images[condition].index(source)}"
        for condition, source in zip(map(str, conditions), sources, strict=True)
    ]
