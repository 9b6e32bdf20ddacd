"""From a video file to the pixels that training sees: which frames, how large, which way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from framebridge_plugin.data.decoding.decoders import read_video
from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.data.decoding.exact import read_timing
from framebridge_plugin.data.decoding.isolation import read_timing_isolated, read_video_isolated
from framebridge_plugin.data.showing import Conversion
from framebridge_plugin.resizing import as_floats, covering_crop
from framebridge_plugin.settings.base import CheckedSettings
from framebridge_plugin.settings.data import ClipSection


class ClipSettings(CheckedSettings, ClipSection):
    """How a clip is cut out of a video; `settings.data.ClipSection` says what each setting means.

    Raises:
        UsageError: A value is out of its range, or does not go with another.
    """

    called = "clip settings"

    def fingerprint(self) -> dict[str, Any]:
        """What decides about the pixels of a clip, besides the file and the random draws; values as JSON has them."""
        return self.model_dump(exclude={"isolated"}) | {"pixels": "square"}


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
    return as_floats(read_pixels(path, settings, generator))


def read_pixels(path: str, settings: ClipSettings, generator: torch.Generator) -> torch.Tensor:
    """The same clip as `read_clip` before it is scaled: uint8, a quarter of the memory, [num_frames, 3, H, W]."""
    # Drawn first and always, so that neither draw depends on what the file turns out to hold.
    position, flip = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    size = settings.height, settings.width

    def choose(length: int) -> Sequence[int]:
        return clip_frames(path, length, settings, position)

    def finish(picture_HWC: np.ndarray) -> np.ndarray:
        return covering_crop(torch.from_numpy(picture_HWC).permute(2, 0, 1)[None], *size)[0].numpy()

    options: dict[str, Any] = {"decoder": settings.decoder, "strict": settings.strict}
    cover = size if settings.resize == "decoder" else None
    if settings.isolated:
        pictures = map(finish, read_video_isolated(path, choose, conversion=Conversion(cover), **options))
        video_FCHW = torch.from_numpy(np.stack([*pictures]))
    else:
        video_FCHW = torch.from_numpy(read_video(path, choose, conversion=Conversion(cover, finish), **options))
    if settings.horizontal_flip and flip < 0.5:
        video_FCHW = video_FCHW.flip(3)
    return video_FCHW


def clip_frames(path: str, length: int, settings: ClipSettings, position: float) -> Sequence[int]:
    """What `frame_window` gives for a file of `length` frames; `ClipError` if they are too few."""
    window = frame_window(length, settings, position)
    if window is None:
        reason = f"it has {length} frames, fewer than the {settings.num_frames} of a clip"
        raise ClipError(path, reason, "too_short")
    return window


def frame_window(length: int, settings: ClipSettings, position: float) -> Sequence[int] | None:
    """The numbers of a clip's frames in a file of so many, strictly increasing; None if it has too few.

    `position`, in [0, 1), says where in the range of possible starts a "random" window begins. A file too short for
    `frame_stride` gets the longest stride that fits, one too short for `window_frames` is spanned as a whole.
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
    """Frames per second at which a clip of a file goes by as in life; None where the file does not say."""
    rate, length = (read_timing_isolated if settings.isolated else read_timing)(path)
    window = frame_window(length, settings, 0.0)
    if not rate or window is None or len(window) < 2:
        return None
    return rate * (len(window) - 1) / (window[-1] - window[0])
