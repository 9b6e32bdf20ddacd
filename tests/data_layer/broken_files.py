"""A corpus of the files that real folders hold: broken in every way that we know of, or only looking so."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from framebridge_plugin.data import ClipSettings
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbered_picture, write_video

FRAMES = 40
UNEVEN_TIMES = [0, *itertools.accumulate(itertools.islice(itertools.cycle([4, 1, 9, 4, 30]), FRAMES - 1))]
INDEX_IN_FRONT = {"movflags": "faststart"}


def whole(path: Path, **arguments) -> None:
    write_video(path, **{"frames": FRAMES, "options": {"g": "12", "bf": "0"}, **arguments})


def missing(path: Path) -> None:
    pass


def text(path: Path) -> None:
    path.write_text("This is no video.\n" * 50)


def dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone.mp4")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def cut(path: Path, start: float, end: float) -> None:
    """Take away what lies between the middles of two pictures, 0 being the first and 1 the last."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = path.read_bytes()
    kept = b""
    if start >= 0:
        position, size = packets[int(start * len(packets))]
        kept += content[: position + size // 2]
    if end <= 1:
        position, size = packets[int(end * len(packets))]
        kept += content[position + size // 2 :]
    path.write_bytes(kept)


def cut_at_head(path: Path) -> None:
    whole(path)
    cut(path, -1, 0.3)


def cut_in_the_middle(path: Path) -> None:
    whole(path, container_options=INDEX_IN_FRONT)
    cut(path, 0.4, 0.6)


def cut_at_tail(path: Path) -> None:
    whole(path)
    cut(path, 0.8, 2)


def cut_at_tail_with_index_in_front(path: Path) -> None:
    whole(path, container_options=INDEX_IN_FRONT)
    cut(path, 0.8, 2)


def transport_stream_cut_at_head(path: Path) -> None:
    """It can be entered anywhere: the first pictures are gone, the others are right."""
    stream = path.with_suffix(".ts")
    whole(stream)
    cut(stream.rename(path), -1, 0.3)


def avi_cut_at_tail(path: Path) -> None:
    avi = path.with_suffix(".avi")
    whole(avi, codec="mpeg4")
    cut(avi.rename(path), 0.45, 2)


def no_more_than_a_header(path: Path) -> None:
    whole(path)
    path.write_bytes(path.read_bytes()[:40])


def zero_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        container.start_encoding()


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())


def unknown_codec(path: Path) -> None:
    whole(path)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def rotated(path: Path) -> None:
    whole(path, size=(WIDTH, HEIGHT), picture=lambda number, *_: np.rot90(numbered_picture(number)))
    content = bytearray(path.read_bytes())
    # A track header of version 0: its kind (4 bytes), then 40 bytes of other fields, then the matrix.
    start = content.index(b"tkhd") + 4 + 40
    one = 65536
    values = (0, one, 0, -one, 0, 0, HEIGHT * one, 0, 1 << 30)
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content)


def flipped_bytes(path: Path) -> None:
    """Damage every fifth picture but not the index; a decoder hides it unless it is strict."""
    whole(path, codec="mpeg4", picture=_noisy_picture)
    flip(path, range(3, FRAMES, 5), place=0.5)


def flipped_bytes_at_the_end(path: Path) -> None:
    """Only a clip that reaches that far meets them."""
    whole(path, picture=_noisy_picture)
    flip(path, range(FRAMES - 12, FRAMES), place=0.25)


