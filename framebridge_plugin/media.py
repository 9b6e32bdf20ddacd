"""Pictures and videos in and out: reading an image, writing mp4 files, contact sheets and loss curves.

The libraries load on first use: this module is imported before torch is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framebridge_plugin.errors import FrameBridgeError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_QUALITY = 9  # of 10, imageio's scale: these files are for judging pictures


def read_image(path: str | Path) -> Image.Image:
    """Read a picture, turned upright as its EXIF says.

    Args:
        path: A file in any format that Pillow reads.

    Returns:
        The picture in RGB.

    Raises:
        UsageError: If it is missing, empty, cut off or no picture; the message begins with the path.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "is no picture" if type(error).__name__ == "UnidentifiedImageError" else f"cannot be read ({error})"
        raise UsageError(f"{path}: {reason}; give a PNG or JPEG file") from None


def to_uint8(video: Any) -> np.ndarray:
    """Bring a video to bytes.

    Args:
        video: Bytes of shape [T, H, W, 3], or floats of shape [T, 3, H, W] in [0, 1] (clipped); an array or a tensor
            on any device.

    Returns:
        Bytes of shape [T, H, W, 3].

    Raises:
        FrameBridgeError: If the shape is another, or a value is not finite.
    """
    import numpy as np

    if hasattr(video, "detach"):  # a tensor; numpy has no bfloat16
        video = video.detach().cpu()
        video = video.float().numpy() if video.is_floating_point() else video.numpy()
    video = np.asarray(video)
    if video.dtype == np.uint8 and video.ndim == 4 and video.shape[-1] == 3 and len(video):
        return video
    if not np.issubdtype(video.dtype, np.floating) or video.ndim != 4 or video.shape[1] != 3 or not len(video):
        shape = f"{video.dtype} {list(video.shape)}"
        raise FrameBridgeError(f"a video is uint8 [T, H, W, 3] or float [T, 3, H, W], with T > 0, not {shape}")
    if not np.isfinite(video).all():
        raise FrameBridgeError("the video holds values that are not finite: the model's output is broken")
    return (video.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def write_video(video: Any, path: str | Path, fps: float = 8) -> None:
    """Write an mp4 file (H.264, yuv420p) that every player opens.

    H.264 in yuv420p needs even sizes: an odd height or width is extended by one line, repeating the last.

    Args:
        video: See `to_uint8`.
        path: The file; its folder is created.
        fps: Frames per second.
    """
    import imageio.v2 as imageio
    import numpy as np

    frames = to_uint8(video)
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # macro_block_size 1: imageio would otherwise resize to multiples of 16.
    with imageio.get_writer(
        path, format="FFMPEG", fps=fps, codec="libx264", quality=_QUALITY, pixelformat="yuv420p", macro_block_size=1
    ) as writer:
        for frame in frames:
            writer.append_data(frame)  # type: ignore[attr-defined]


def contact_sheet(
    videos: Sequence[Any],
    path: str | Path,
    columns: int = 8,
    labels: Sequence[str] = (),
) -> None:
    """Lay videos out as one PNG: a row per video, frames from left to right.

    Args:
        videos: See `to_uint8`; sizes may differ.
        path: The file; its folder is created.
        columns: At most so many frames of each video, spread evenly from the first to the last.
        labels: A line of text above each row; none by default.

    Raises:
        FrameBridgeError: If there is no video.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    if not videos:
        raise FrameBridgeError("a contact sheet needs at least one video")
    rows = []
    for video in videos:
        frames = to_uint8(video)
        rows.append(frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)])
    gap, text_height = 2, 14 if labels else 0
    width = max(len(row) * (row.shape[2] + gap) for row in rows) - gap
    height = sum(row.shape[1] + gap + text_height for row in rows) - gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for i, row in enumerate(rows):
        if i < len(labels):
            draw.text((1, top + 1), labels[i], fill="black")
        top += text_height
        for j, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (j * (row.shape[2] + gap), top))
        top += row.shape[1] + gap
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def loss_curve(metrics: str | Path, path: str | Path, key: str = "loss", window: int = 25) -> None:
    """Draw a run's loss over its updates, with a running mean.

    Args:
        metrics: JSON lines with the keys `step` and `key`; lines without both are passed over, as is a last line
            that was cut off.
        path: The PNG file; its folder is created.
        key: What to draw.
        window: Updates in the running mean.

    Raises:
        FrameBridgeError: If there is nothing to draw.
    """
    import numpy as np

    steps, losses = _read_metric(Path(metrics), key)
    if not steps:
        raise FrameBridgeError(f"{metrics}: no line has both 'step' and {key!r}")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label=key)
    if len(losses) > window:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color="C0", label=f"mean of {window}")
    axes.set(xlabel="update", ylabel=key, yscale="log" if min(losses) > 0 else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _read_metric(path: Path, key: str) -> tuple[list[int], list[float]]:
    if not path.is_file():
        raise FrameBridgeError(f"{path}: no such file")
    values: dict[int, float] = {}  # a resumed run writes some steps again: the later line counts
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry and key in entry:
            values[entry["step"]] = entry[key]
    return sorted(values), [values[step] for step in sorted(values)]
