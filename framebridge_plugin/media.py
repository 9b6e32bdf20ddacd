"""Pictures and videos in and out: reading an image, writing mp4 files, contact sheets and loss curves.

The libraries load on first use: this module is imported before torch is needed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import open_regular

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

DEFAULT_FPS = 8.0
"""Frames per second of a video where nothing says them: the reference's."""

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What pictures may be. Pillow opens others by starting other programs, such as Ghostscript for EPS."""

MAX_PICTURE_PIXELS = 2**26
"""Largest picture that is read: a small file can announce one that fills the memory."""

_FOLDER = "is a folder; name the pictures in it, such as {}/*.png"
_QUALITY = 9  # of 10, imageio's scale: these files are for judging pictures
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_ROUNDING = 1e-6  # of floats that were computed


def read_image(picture: str | Path | Image.Image) -> Image.Image:
    """Read a picture as `picture_levels` does, rounded to 8 bits.

    Args:
        picture: As for `picture_levels`.

    Returns:
        The picture in RGB.

    Raises:
        UsageError: As `picture_levels`.
        FrameBridgeError: As `picture_levels`.
    """
    import numpy as np
    from PIL import Image

    return Image.fromarray((picture_levels(picture) * 255).round().astype(np.uint8))


def picture_levels(picture: str | Path | Image.Image) -> np.ndarray:
    """Read a picture: turned upright as its EXIF says, scaled by the range of its type, on white where transparent."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(picture, Image.Image):
        try:
            return _levels_of_image(picture)
        except ValueError as error:
            raise FrameBridgeError(f"image: {error}") from None
    path = Path(picture)
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with Image.open(file, formats=PICTURE_FORMATS) as image:
                if image.width * image.height > MAX_PICTURE_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height}")
                return _levels_of_image(image)
    except FrameBridgeError as error:
        raise UsageError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: {_FOLDER.format(path)}") from None
    except Image.DecompressionBombError as error:
        limit = f"more than {MAX_PICTURE_PIXELS} pixels"
        raise UsageError(f"{path}: is too large ({error}), {limit}; make it smaller") from None
    except (OSError, ValueError, SyntaxError) as error:
        what = getattr(error, "strerror", None) or error
        reason = "is no picture" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({what})"
        raise UsageError(f"{path}: {reason}; give a PNG, JPEG, WebP, BMP, GIF or TIFF file") from None


def pictures_levels(pictures: Any) -> list[np.ndarray]:
    """RGB in [0, 1], float32 [H, W, 3], of pictures in every form in which diffusers takes them."""
    import numpy as np
    from PIL import Image

    if isinstance(pictures, list | tuple):
        return [levels for item in pictures for levels in pictures_levels(item)]
    if isinstance(pictures, str | Path | Image.Image):
        return [picture_levels(pictures)]
    is_tensor = hasattr(pictures, "detach")
    array = _to_array(pictures)
    dimensions = (3, 4) if is_tensor else (2, 3, 4)
    if isinstance(array, np.ndarray) and array.ndim in dimensions and array.size:
        pixels = np.moveaxis(array, -3, -1) if is_tensor else array[..., None] if array.ndim == 2 else array
        if pixels.shape[-1] in (1, 3, 4):
            try:
                levels = array_levels(pixels)
            except FrameBridgeError as error:
                raise FrameBridgeError(f"image: {error}") from None
            return list(_on_white(levels if levels.ndim == 4 else levels[None]))
    found = type(pictures).__name__
    if isinstance(array, np.ndarray):
        found = f"{'a tensor' if is_tensor else 'an array'} of shape {list(array.shape)}"
    raise FrameBridgeError(
        "image: should be a file, a PIL image, an array [H, W, 3] or a tensor [3, H, W], or several of them, "
        f"not {found}"
    )


