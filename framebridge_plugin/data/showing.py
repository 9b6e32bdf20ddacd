"""Decoded frames as they are to be shown: upright, in square pixels, RGB."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.sizes import cover_size, square_pixel_size

MAX_PIXELS = 7680 * 4320
"""Largest picture that is decoded (8K): a broken header can announce one that fills the memory."""

MAX_BYTES = 2**31
"""Most that the pictures of a clip may take together, in each process that reads clips."""

MAX_PIXEL_ASPECT = 16
"""Pixels this many times wider than high, or higher than wide, are what a broken header says."""

# Colours are stored at half the resolution; without the second flag a resize would halve them once more.
INTERPOLATION = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT


def pixel_aspect(path: str, stream: VideoStream) -> Fraction:
    """Width of a stored pixel as it is shown, over its height; `ClipError` if it is no sensible number."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        reason = f"its sample aspect ratio is {aspect.numerator}:{aspect.denominator}, which no picture has"
        raise ClipError(path, reason, "pixel_aspect")
    return aspect


class Turn(NamedTuple):
    """What makes stored pictures upright: rows and columns are swapped, then those or these run backwards."""

    is_transposed: bool = False
    is_upside_down: bool = False
    is_mirrored: bool = False

    @property
    def is_reflection(self) -> bool:
        """Whether it is no rotation."""
        return self.is_transposed ^ self.is_upside_down ^ self.is_mirrored

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """From the stored to the upright size, or back."""
        return (size[1], size[0]) if self.is_transposed else size

    def applied(self, pictures_FHWC: np.ndarray) -> np.ndarray:
        """The upright view of stored pictures [F, H, W, 3]."""
        if self.is_transposed:
            pictures_FHWC = pictures_FHWC.transpose(0, 2, 1, 3)
        return pictures_FHWC[:, :: -1 if self.is_upside_down else 1, :: -1 if self.is_mirrored else 1]


def turn_of(path: str, frame: VideoFrame) -> Turn:
    """How a frame is to be turned before it is shown, by its display matrix; `ClipError` at an odd angle."""
    side_data: Any = frame.side_data  # A mapping by name, which PyAV's type stub does not say.
    try:
        matrix = bytes(side_data["DISPLAYMATRIX"])
    except KeyError:
        return Turn()
    # Nine 32-bit numbers (a b u, c d v, x y w) that send a stored point (p, q) to (a p + c q, b p + d q).
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    if b == c == 0 and a and d:
        return Turn(False, is_upside_down=d < 0, is_mirrored=a < 0)
    if a == d == 0 and b and c:
        return Turn(True, is_upside_down=b < 0, is_mirrored=c < 0)
    raise ClipError(path, "it is shown rotated by an angle that is no multiple of 90 degrees", "rotation")


class Conversion(NamedTuple):
    """What becomes of each decoded picture before the next one is decoded."""

    cover: tuple[int, int] | None = None
    """Height and width that FFmpeg's bilinear filter resizes it to cover."""
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    """What is made of its uint8 RGB values [H, W, 3], as [3, H, W]: large pictures are never held together."""


AS_SHOWN = Conversion()


def to_rgb(
    path: str, frames: Iterable[VideoFrame], count: int, aspect: Fraction, conversion: Conversion
) -> np.ndarray:
    """Convert so many frames, all of one size, to what `conversion` makes of each, in one array [F, ...]."""
    cover, finish = conversion
    pictures: np.ndarray | None = None
    found = 0
    turn = Turn()
    size = target = (0, 0)
    reformatter = VideoReformatter()
    for frame in frames:
        check_size(path, frame.width, frame.height)
        if pictures is None:
            turn = turn_of(path, frame)
            size = (frame.height, frame.width)
            target = square_pixel_size(*size, aspect)
            if cover is not None:
                target = turn.size(cover_size(*turn.size(target), *cover))
            check_size(path, target[1], target[0])
        if (frame.height, frame.width) != size:
            change = f"from {size[1]}x{size[0]} to {frame.width}x{frame.height}"
            raise ClipError(path, f"its picture size changes {change} within the clip", "size_change")
        rgb = reformatter.reformat(
            frame, width=target[1], height=target[0], format="rgb24", interpolation=INTERPOLATION, threads=1
        )
        picture = np.ascontiguousarray(turn.applied(rgb.to_ndarray()[None])[0])
        if finish is not None:
            picture = finish(picture)
        if pictures is None:
            shown = picture.shape[:2] if finish is None else picture.shape[1:]
            check_bytes(path, (count, *shown), picture.itemsize, is_resized=conversion != AS_SHOWN)
            pictures = np.empty((count, *picture.shape), picture.dtype)
        if found < count:
            pictures[found] = picture
        found += 1
    if pictures is None or found != count:
        raise ClipError(path, "decoding it twice gave different numbers of frames", "corrupt")
    return pictures


def resized(pictures_FHWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 RGB pictures [F, H, W, 3] by the filter that stretches pixels to squares."""
    reformatter = VideoReformatter()
    frames = (VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures_FHWC)
    return np.stack(
        [reformatter.reformat(f, width, height, interpolation=INTERPOLATION, threads=1).to_ndarray() for f in frames]
    )


def check_bytes(path: str, shape: tuple[int, ...], itemsize: int = 1, *, is_resized: bool = False) -> None:
    """Refuse RGB pictures of a shape (F, H, W), resized to a clip's or not, that take over `MAX_BYTES` together."""
    if (size := math.prod(shape) * 3 * itemsize) > MAX_BYTES:
        what = f"its {shape[0]} pictures of {shape[2]}x{shape[1]} take {size / 2**30:.1f} GiB together"
        remedy = "take fewer frames, or a smaller height and width"
        if not is_resized:
            remedy = "decoder: pyav with resize: decoder makes each small by itself"
        reason = f"{what}, more than the limit of {MAX_BYTES / 2**30:g}; {remedy}"
        raise ClipError(path, reason, "too_large")


def check_size(path: str, width: int, height: int) -> None:
    """Refuse pictures of more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        reason = f"its pictures of {width}x{height} exceed the limit of {MAX_PIXELS} pixels"
        raise ClipError(path, reason, "too_large")
