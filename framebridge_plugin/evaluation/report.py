"""What an evaluation found: one JSON with all of it, a table, and a picture of the worst, the median and the best."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from framebridge_plugin.errors import FrameBridgeError, escaped
from framebridge_plugin.evaluation.clips import Clip, Inputs
from framebridge_plugin.evaluation.measuring import OF_TRUTH, Columns, summarise
from framebridge_plugin.evaluation.parts import Part, Parts
from framebridge_plugin.files import write_whole, writing
from framebridge_plugin.media import contact_sheet


class Looked(NamedTuple):
    """What trained networks found of all videos.

    Attributes:
        facts: What decides about the values of each, by name.
        columns: Values of each video.
        figures: Figures of all together, as `summarise` has them.
    """

    facts: dict[str, Any]
    columns: Columns
    figures: dict[str, dict[str, Any]]


ROWS = {
    "error": "squared error to the true clip, pixels in [-1, 1], without frame 0",
    "psnr": "PSNR to the true clip, dB",
    "first_psnr": "PSNR of frame 0 to the image, dB",
    "first_ssim": "SSIM of frame 0 to the image",
    "shift_correlation": "correlation of the picture's shifts with the true ones",
    "motion": "motion: mean change of a pixel from frame to frame, of 1",
    "motion_ratio": "motion, of the true clips' as 1",
    "spectrum_distance": "distance of the motion's spectrum from the true one, 0 to 1",
    "order": "order of the frames: 0 shuffled, near 1 smooth",
    "block_residual": "share of the change that no moving blocks explain",
    "stlpips": "ST-LPIPS (AlexNet) to the true clip",
    "vmaf": "VMAF to the true clip, 0 to 100",
    "fvd": "FVD",
    "transnetv2": "Frechet distance, TransNetV2: fc1, mean and deviation over frames",
    "efficientnet_lite0": "Frechet distance, EfficientNet-Lite0: mean over frames, blind to motion",
}
"""The lines of the table, and what they are called there."""


def write_report(
    parts: Parts, protocol: Mapping[str, Any], clips: Inputs, looked: Looked, about: Mapping[str, Any]
) -> list[Path]:
    """Writes `evaluation.json`, `.md` and `.png` into the folder of an evaluation.

    Args:
        parts: Its videos, all of them.
        protocol: What they were made by.
        clips: What they are compared with.
        looked: What trained networks found of them.
        about: What else the JSON begins with: where model and data were, and how many clips are `trained_on`.

    Returns:
        The files.

    Raises:
        FrameBridgeError: No clip could be read, or a file is damaged or cannot be written.
    """
    found = parts.all()
    if not found.numbers:
        first = next(iter(found.bad_files), {"reason": "there are none"})
        raise FrameBridgeError(f"none of the {parts.count} clips can be read: {first['reason']}")
    found = found._replace(columns=found.columns | looked.columns)
    summary = summarise(found.columns) | looked.figures
    content = {
        **about,
        "protocol": dict(protocol),
        "networks": looked.facts,
        "evaluated": len(found.numbers),
        "left_out": found.bad_files,
        "measures": summary,
        "clips": list(_of_clips(found, protocol, clips)),
    }
    paths = [parts.output / f"evaluation.{suffix}" for suffix in ("json", "md", "png")]
    with writing(parts.output):
        write_whole(paths[0], json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_whole(paths[1], "\n".join(_table(summary, protocol, found, about["trained_on"])) + "\n")
        _picture(parts, found, clips, paths[2])
    return paths


def _of_clips(found: Part, protocol: Mapping[str, Any], clips: Inputs) -> Iterator[dict[str, Any]]:
    single = {name: values.tolist() for name, values in found.columns.items() if values.ndim == 1}
    for row, (number, condition) in enumerate(zip(found.numbers, found.conditions, strict=True)):
        said = {"number": number, "source": clips.source(number), "condition": condition}
        yield said | {"seed": protocol["seed"] + number} | {name: values[row] for name, values in single.items()}


def _table(
    summary: Mapping[str, Any], protocol: Mapping[str, Any], found: Part, trained_on: int | None
) -> Iterator[str]:
    sampling, (height, width) = protocol["sampling"], protocol["resolution"]
    how = "one call of the network" if "steps" not in sampling else f"{sampling['steps']} steps"
    if "guidance_scale" in sampling:
        how += f", guidance {sampling['guidance_scale']:g}, {sampling.get('sampler') or sampling['scheduler']}"
    sets = protocol.get("clips", ())
    splits = {f", split {clips['split']}, fold {clips['fold']}" for clips in sets if clips["split"] != "all"}
    yield f"# {len(found.numbers)} videos of {protocol['frames']} frames of {width}x{height}"
    yield ""
    yield f"{protocol['model']}: {how}; seeds {protocol['seed']} + clip's number{''.join(sorted(splits))}."
    if found.bad_files:
        yield f"{len(found.bad_files)} of {protocol['count']} clips cannot be read and are left out."
    if trained_on:
        yield f"The model was trained on {trained_on} of the clips."
    if f"{OF_TRUTH}motion" not in summary:
        yield "Of images alone: what compares with true clips is left out."
    yield "Means, with standard errors over clips. All settings and all clips are in evaluation.json."
    yield ""
    yield "| | samples | true clips | image repeated |"
    yield "|---|---|---|---|"
    for name, title in ROWS.items():
        if name in summary:
            others = (figure_text(summary.get(f"{prefix}{name}")) for prefix in ("", OF_TRUTH, "repeated."))
            yield f"| {title} | {' | '.join(others)} |"


def figure_text(figure: Mapping[str, float | None] | None) -> str:
    """A figure of a summary with its standard error; nothing for none."""
    if figure is None:
        return ""
    mean, error = figure["mean"], figure["standard_error"]
    if mean is None:
        return "none"
    size = abs(error or mean)
    digits = 3 if not size else max(0, (1 if error else 2) - math.floor(math.log10(size)))
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _picture(parts: Parts, found: Part, clips: Inputs, path: Path) -> None:
    """Of the clips with the largest, the median and the smallest error: image, true clip and, below it, the sample."""
    name = "psnr" if clips.has_truth else "first_psnr"
    values = found.columns[name]
    order = values.argsort(stable=True).tolist()
    videos, labels, images = [], [], []
    for rank, place in (("worst", 0), ("median", len(order) // 2), ("best", -1)):
        row = order[place]
        number, clip = found.numbers[row], clips.read(found.numbers[row])
        if isinstance(clip, Clip):
            shown = [clip.frames] if clips.has_truth else []
            image = Image.fromarray(clip.frames[0].permute(1, 2, 0).numpy())
            said = f"{rank} of {len(order)}: {number}, {found.conditions[row]}, {name} {values[row]:.1f} dB"
            for video in (*shown, parts.video(number)):
                videos.append(video.permute(0, 2, 3, 1))
                labels.append(escaped(said))
                images.append(image)
                said = "sampled"
    if videos:
        contact_sheet(videos, path, labels=labels, images=images)