def array_levels(array: np.ndarray) -> np.ndarray:
    """Values of uint8, uint16, bool or floats in [0, 1], scaled by the range of their type to float32 in [0, 1]."""
    import numpy as np

    if array.dtype == bool:
        return array.astype(np.float32)
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    remedy = "give uint8, uint16 or floats in [0, 1]"
    if not np.issubdtype(array.dtype, np.floating):
        raise FrameBridgeError(f"values of type {array.dtype} have no known range; {remedy}")
    if not np.isfinite(array).all():
        raise FrameBridgeError(f"holds values that are not finite; {remedy}")
    low, high = float(array.min()), float(array.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise FrameBridgeError(f"floats should be in [0, 1], these go from {low:g} to {high:g}; {remedy}")
    return array.astype(np.float32).clip(0, 1)


def _levels_of_image(image: Image.Image) -> np.ndarray:
    import numpy as np
    from PIL import ImageOps

    tags = getattr(image, "tag_v2", {})  # of a TIFF, which Pillow neither inverts nor scales where it is deep
    is_inverted, bits = tags.get(_PHOTOMETRIC) == 0, tags.get(_BITS_PER_SAMPLE, (16,))[0]
    image = ImageOps.exif_transpose(image)
    if image.mode != "F" and not image.mode.startswith("I"):
        has_alpha, hidden = image.has_transparency_data, image.info.get("transparency")
        if image.mode == "RGB" and isinstance(hidden, tuple) and max(hidden) > 255:
            image.info["transparency"] = tuple(value >> 8 for value in hidden)  # as Pillow reads 16 bits of RGB
        return _on_white(array_levels(np.asarray(image.convert("RGBA" if has_alpha else "RGB"))))
    values = np.asarray(image)
    levels = array_levels(values)
    if image.mode.startswith("I;16"):
        levels *= np.float32((2**16 - 1) / (2**bits - 1))
    if is_inverted:
        levels = 1 - levels
    alpha = [values != image.info["transparency"]] if "transparency" in image.info else []
    return _on_white(np.stack([levels, levels, levels, *alpha], axis=-1, dtype=np.float32))


def _on_white(levels: np.ndarray) -> np.ndarray:
    """RGB [..., 3] of [..., C] with C 1 (grey), 3 or 4 (alpha last), composited on white."""
    if levels.shape[-1] == 4:
        colours, alpha = levels[..., :3], levels[..., 3:]
        return colours * alpha + (1 - alpha)
    return levels.repeat(3, axis=-1) if levels.shape[-1] == 1 else levels


def _to_array(values: Any) -> Any:
    """Tensors as arrays, in float32 where numpy lacks the type; anything else as it is."""
    if not hasattr(values, "detach"):
        return values
    values = values.detach().cpu()
    return values.float().numpy() if values.is_floating_point() else values.numpy()


def to_uint8(video: Any) -> np.ndarray:
    """Bytes [T, H, W, 3] of a video: such bytes, or floats [T, 3, H, W] in [0, 1]; array, tensor or pictures."""
    import numpy as np

    video = np.asarray(_to_array(video))
    if video.dtype == np.uint8 and video.ndim == 4 and video.shape[-1] == 3 and len(video):
        return video
    if not np.issubdtype(video.dtype, np.floating) or video.ndim != 4 or video.shape[1] != 3 or not len(video):
        shape = f"{video.dtype} {list(video.shape)}"
        raise FrameBridgeError(f"a video is uint8 [T, H, W, 3] or float [T, 3, H, W], with T > 0, not {shape}")
    if not np.isfinite(video).all():
        raise FrameBridgeError("the video holds values that are not finite: the model's output is broken")
    try:
        levels = array_levels(video)
    except FrameBridgeError as error:
        raise FrameBridgeError(f"video: {error}") from None
    return (levels * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def write_video(video: Any, path: str | Path, fps: float = DEFAULT_FPS) -> None:
    """Write an mp4 file (H.264, yuv420p) that every player opens; an odd height or width is extended by a line."""
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
    if not (Path(path).is_file() and Path(path).stat().st_size):  # ffmpeg's own failure goes by in silence
        raise FrameBridgeError(f"cannot write {path}; is there room, and no folder of that name?")


def contact_sheet(
    videos: Sequence[Any],
    path: str | Path,
    columns: int = 8,
    labels: Sequence[str] = (),
    images: Sequence[Image.Image] = (),
) -> None:
    """Lay videos out as one PNG: a row per video, frames from left to right."""
    import numpy as np
    from PIL import Image, ImageDraw

    if not videos:
        raise FrameBridgeError("a contact sheet needs at least one video")
    rows = []
    for video in videos:
        frames = to_uint8(video)
        rows.append(frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)])
    gap, text_height = 2, 14 if labels else 0
    inputs = [
        read_image(image).resize((max(1, round(image.width * row.shape[1] / image.height)), row.shape[1]))
        for image, row in zip(images, rows, strict=False)
    ]
    margin = max((image.width + 4 * gap for image in inputs), default=0)
    width = margin + max(len(row) * (row.shape[2] + gap) for row in rows) - gap
    height = sum(row.shape[1] + gap + text_height for row in rows) - gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for i, row in enumerate(rows):
        if i < len(labels):
            draw.text((1, top + 1), labels[i], fill="black")
        top += text_height
        if i < len(inputs):
            sheet.paste(inputs[i], (0, top))
        for j, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (margin + j * (row.shape[2] + gap), top))
        top += row.shape[1] + gap
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def loss_curve(metrics: str | Path, path: str | Path, key: str = "loss", window: int = 25) -> None:
    """Draw a run's loss over its updates, with a running mean."""
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
