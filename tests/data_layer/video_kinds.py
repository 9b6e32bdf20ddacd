"""A sound video of every kind, and which ways of reading are exact for it."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg

from framebridge_plugin.data import ClipError
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, write_video

DATA = Path(__file__).parents[1] / "data"
FRAMES = 40
WINDOWS = [
    range(FRAMES),
    range(1),
    range(11, 28, 4),
    range(12, 13),
    range(4, 20, 5),
    range(23, 40),
    range(37, 40),
    [0, 5, 6, 30, 39],
]

UNEVEN_TIMES = [0, *itertools.accumulate(itertools.islice(itertools.cycle([4, 1, 9, 4, 30]), FRAMES - 1))]
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
# Else the edit list of the new file would hide the frames that cannot be decoded.
NO_EDIT_LIST = {"use_editlist": "0"}


@dataclass(frozen=True)
class Kind:
    """How to write a file of `FRAMES` frames, and what reads it rightly besides decoding it from its start."""

    file_name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seeking: bool = True
    decord: bool = True
    # In a process of its own: SVT-AV1 gives the whole process that encodes with it real-time priority when it may,
    # and whatever that process starts later starves the machine. x265 can crash the process, with its threads.
    encoded_again: tuple[str, ...] = ()
    # As some writers do that know no other times.
    shown_when_decoded: bool = False

    def write(self, folder: Path) -> Path:
        if self.shown_when_decoded:
            whole = write_video(folder / "first.mp4", frames=FRAMES, **self.arguments)
            return rewrite(whole, folder / self.file_name, lambda number, content: content, shown_when_decoded=True)
        if self.encoded_again:
            whole = write_video(folder / "first.mp4", frames=FRAMES, options={"qp": "0"})
            ffmpeg("-i", whole, "-pix_fmt", "yuv420p", *self.encoded_again, folder / self.file_name)
            return folder / self.file_name
        if self.file_name == "a.avi.mp4":
            return write_video(folder / "a.avi", frames=FRAMES, **self.arguments).rename(folder / self.file_name)
        return write_video(folder / self.file_name, frames=FRAMES, **self.arguments)


def _x264(name: str = "a.mp4", g: int = 12, bf: int = 2, **others: Any) -> Kind:
    options = {"g": str(g), "bf": str(bf), **{key: others.pop(key) for key in ("x264-params",) if key in others}}
    flags = {key: others.pop(key) for key in ("seeking", "decord", "shown_when_decoded") if key in others}
    return Kind(name, {"options": options, **others}, **flags)


def _other(name: str, codec: str, options: dict[str, str], *exact: str, **others: Any) -> Kind:
    flags = {flag: flag in exact for flag in ("seeking", "decord")}
    return Kind(name, {"codec": codec, "options": options, **others}, **flags)


ALL = ("seeking", "decord")
NOTHING = dict.fromkeys(ALL, False)
XVID = {"seeking": True, "decord": False}
X265 = ("-c:v", "libx265", "-x265-params")
X265_GROUPS = "keyint=12:log-level=none:pools=none:frame-threads=1"
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}

KINDS: dict[str, Kind] = {
    "h264, key frame every 12": _x264(),
    "h264, no B-frames": _x264(bf=0),
    "h264, one key frame": _x264(g=250, bf=3),
    "h264, every frame a key frame": _x264(g=1),
    "h264, open groups": Kind("a.mp4", {"options": {"x264-params": OPEN_GOP}}, decord=False),
    "h264, interlaced": _x264(**NOTHING, **{"x264-params": "interlaced=1"}),
    "h264, intra refresh": _x264(bf=0, **NOTHING, **{"x264-params": "intra-refresh=1"}),
    "h264, shown when decoded": _x264(**NOTHING, shown_when_decoded=True),
    "h264 mov": _x264("a.mov"),
    "h264 with sound": _x264(audio=True),
    "h264 fragmented": _x264(container_options=FRAGMENTED),
    "h264, uneven times": _x264(pts=UNEVEN_TIMES),
    "h264, late start": _x264(pts=[500 + 4 * i for i in range(FRAMES)]),
    "h264 mkv": _x264("a.mkv", bf=0),
    "h264 mkv with B-frames": _x264("a.mkv", seeking=False),
    "h264 avi with B-frames": _x264("a.avi", **NOTHING),
    "h264 transport stream": _x264("a.ts", **NOTHING),
    "hevc, open groups": Kind("a.mp4", decord=False, encoded_again=(*X265, X265_GROUPS)),
    "hevc, closed groups": Kind("a.mp4", encoded_again=(*X265, f"{X265_GROUPS}:open-gop=0")),
    "vp9": _other("a.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, *ALL),
    "vp9, uneven times": _other("a.webm", "libvpx-vp9", {"g": "12", "cpu-used": "8"}, *ALL, pts=UNEVEN_TIMES),
    "vp8": _other("a.webm", "libvpx", {"g": "12"}),
    "av1": Kind("a.mp4", decord=False, encoded_again=("-c:v", "libaom-av1", "-cpu-used", "8", "-g", "12")),
    "mpeg4 mp4 with B-frames": _other("a.mp4", "mpeg4", {"g": "12", "bf": "2"}),
    "mpeg4 avi": _other("a.avi", "mpeg4", {"g": "12"}, "seeking"),
    "mpeg4 avi, quarter pixels": _other("a.avi", "mpeg4", {"g": "12", "flags": "+qpel"}, "seeking"),
    "xvid avi": Kind("a.avi", **XVID, encoded_again=("-c:v", "libxvid", "-bf", "0", "-g", "12")),
    "mpeg4 avi with B-frames": _other("a.avi", "mpeg4", {"g": "12", "bf": "2"}),
    "mpeg2 mp4 with B-frames": _other("a.mp4", "mpeg2video", {"g": "12", "bf": "2"}),
    "named mp4 but is avi": _other("a.avi.mp4", "mpeg4", {"g": "12", "bf": "2"}),
}


def ffmpeg(*arguments: str | Path) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def write_cut(path: Path, cut_at: str) -> int:
    """Write a file whose edit list hides the frames before a cut; returns how many it shows."""
    whole = write_video(path.with_name("whole.mp4"), frames=FRAMES, options={"g": "12", "bf": "2"})
    ffmpeg("-ss", cut_at, "-i", whole, "-c", "copy", path)
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "gray", "-")
    shown = len(raw) // (HEIGHT * WIDTH)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > shown, "nothing is hidden in this file"
    return shown


def rewrite(
    source_path: Path,
    target_path: Path,
    edit: Callable[[int, bytes], bytes | None],
    *,
    shown_when_decoded: bool = False,
) -> Path:
    """Copy a video; `edit` gets the number and content of each packet and returns the new one, or None to drop it."""
    with av.open(str(source_path)) as source, av.open(str(target_path), "w", options=NO_EDIT_LIST) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            content = edit(number, bytes(packet)) if packet.size else None
            if content is not None:
                copy = av.Packet(content)
                copy.dts, copy.time_base = packet.dts, packet.time_base
                copy.pts = packet.dts if shown_when_decoded else packet.pts
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                target.mux(copy)
    return target_path


def announce(path: Path, frames: int) -> Path:
    """Overwrite the number of frames in the header of an AVI's video stream."""
    content = bytearray(path.read_bytes())
    # A stream header: its name and size (8 bytes), then 32 bytes of other fields, then the number.
    start = content.index(b"strh") + 8 + 32
    assert content[start : start + 4] == FRAMES.to_bytes(4, "little")
    content[start : start + 4] = frames.to_bytes(4, "little")
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == frames
    return path


def last_five_of(path: str) -> Callable[[int], range]:
    """Chooses the last five frames, of a file of no fewer than ten."""

    def choose(length: int) -> range:
        if length < 10:
            raise ClipError(path, f"it has {length} frames", "too_short")
        return range(length - 5, length)

    return choose


# The stored picture, turned as the matrix (a, b, c, d in units of 1) says.
MATRICES = {
    "0": (1, 0, 0, 1),
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


def write_turned(path: Path, matrix: tuple[int, int, int, int], **arguments: Any) -> Path:
    """Overwrite the matrix in the track header of an mp4 of 14 frames."""
    write_video(path, frames=14, options={"g": "12"}, **arguments)
    content = bytearray(path.read_bytes())
    # A track header of version 0: size and kind (8 bytes), then 40 bytes of other fields, then the matrix.
    start = content.index(b"tkhd") + 4 + 40
    assert content[start : start + 4] == (65536).to_bytes(4, "big")
    a, b, c, d = (value * 65536 for value in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content)
    return path
