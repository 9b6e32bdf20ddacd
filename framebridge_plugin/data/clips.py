"""From a video file to the float tensor that training sees: which frames, how large, which way round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from framebridge_plugin.data.decoding import ClipError, read_frames
from framebridge_plugin.errors import UsageError
from framebridge_plugin.resizing import resize_and_crop

Window = Literal["random", "start"]


@dataclass(frozen=True)
class ClipSettings:
    """How a clip is cut out of a video.

    Attributes:
        num_frames: Frames per clip, at least 1.
        height: Height of the clip in pixels.
        width: Width of the clip in pixels.
        frame_stride: Distance of neighbouring frames of the clip in frames of the file, at least 1. A file that is
            too short for it gets the longest stride that fits.
        window: Where the clip starts: "random" draws the start, "start" takes the first frame of the file.
        horizontal_flip: Whether every other clip, by chance, is mirrored left to right.

    Raises:
        UsageError: A value is out of its range.
    """

    num_frames: int
    height: int
    width: int
    frame_stride: int = 1
    window: Window = "random"
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "frame_stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"clip settings: {name} is {value!r}; it must be a whole number of at least 1")
        if self.window not in get_args(Window):
            raise UsageError(f"clip settings: window is {self.window!r}; it must be {' or '.join(get_args(Window))}")
        if not isinstance(self.horizontal_flip, bool):
            raise UsageError(f"clip settings: horizontal_flip is {self.horizontal_flip!r}; it must be true or false")


def read_clip(path: str, settings: ClipSettings, generator: torch.Generator) -> torch.Tensor:
    """Read one clip: exact frames, shorter side resized, centre cropped, scaled to [-1, 1].

    Args:
        path: A video file.
        settings: How the clip is cut.
        generator: CPU generator of the random choices (start of the window, flip).

    Returns:
        float32 tensor of shape [num_frames, 3, height, width] in [-1, 1].

    Raises:
        ClipError: The file is broken, or has fewer than `num_frames` frames.
    """
    # Drawn first and always, so that neither draw depends on what the file turns out to hold.
    position, flip = torch.rand(2, generator=generator, dtype=torch.float64).tolist()

    def choose(length: int) -> range:
        window = frame_window(length, settings, position)
        if window is None:
            raise ClipError(path, f"it has {length} frames, fewer than the {settings.num_frames} of a clip")
        return window

    video_FCHW = resize_and_crop(read_frames(path, choose), settings.height, settings.width)
    if settings.horizontal_flip and flip < 0.5:
        video_FCHW = video_FCHW.flip(3)
    return video_FCHW * 2.0 - 1.0


def frame_window(length: int, settings: ClipSettings, position: float) -> range | None:
    """Choose the frame numbers of a clip.

    Args:
        length: Number of frames in the file.
        settings: How the clip is cut.
        position: Where in the range of possible starts the clip begins, in [0, 1); "start" windows ignore it.

    Returns:
        `num_frames` evenly spaced frame numbers, at the wanted stride or the longest shorter one that fits, or None
        if the file is too short even for stride 1.
    """
    if length < settings.num_frames:
        return None
    steps = settings.num_frames - 1
    stride = min(settings.frame_stride, (length - 1) // steps) if steps else 1
    span = steps * stride + 1
    start = int(position * (length - span + 1)) if settings.window == "random" else 0
    return range(start, start + span, stride)
