"""Videos and a table of clips to measure with: made here, the same on every machine, nothing to download."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

ROWS_PER_FOLDER = 1000
# A file system allows only so many names for one file (ext4: 65,000).
NAMES_PER_FILE = 50_000


@dataclass(frozen=True)
class VideoForm:
    """How a video is stored: size, codec, container, bits per second, and the distance of its key frames."""

    width: int
    height: int
    frames: int
    key_every: int
    bit_rate: int
    codec: str = "libx264"
    suffix: str = ".mp4"


def write_video(path: Path, form: VideoForm) -> None:
    """Writes a textured scene that a camera pans over, two things that move in it, and a camera's noise."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(form.codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = form.width, form.height, "yuv420p"
        stream.bit_rate = form.bit_rate
        stream.codec_context.gop_size = form.key_every
        stream.codec_context.thread_count = 1
        if form.codec == "mpeg4":
            stream.codec_context.codec_tag = "XVID"
        for picture in _pictures(form):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode())


def _pictures(form: VideoForm) -> Iterator[np.ndarray]:
    height, width = form.height, form.width
    generator = np.random.default_rng(0)
    reach = 2 * form.frames
    scene = [_texture(generator, height // part + 64, (width + reach) // part + 64, part) for part in (1, 2, 2)]
    things = [[_texture(generator, height // part, width // part, part) for part in (1, 2, 2)] for _ in range(2)]
    noise = generator.normal(0, 2.5, (height + 64, width + 64)).astype(np.float32)
    for number in range(form.frames):
        planes = []
        for plane, part in enumerate((1, 2, 2)):
            left, top = 2 * number // part, int(16 + 12 * np.sin(number / 20)) // part
            picture = scene[plane][top : top + height // part, left : left + width // part].copy()
            for index, thing in enumerate(things):
                x = int(width * (0.5 + 0.3 * np.sin(number / (17 + 9 * index) + index))) // part
                y = int(height * (0.4 + 0.2 * np.cos(number / (23 + 5 * index)))) // part
                rows, columns = slice(y, y + height // 4 // part), slice(x, x + width // 8 // part)
                picture[rows, columns] = thing[plane][: height // 4 // part, : width // 8 // part]
            if plane == 0:
                down, right = generator.integers(0, 64, 2)
                picture += noise[down : down + height, right : right + width]
            planes.append(picture.clip(16, 235).astype(np.uint8).reshape(-1, width))
        yield np.concatenate(planes)


def _texture(generator: np.random.Generator, height: int, width: int, part: int) -> np.ndarray:
    # Noise of many scales as in photographs, and patches with edges; colours vary more slowly than light.
    if part == 2:
        return 128 + 12 * _smooth(generator, height, width, 24)
    light = sum(strength * _smooth(generator, height, width, scale) for scale, strength in _LIGHT)
    return 128 + light + 20 * np.sign(_smooth(generator, height, width, 20))


_LIGHT = ((2, 4), (4, 6), (16, 10), (64, 20))


def _smooth(generator: np.random.Generator, height: int, width: int, scale: int) -> np.ndarray:
    coarse = generator.normal(0, 1, (height // scale + 2, width // scale + 2)).astype(np.float32)
    rows, down = np.divmod(np.arange(height, dtype=np.float32) / scale, 1)
    columns, right = np.divmod(np.arange(width, dtype=np.float32) / scale, 1)
    r, c = rows.astype(int), columns.astype(int)
    wide = coarse[:, c] * (1 - right) + coarse[:, c + 1] * right
    return wide[r] * (1 - down)[:, None] + wide[r + 1] * down[:, None]


def write_webvid(folder: Path, rows: int) -> tuple[Path, Path]:
    """Writes WebVid's table with this many rows, and a file for each of them.

    The files are all the same short video under many names (hard links), since the names are what an index is made of.

    Returns:
        The table and the folder of the videos.
    """
    table, root = folder / "webvid.csv", folder / "videos"
    root.mkdir(parents=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("videoid", "contentUrl", "duration", "page_dir", "name"))
        for row in range(rows):
            if row % NAMES_PER_FILE == 0:
                video = folder / f"video{row // NAMES_PER_FILE}.mp4"
                write_video(video, VideoForm(64, 48, 20, 12, 50_000))
            page_dir = f"{row // ROWS_PER_FOLDER * 50 + 1:06d}_{row // ROWS_PER_FOLDER * 50 + 50:06d}"
            if row % ROWS_PER_FOLDER == 0:
                (root / page_dir).mkdir()
            # The ids come in no order, as in the real table.
            videoid = str(row * 1_000_003 % rows + 1_000_000)
            os.link(video, root / page_dir / f"{videoid}.mp4")
            url = f"https://example.org/previews/{videoid}/preview/stock-footage-a-scene-of-the-generated-table-{row}.mp4"
            caption = f'Aerial view of scene number {row}, with a river, "old" houses and fields in the evening sun'
            writer.writerow((videoid, url, "PT00H00M15S", page_dir, caption))
    return table, root