def flip(path: Path, pictures: Iterable[int], place: float) -> None:
    """Flip a byte of each of these pictures, at this share of its size."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for start, size in (packets[number] for number in pictures):
        content[start + int(place * size)] ^= 0xFF
    path.write_bytes(content)


def _noisy_picture(number: int, *size: int) -> np.ndarray:
    """What a flipped byte spoils should be seen."""
    picture = numbered_picture(number, *size)
    picture[32:] = np.random.default_rng(number).integers(0, 255, picture[32:].shape)
    return picture


def avi_index_of_noise(path: Path) -> None:
    _with_avi_index(path, lambda index: np.random.default_rng(0).bytes(len(index)))


def avi_index_of_one_picture(path: Path) -> None:
    """Every entry of the index leads to the first picture."""
    _with_avi_index(path, lambda index: index[:16] * (len(index) // 16))


def avi_index_beyond_the_end(path: Path) -> None:
    far = (1 << 31) - 1
    _with_avi_index(
        path,
        lambda index: b"".join(
            index[start : start + 8] + (far - start).to_bytes(4, "little") + index[start + 12 : start + 16]
            for start in range(0, len(index), 16)
        ),
    )


def _with_avi_index(path: Path, change: Callable[[bytes], bytes]) -> None:
    avi = path.with_suffix(".avi")
    whole(avi, codec="mpeg4")
    content = avi.read_bytes()
    start = content.index(b"idx1") + 8
    size = int.from_bytes(content[start - 4 : start], "little")
    avi.rename(path).write_bytes(content[:start] + change(content[start : start + size]) + content[start + size :])


def size_change(path: Path) -> None:
    parts = [path.with_suffix(f".{number}.ts") for number in (1, 2)]
    for part, scale in zip(parts, (1, 2), strict=True):
        whole(part, frames=6, size=(HEIGHT * scale, WIDTH * scale))
    path.write_bytes(b"".join(part.read_bytes() for part in parts))


def absurd_size(path: Path, side: int = 16_000) -> None:
    """The header of an AVI of raw pictures announces that they are as large as a hall."""
    avi = path.with_suffix(".avi")
    whole(avi, codec="rawvideo", frames=6, options={})
    content = bytearray(avi.read_bytes())
    start = content.index(b"strf") + 8 + 4
    content[start : start + 8] = side.to_bytes(4, "little") * 2
    avi.rename(path).write_bytes(content)


def impossible_size(path: Path) -> None:
    absurd_size(path, 60_000)


def avi_named_mp4(path: Path) -> None:
    avi = path.with_suffix(".avi")
    whole(avi, codec="mpeg4", options={"g": "12", "bf": "2"})
    avi.rename(path)


class Kind(NamedTuple):
    """What makes a file, and what a clip of it is.

    `fault` is the kind of the `ClipError`, and `reason` a part of its reason; without one, `frames` are the numbers
    of the clip's frames. `strict_fault` is the fault for a strict reader, where that is another.
    """

    make: Callable[[Path], object]
    fault: str | None = None
    reason: str = ""
    frames: tuple[int, ...] = (0, 2, 4, 6, 8)
    strict_fault: str | None = None


CLIP = ClipSettings(num_frames=5, height=HEIGHT, width=WIDTH, frame_stride=2, window="start")

KINDS = {
    "whole": Kind(whole),
    "missing": Kind(missing, "missing", "No such file"),
    "dangling link": Kind(dangling_link, "missing", "dangling link"),
    "link to itself": Kind(link_to_itself, "unreadable", "symbolic links"),
    "folder": Kind(Path.mkdir, "not_regular", "not a regular file"),
    "named pipe": Kind(os.mkfifo, "not_regular", "not a regular file"),
    "empty": Kind(Path.touch, "empty", "the file is empty"),
    "text": Kind(text, "not_video", "not a video file"),
    "no more than a header": Kind(no_more_than_a_header, "not_video", "damaged header"),
    "cut at head": Kind(cut_at_head, "not_video", "damaged header"),
    "cut in the middle": Kind(cut_in_the_middle, "corrupt", "damaged"),
    "cut at tail": Kind(cut_at_tail, "not_video", "damaged header"),
    "cut at tail, index in front": Kind(cut_at_tail_with_index_in_front, "corrupt", "damaged"),
    "transport stream cut at head": Kind(transport_stream_cut_at_head, frames=(24, 26, 28, 30, 32)),
    "avi cut at tail": Kind(avi_cut_at_tail, "corrupt", "damaged"),
    "zero frames": Kind(zero_frames, "no_video_stream"),
    "sound only": Kind(sound_only, "no_video_stream"),
    "unknown codec": Kind(unknown_codec, "codec", "codec is unknown"),
    "one frame": Kind(lambda path: whole(path, frames=1), "too_short", "it has 1 frames"),
    "too few frames": Kind(lambda path: whole(path, frames=4), "too_short", "it has 4 frames"),
    "just enough frames": Kind(lambda path: whole(path, frames=5), frames=(0, 1, 2, 3, 4)),
    "odd size": Kind(lambda path: whole(path, codec="mpeg4", size=(HEIGHT + 1, WIDTH + 3))),
    "variable frame rate": Kind(lambda path: whole(path, pts=UNEVEN_TIMES)),
    "wrong extension": Kind(avi_named_mp4),
    "rotated": Kind(rotated),
    # The last picture is not what it should be, which nobody hears of who is not strict.
    "flipped bytes": Kind(flipped_bytes, frames=(0, 2, 4, 6, 7), strict_fault="corrupt"),
    "flipped bytes at the end": Kind(flipped_bytes_at_the_end),
    "avi index of noise": Kind(avi_index_of_noise),
    "avi index of one picture": Kind(avi_index_of_one_picture, "too_short", "it has 1 frames"),
    "avi index beyond the end": Kind(avi_index_beyond_the_end, "corrupt"),
    "size change": Kind(size_change, "size_change", "from 64x48 to 128x96"),
    "absurd size": Kind(absurd_size, "too_large", "16000x16000"),
    "impossible size": Kind(impossible_size, "corrupt"),
}


def write_corpus(folder: Path, kinds: Iterable[str] = KINDS) -> dict[str, Path]:
    """Write one file of each kind, all of them named .mp4.

    Returns:
        The path of each kind.
    """
    folder.mkdir()
    paths = {kind: folder / f"{kind.replace(' ', '_').replace(',', '')}.mp4" for kind in kinds}
    for kind, path in paths.items():
        KINDS[kind].make(path)
    return paths
