"""Videos whose pictures carry their frame number, so that a wrong frame is never mistaken for the right one."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

HEIGHT, WIDTH = 48, 64
BLOCK = 16


def numbered_picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Eight black or white blocks, four in a row, spell the number in binary."""
    picture = np.full((height, width, 3), 96, np.uint8)
    for bit in range(8):
        top, left = BLOCK * (bit // 4), BLOCK * (bit % 4)
        picture[top : top + BLOCK, left : left + BLOCK] = 255 * (number >> bit & 1)
    return picture


def numbers_in(video_FCHW: torch.Tensor) -> list[int]:
    """Read the numbers back; pictures of any value range."""
    middle = (float(video_FCHW.max()) + float(video_FCHW.min())) / 2
    numbers = []
    for picture in video_FCHW.float().mean(1):
        number = 0
        for bit in range(8):
            top, left = BLOCK * (bit // 4) + 4, BLOCK * (bit % 4) + 4
            number |= int(picture[top : top + 8, left : left + 8].mean() > middle) << bit
        numbers.append(number)
    return numbers


def tensor(pictures_FHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures_FHWC).permute(0, 3, 1, 2)


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 40,
    options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    audio: bool = False,
    container_options: dict[str, str] | None = None,
    picture=numbered_picture,
) -> Path:
    """Write numbered frames; `pts` gives their times in units of 1/100 s instead of a constant 25 per second."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=100 if pts else 25, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if audio:
            sound = container.add_stream("aac", rate=16000)
        if pts:
            stream.codec_context.time_base = Fraction(1, 100)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[number], Fraction(1, 100)
            container.mux(stream.encode(frame))
            if audio:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.float32), format="fltp", layout="mono")
                samples.sample_rate = 16000
                container.mux(sound.encode(samples))
        container.mux(stream.encode())
        if audio:
            container.mux(sound.encode())
    return path
