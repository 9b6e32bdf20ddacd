"""From a video file to the float tensor that training sees: which frames, how large, which way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from framebridge_plugin.data.decoding.decoders import Decoder, read_video
from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.data.decoding.exact import read_timing
from framebridge_plugin.data.decoding.isolation import read_timing_isolated, read_video_isolated
from framebridge_plugin.errors import UsageError
from framebridge_plugin.resizing import resize_and_crop

FrameSampling = Literal["stride", "linspace"]
Window = Literal["random", "start"]
Resize = Literal["torch", "decoder"]


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
        decoder: "pyav" reads every file exactly. "decord" is refused for files that it is not known to read
            rightly.
        strict: Whether damage in the stream is an error. Else FFmpeg hides what it can. With "pyav" only.
        resize: "torch" resizes with antialiasing; "decoder" has FFmpeg do it while it converts the pictures, which
            gives other pixels, needs less memory, and is faster for large pictures (about 720 rows and more). The
            latter with "pyav" only.
        isolated: Whether a child process decodes, so that a decoder that crashes or hangs costs one clip and not the
            run.

    Raises:
        UsageError: A value is out of its range, or does not go with another.
    """

    num_frames: int
    height: int
    width: int
    frame_stride: int = 1
    window: Window = "random"
    horizontal_flip: bool = False
    frame_sampling: FrameSampling = "stride"
    window_frames: int | None = None
    decoder: Decoder = "pyav"
    strict: bool = False
    resize: Resize = "torch"
    isolated: bool = False

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                choices = " or ".join(get_args(kind))
                raise UsageError(f"clip settings: {name} is {getattr(self, name)!r}; it must be {choices}")
        for name in ("horizontal_flip", "strict", "isolated"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"clip settings: {name} is {getattr(self, name)!r}; it must be true or false")
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
        if self.decoder != "pyav" and (self.strict or self.resize == "decoder"):
            option = "strict" if self.strict else "resize: decoder"
            raise UsageError(f"clip settings: {option} does not go with decoder {self.decoder}; use decoder: pyav")

    def fingerprint(self) -> dict[str, Any]:
        """What decides about the pixels of a clip, besides the file and the random draws.

        Returns:
            All settings but `isolated`, by name; values as JSON has them. And that pictures are stretched to square
            pixels, which earlier releases did not do.
        """
        settings = {name: value for name, value in asdict(self).items() if name != "isolated"}
        return settings | {"pixels": "square"}


_CHOICES = {"frame_sampling": FrameSampling, "window": Window, "decoder": Decoder, "resize": Resize}


def read_clip(path: str, settings: ClipSettings, generator: torch.Generator) -> torch.Tensor:
    """Read one clip: exact frames, shorter side resized, centre cropped, scaled to [-1, 1].

    Args:
        path: A video file.
        settings: How the clip is cut.
        generator: CPU generator of the random choices (start of the window, flip).

    Returns:
        float32 tensor of shape [num_frames, 3, height, width] in [-1, 1].

    Raises:
        ClipError: The file is broken, has fewer than `num_frames` frames, or is of a kind that the decoder reads
            wrongly.
        UsageError: The decoder does not load.
    """
    # Drawn first and always, so that neither draw depends on what the file turns out to hold.
    position, flip = torch.rand(2, generator=generator, dtype=torch.float64).tolist()

    def choose(length: int) -> Sequence[int]:
        window = frame_window(length, settings, position)
        if window is None:
            reason = f"it has {length} frames, fewer than the {settings.num_frames} of a clip"
            raise ClipError(path, reason, "too_short")
        return window

    pictures = (read_video_isolated if settings.isolated else read_video)(
        path,
        choose,
        decoder=settings.decoder,
        strict=settings.strict,
        cover=(settings.height, settings.width) if settings.resize == "decoder" else None,
    )
    frames_FCHW = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    video_FCHW = resize_and_crop(frames_FCHW, settings.height, settings.width)
    if settings.horizontal_flip and flip < 0.5:
        video_FCHW = video_FCHW.flip(3)
    return video_FCHW.mul_(2.0).sub_(1.0)


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


def clip_rate(path: str, settings: ClipSettings) -> float | None:
    """Find the rate at which a clip of a file goes by as in life.

    Args:
        path: A video file, of which only the header is read where that tells the number of frames.
        settings: How the clip is cut.

    Returns:
        Frames of the clip per second: the file's mean frame rate over the clip's mean step. None where the file does
        not say, or its clip has no two frames.

    Raises:
        ClipError: The file cannot be opened.
    """
    rate, length = (read_timing_isolated if settings.isolated else read_timing)(path)
    window = frame_window(length, settings, 0.0)
    if not rate or window is None or len(window) < 2:
        return None
    return rate * (len(window) - 1) / (window[-1] - window[0])
