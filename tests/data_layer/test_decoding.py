"""Every kind of file gives exactly the frames that were asked for, and every broken file one line."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from framebridge_plugin.data import ClipError, decoding, read_frames
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbers_in, write_video

FRAMES = 40
UNEVEN_TIMES = [0, *itertools.accumulate(itertools.islice(itertools.cycle([4, 1, 9, 4, 30]), FRAMES - 1))]
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"

# name -> (file name, arguments of write_video, whether seeking is provably exact in it)
KINDS: dict[str, tuple[str, dict, bool]] = {
    "h264, key frame every 12": ("a.mp4", {"options": {"g": "12", "bf": "2"}}, True),
    "h264, no B-frames": ("a.mp4", {"options": {"g": "12", "bf": "0"}}, True),
    "h264, one key frame": ("a.mp4", {"options": {"g": "250", "bf": "3"}}, True),
    "h264, every frame a key frame": ("a.mp4", {"options": {"g": "1"}}, True),
    "h264, open groups of pictures": ("a.mp4", {"options": {"x264-params": OPEN_GOP}}, True),
    "h264 mov": ("a.mov", {"options": {"g": "12"}}, True),
    "h264 with sound": ("a.mp4", {"options": {"g": "12", "bf": "2"}, "audio": True}, True),
    "h264 fragmented": (
        "a.mp4",
        {"options": {"g": "12"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
        True,
    ),
    "h264, uneven times": ("a.mp4", {"options": {"g": "12", "bf": "2"}, "pts": UNEVEN_TIMES}, True),
    "h264, late start": ("a.mp4", {"options": {"g": "12"}, "pts": [500 + 4 * i for i in range(FRAMES)]}, True),
    "h264 mkv": ("a.mkv", {"options": {"g": "12", "bf": "0"}}, True),
    "h264 mkv with B-frames": ("a.mkv", {"options": {"g": "12", "bf": "2"}}, False),
    "hevc": ("a.mp4", {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=none:pools=1"}}, True),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}, True),
    "vp9, uneven times": ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "12"}, "pts": UNEVEN_TIMES}, True),
    "mpeg4 mp4 with B-frames": ("a.mp4", {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}, True),
    "mpeg4 avi": ("a.avi", {"codec": "mpeg4", "options": {"g": "12"}}, False),
    "mpeg4 avi with B-frames": ("a.avi", {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}, False),
    "h264 avi with B-frames": ("a.avi", {"options": {"g": "12", "bf": "2"}}, False),
    "transport stream": ("a.ts", {"options": {"g": "12", "bf": "2"}}, False),
    "named mp4 but is avi": ("a.avi.mp4", {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}, False),
}
WINDOWS = [range(FRAMES), range(1), range(11, 28, 4), range(12, 13), range(23, 40), range(37, 40), [0, 5, 6, 30, 39]]


def ffmpeg(*arguments: str | Path) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def make(folder: Path, file_name: str, arguments: dict) -> Path:
    if file_name == "a.avi.mp4":
        return write_video(folder / "a.avi", frames=FRAMES, **arguments).rename(folder / file_name)
    return write_video(folder / file_name, frames=FRAMES, **arguments)


def read_numbers(path: Path, wanted) -> list[int]:
    lengths = []
    frames = read_frames(str(path), lambda length: lengths.append(length) or wanted)
    assert set(lengths) == {FRAMES}
    assert frames.dtype == torch.uint8
    assert frames.shape == (len(wanted), 3, HEIGHT, WIDTH)
    return numbers_in(frames)


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_wanted_frames_come_back(tmp_path, kind):
    file_name, arguments, seeks = KINDS[kind]
    path = make(tmp_path, file_name, arguments)
    for wanted in WINDOWS:
        assert read_numbers(path, wanted) == list(wanted)
    by_seeking = decoding._read_by_seeking(str(path), lambda length: range(30, 33))
    assert (by_seeking is not None) == seeks


@pytest.mark.parametrize("cut_at", ["0.5", "0.77", "1.2"])
def test_an_edit_list_hides_the_frames_before_the_cut(tmp_path, cut_at):
    whole = write_video(tmp_path / "whole.mp4", frames=FRAMES, options={"g": "12", "bf": "2"})
    cut = tmp_path / "cut.mp4"
    ffmpeg("-ss", cut_at, "-i", whole, "-c", "copy", cut)
    raw = ffmpeg("-i", cut, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "gray", "-")
    shown = len(raw) // (HEIGHT * WIDTH)
    with av.open(str(cut)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > shown, "nothing is hidden in this file"
    wanted_of = {"all": lambda length: range(length), "late": lambda length: range(3, length, 5)}
    expected = list(range(FRAMES - shown, FRAMES))
    assert numbers_in(read_frames(str(cut), wanted_of["all"])) == expected
    assert numbers_in(read_frames(str(cut), wanted_of["late"])) == expected[3::5]


# Else the edit list of the new file would hide the frames that cannot be decoded.
NO_EDIT_LIST = {"use_editlist": "0"}


def drop_packets(source_path: Path, target_path: Path, count: int) -> Path:
    with av.open(str(source_path)) as source, av.open(str(target_path), "w", options=NO_EDIT_LIST) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if number >= count and packet.size:
                packet.stream = stream
                target.mux(packet)
    return target_path


@pytest.mark.parametrize(
    ("dropped", "options"),
    [(5, {"g": "12", "bf": "0"}), (9, {"x264-params": OPEN_GOP})],
    ids=["no key frame", "open group"],
)
def test_a_file_that_begins_with_undecodable_frames_is_counted_by_decoding(tmp_path, dropped, options):
    whole = write_video(tmp_path / "whole.mp4", frames=FRAMES, options=options)
    headless = drop_packets(whole, tmp_path / "headless.mp4", dropped)
    with av.open(str(headless)) as container:
        decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    expected = numbers_in(torch.stack(decoded).permute(0, 3, 1, 2))
    assert len(expected) < FRAMES - dropped, "every packet of this file gives a frame"
    assert numbers_in(read_frames(str(headless), range)) == expected
    assert numbers_in(read_frames(str(headless), lambda length: range(14, 20))) == expected[14:20]


def test_seeking_decodes_no_more_than_the_groups_that_are_wanted(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", frames=FRAMES, options={"g": "8", "bf": "0"})
    decoded = []
    decode = decoding.decoded

    def counting(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decoding, "decoded", counting)
    assert read_numbers(path, range(26, 30)) == [26, 27, 28, 29]
    assert len(decoded) == 6, "from the key frame 24 to the last wanted frame"


def test_a_cut_mp4_is_refused_even_where_its_start_is_whole(tmp_path):
    path = tmp_path / "cut.mp4"
    cut_mp4_with_index_in_front(path)
    with pytest.raises(ClipError, match="damaged"):
        read_frames(str(path), lambda length: range(2))


def test_a_file_too_large_to_be_held_is_decoded_twice(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.avi", "mpeg4", frames=FRAMES, options={"bf": "2"})
    monkeypatch.setattr(decoding, "HELD_BYTES", 50_000)
    for wanted in WINDOWS:
        assert read_numbers(path, wanted) == list(wanted)


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


def write_turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Overwrite the matrix in the track header of an mp4."""
    write_video(path, frames=14, options={"g": "12"})
    content = bytearray(path.read_bytes())
    # A track header of version 0: size and kind (8 bytes), then 40 bytes of other fields, then the matrix.
    start = content.index(b"tkhd") + 4 + 40
    assert content[start : start + 4] == (65536).to_bytes(4, "big")
    a, b, c, d = (value * 65536 for value in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_pictures_are_turned_upright(tmp_path, name):
    path = write_turned(tmp_path / "turned.mp4", MATRICES[name])
    frames_FCHW = read_frames(str(path), lambda length: range(12, 14))
    height, width = frames_FCHW.shape[-2:]
    assert (height, width) == ((HEIGHT, WIDTH) if MATRICES[name][0] else (WIDTH, HEIGHT))
    raw = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    expected = np.frombuffer(raw, np.uint8).reshape(14, height, width, 3)[12:].transpose(0, 3, 1, 2)
    # The bundled ffmpeg rounds a little differently; a picture turned the wrong way is off by more than 50.
    assert np.abs(frames_FCHW.numpy().astype(int) - expected).mean() < 3


def test_a_slanted_picture_is_refused(tmp_path):
    path = write_turned(tmp_path / "slanted.mp4", (1, 1, -1, 1))
    with pytest.raises(ClipError, match="no multiple of 90 degrees"):
        read_frames(str(path), lambda length: range(2))


@pytest.mark.parametrize(("color_range", "stored", "shown"), [(1, 16, 0), (1, 235, 255), (2, 16, 16), (2, 235, 235)])
def test_brightness_follows_the_colour_range_of_the_file(tmp_path, color_range, stored, shown):
    path = tmp_path / "range.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.color_range = color_range
        planes = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
        planes[:HEIGHT] = stored
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    frames = read_frames(str(path), lambda length: range(1))
    assert (frames.int() - shown).abs().max() <= 1


def truncated(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def text_file(path: Path) -> None:
    path.write_text("This is no video.\n" * 50)


def cut_mp4(path: Path) -> None:
    truncated(write_video(path), 0.7)


def cut_mp4_with_index_in_front(path: Path) -> None:
    truncated(write_video(path, options={"g": "4"}, container_options={"movflags": "faststart"}), 0.8)


def header_only(path: Path) -> None:
    truncated(write_video(path), 0.01)


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())


def unknown_codec(path: Path) -> None:
    path.write_bytes(write_video(path).read_bytes().replace(b"avc1", b"zzzz"))


def huge_pictures(path: Path) -> None:
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 4352, 8192, "yuvj420p"
        planes = np.zeros((4352 * 3 // 2, 8192), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuvj420p")))
        container.mux(stream.encode())


def two_sizes(path: Path) -> None:
    first = write_video(path.with_suffix(".1.ts"), frames=10)
    second = write_video(path.with_suffix(".2.ts"), frames=10, size=(HEIGHT * 2, WIDTH * 2))
    path.write_bytes(first.read_bytes() + second.read_bytes())


def dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone.mp4")


# name -> (what makes the file, what the reason says)
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "missing"),
    "empty": (Path.touch, "empty"),
    "text": (text_file, "not a video"),
    "cut mp4": (cut_mp4, "not a video|damaged"),
    "cut mp4, index in front": (cut_mp4_with_index_in_front, "damaged"),
    "header only": (header_only, "not a video|damaged"),
    "sound only": (sound_only, "no video stream"),
    "unknown codec": (unknown_codec, "codec is unknown"),
    "folder": (Path.mkdir, "not a regular file"),
    "named pipe": (os.mkfifo, "not a regular file"),
    "dangling link": (dangling_link, "dangling link"),
    "huge pictures": (huge_pictures, "exceed the limit"),
    "two sizes": (two_sizes, "size changes from 64x48 to 128x96"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "broken.mp4"
    make_broken, reason = BROKEN[kind]
    make_broken(path)
    with pytest.raises(ClipError, match=reason) as caught:
        read_frames(str(path), range)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_open(tmp_path):
    path = write_video(tmp_path / "a.mp4", options={"g": "12"})
    text_file(tmp_path / "text.mp4")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_frames(str(path), lambda length: range(3))
        with pytest.raises(ClipError):
            read_frames(str(tmp_path / "text.mp4"), range)
    assert len(os.listdir("/proc/self/fd")) <= before
