"""From a video file to the float tensor that training sees: which frames, how large, which way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from framebridge_plugin.data.decoding import ClipError, read_frames
from framebridge_plugin.errors import UsageError
from framebridge_plugin.resizing import resize_and_crop

FrameSampling = Literal["stride", "linspace"]
Window = Literal["random", "start"]


@dataclass(frozen=True)
class ClipSettings:
    """How a clip is cut out of a video.

    Attributes:
        num_frames: Frames per clip, at least 1.
        height: Height of the clip in pixels.
        width: Width of the clip in pixels.
        frame_stride: Distance of neighbouring frames of the clip in frames of the file, at least 1. A file that is
            too short for it gets the longest stride that fits. The reference takes 3 for WebVid.
        frame_sampling: "stride" takes every `frame_stride`-th frame. "linspace" takes `num_frames` frames that are
            spread over `window_frames` successive ones, both ends included and rounded down, or over the whole file
            if it is shorter; the reference does so with 16 of 48 frames for UCF-101.
        window_frames: Length of the window for "linspace", at least `num_frames`; None for "stride".
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
    frame_sampling: FrameSampling = "stride"
    window_frames: int | None = None

    def __post_init__(self) -> None:
        if self.frame_sampling not in get_args(FrameSampling):
            raise UsageError(
                f"clip settings: frame_sampling is {self.frame_sampling!r}; it must be "
                f"{' or '.join(get_args(FrameSampling))}"
            )
        is_linspace = self.frame_sampling == "linspace"
        if is_linspace != (self.window_frames is not None):
            raise UsageError("clip settings: window_frames goes with frame_sampling linspace, and only with it")
        for name in ("num_frames", "height", "width", "frame_stride", *(["window_frames"] if is_linspace else [])):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"clip settings: {name} is {value!r}; it must be a whole number of at least 1")
        if is_linspace and self.frame_stride != 1:
            raise UsageError("clip settings: frame_stride is for frame_sampling stride; leave it out with linspace")
        if self.window_frames is not None and self.window_frames < self.num_frames:
            raise UsageError(
                f"clip settings: window_frames is {self.window_frames}; it must be at least num_frames, "
                f"{self.num_frames}"
            )
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

    def choose(length: int) -> Sequence[int]:
        window = frame_window(length, settings, position)
        if window is None:
            raise ClipError(path, f"it has {length} frames, fewer than the {settings.num_frames} of a clip")
        return window

    video_FCHW = resize_and_crop(read_frames(path, choose), settings.height, settings.width)
    if settings.horizontal_flip and flip < 0.5:
        video_FCHW = video_FCHW.flip(3)
    return video_FCHW * 2.0 - 1.0


def frame_window(length: int, settings: ClipSettings, position: float) -> Sequence[int] | None:
    """Choose the frame numbers of a clip.

    Args:
        length: Number of frames in the file.
        settings: How the clip is cut.
        position: Where in the range of possible starts the clip begins, in [0, 1); "start" windows ignore it.

    Returns:
        `num_frames` strictly increasing frame numbers, or None if the file has fewer frames than that. With "stride"
        they are evenly spaced, at the wanted stride or the longest shorter one that fits.
    """
    if length < settings.num_frames:
        return None
    steps = settings.num_frames - 1
    if settings.window_frames is not None:
        span = min(settings.window_frames, length)
        offsets: Sequence[int] = [step * (span - 1) // steps for step in range(steps + 1)] if steps else [0]
    else:
        stride = min(settings.frame_stride, (length - 1) // steps) if steps else 1
        span = steps * stride + 1
        offsets = range(0, span, stride)
    start = int(position * (length - span + 1)) if settings.window == "random" else 0
    return [start + offset for offset in offsets]
