"""Every kind of file gives exactly the frames that were asked for."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from framebridge_plugin.data import ClipError, decoding, read_frames
from framebridge_plugin.data.decoding import read_pictures
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbers_in, tensor, write_video
from tests.data_layer.video_kinds import (
    FRAMES,
    KINDS,
    MATRICES,
    OPEN_GOP,
    WINDOWS,
    announce,
    ffmpeg,
    last_five_of,
    rewrite,
    write_cut,
    write_turned,
)


def read_numbers(path: Path, wanted, strict: bool = False) -> list[int]:
    lengths = []
    pictures = read_pictures(str(path), lambda length: lengths.append(length) or wanted, strict=strict)
    assert set(lengths) == {FRAMES}
    assert pictures.dtype == np.uint8
    assert pictures.shape == (len(wanted), HEIGHT, WIDTH, 3)
    return numbers_in(tensor(pictures))


def decoded_numbers(path: Path) -> list[int]:
    """The numbers in all frames that decoding the file from its start gives."""
    with av.open(str(path)) as container:
        return numbers_in(tensor(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])))


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_wanted_frames_come_back(tmp_path, kind, strict):
    path = KINDS[kind].write(tmp_path)
    for wanted in WINDOWS:
        assert read_numbers(path, wanted, strict) == list(wanted)
    by_index = decoding._read_by_index(str(path), lambda length: range(30, 33))
    assert (by_index is not None) == KINDS[kind].seeking


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("cut_at", ["0.5", "0.77", "1.2"])
def test_an_edit_list_hides_the_frames_before_the_cut(tmp_path, cut_at, strict):
    path = tmp_path / "cut.mp4"
    shown = write_cut(path, cut_at)
    expected = list(range(FRAMES - shown, FRAMES))
    assert numbers_in(tensor(read_pictures(str(path), range, strict=strict))) == expected
    late = read_pictures(str(path), lambda length: range(3, length, 5), strict=strict)
    assert numbers_in(tensor(late)) == expected[3::5]


@pytest.mark.parametrize(
    ("dropped", "options"),
    [(5, {"g": "12", "bf": "0"}), (9, {"x264-params": OPEN_GOP})],
    ids=["no key frame", "open group"],
)
def test_a_file_that_begins_with_undecodable_frames_is_counted_by_decoding(tmp_path, dropped, options):
    whole = write_video(tmp_path / "whole.mp4", frames=FRAMES, options=options)
    headless = rewrite(
        whole, tmp_path / "headless.mp4", lambda number, content: content if number >= dropped else None
    )
    expected = decoded_numbers(headless)
    assert len(expected) < FRAMES - dropped, "every packet of this file gives a frame"
    assert numbers_in(read_frames(str(headless), range)) == expected
    assert numbers_in(read_frames(str(headless), lambda length: range(14, 20))) == expected[14:20]


def test_a_hidden_vp8_picture_is_not_counted(tmp_path):
    whole = write_video(tmp_path / "whole.webm", "libvpx", frames=FRAMES, options={"g": "12"})

    def hide_five(number: int, content: bytes) -> bytes:
        return bytes([content[0] & ~0x10]) + content[1:] if number == 5 else content  # Its flag "show this frame".

    path = rewrite(whole, tmp_path / "hidden.webm", hide_five)
    expected = decoded_numbers(path)
    assert expected == [number for number in range(FRAMES) if number != 5]
    assert numbers_in(read_frames(str(path), lambda length: range(20, 30))) == expected[20:30]


def test_a_hidden_vp9_picture_within_the_clip_is_noticed(tmp_path):
    whole = KINDS["vp9"].write(tmp_path)

    def hide_twelve(number: int, content: bytes) -> bytes:
        return bytes([content[0] & ~0x02]) + content[1:] if number == 12 else content  # Its flag "show this frame".

    path = rewrite(whole, tmp_path / "hidden.webm", hide_twelve)
    expected = decoded_numbers(path)
    assert expected == [number for number in range(FRAMES) if number != 12]
    assert numbers_in(read_frames(str(path), lambda length: [10, 14, 15])) == [expected[k] for k in (10, 14, 15)]


def left_out(content: bytes) -> bytes:
    """An MPEG-4 picture of the same time (25 per second, so 5 bits of time), of which nothing is coded."""
    start = content.index(MPEG4_PICTURE) + 4
    bits = "".join(f"{byte:08b}" for byte in content[start : start + 4])
    coded = bits.index("0", 2) + 1 + 1 + 5 + 1
    header = (bits[:coded] + "0111").ljust(24, "1")
    return content[:start] + int(header, 2).to_bytes(len(header) // 8, "big")


def without_settings(content: bytes) -> bytes:
    return content[content.index(MPEG4_PICTURE) :]


MPEG4_PICTURE = b"\x00\x00\x01\xb6"
# What is done to which packet of an AVI file in which each packet is one picture, and whether that is still so.
MPEG4_EDITS = {
    "a picture left out": (lambda number, content: left_out(content) if number == 5 else content, False),
    "a packet dropped": (lambda number, content: None if number == 5 else content, True),
    "settings only once": (lambda number, content: without_settings(content) if number else content, True),
    "no settings": (lambda number, content: without_settings(content), False),
    "two pictures in a packet": (lambda number, content: content + content if number == 5 else content, False),
    "no picture in a packet": (lambda number, content: content[:4] if number == 5 else content, False),
}


@pytest.mark.parametrize("edit", MPEG4_EDITS)
def test_mpeg4_packets_are_only_counted_where_each_is_one_picture(tmp_path, edit):
    change, is_still_so = MPEG4_EDITS[edit]
    whole = write_video(tmp_path / "whole.avi", "mpeg4", frames=FRAMES, options={"g": "12"})
    path = rewrite(whole, tmp_path / "edited.avi", change)
    by_index = decoding._read_by_index(str(path), lambda length: range(20, 30))
    assert (by_index is not None) == is_still_so
    if edit != "no settings":
        expected = decoding._read_from_start(str(path), lambda length: range(20, 30), False, None)
        assert np.array_equal(read_pictures(str(path), lambda length: range(20, 30)), expected)


@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_frames_of_xvid_are_those_that_decoding_gives(tmp_path, b_frames):
    whole = write_video(tmp_path / "whole.mp4", frames=FRAMES, options={"qp": "0"})
    path = tmp_path / "a.avi"
    ffmpeg("-i", whole, "-c:v", "libxvid", "-bf", b_frames, "-g", "12", path)
    expected = decoded_numbers(path)
    for first in range(0, len(expected) - 8, 3):
        assert numbers_in(read_frames(str(path), lambda length, k=first: range(k, k + 8))) == expected[first:][:8]
    assert (decoding._read_by_index(str(path), lambda length: range(20, 30)) is not None) == (b_frames == "0")


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"), [("a.mp4", "libx264", "0"), ("a.mp4", "libx264", "2"), ("a.avi", "mpeg4", "0")]
)
def test_seeking_decodes_no_more_than_the_groups_that_are_wanted(tmp_path, monkeypatch, name, codec, b_frames):
    path = write_video(tmp_path / name, codec, frames=FRAMES, options={"g": "8", "bf": b_frames})
    decoded = []
    checked = decoding.checked

    def counting(*arguments):
        for frame in checked(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decoding, "checked", counting)
    assert read_numbers(path, range(26, 30)) == [26, 27, 28, 29]
    assert len(decoded) == 6, "from the key frame 24 to the last wanted frame"


def test_a_cut_mp4_is_refused_even_where_its_start_is_whole(tmp_path):
    path = tmp_path / "cut.mp4"
    write_video(path, options={"g": "4"}, container_options={"movflags": "faststart"})
    os.truncate(path, path.stat().st_size * 4 // 5)
    with pytest.raises(ClipError, match="damaged") as caught:
        read_frames(str(path), lambda length: range(2))
    assert caught.value.kind == "corrupt"


def test_strict_reading_refuses_what_flipped_bytes_have_damaged(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", frames=FRAMES, options={"g": "12", "bf": "2"})
    intact = read_pictures(str(whole), range)
    random = np.random.default_rng(0)
    silently_wrong, kinds = {False: 0, True: 0}, set()
    for _ in range(30):
        victim, places, values = random.integers(FRAMES), random.random(3), random.integers(0, 256, 3)

        def damage(number: int, content: bytes, victim=victim, places=places, values=values) -> bytes:
            changed = bytearray(content)
            if number == victim:
                for place, value in zip(places, values, strict=True):
                    changed[5 + int(place * (len(changed) - 5))] = value
            return bytes(changed)

        path = rewrite(whole, tmp_path / "damaged.mp4", damage)
        for strict in (False, True):
            try:
                pictures = read_pictures(str(path), range, strict=strict)
                silently_wrong[strict] += not np.array_equal(pictures, intact)
            except ClipError as error:
                kinds.add(error.kind)
    assert kinds == {"corrupt"}
    assert silently_wrong[False] >= 6, "FFmpeg reports this damage by itself"
    assert silently_wrong[True] <= silently_wrong[False] // 5


def test_a_file_too_large_to_be_held_is_decoded_twice(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.avi", "mpeg4", frames=FRAMES, options={"bf": "2"})
    monkeypatch.setattr(decoding, "HELD_BYTES", 50_000)
    for wanted in WINDOWS:
        assert read_numbers(path, wanted) == list(wanted)


@pytest.mark.parametrize("announced", [3, FRAMES - 1, FRAMES, FRAMES + 1, 100_000])
def test_a_header_with_a_wrong_number_of_frames_misleads_nobody(tmp_path, announced):
    path = announce(KINDS["mpeg4 avi"].write(tmp_path), announced)
    assert numbers_in(read_frames(str(path), last_five_of(str(path)))) == list(range(FRAMES - 5, FRAMES))


@pytest.mark.parametrize("name", MATRICES)
def test_pictures_are_turned_upright(tmp_path, name):
    path = write_turned(tmp_path / "turned.mp4", MATRICES[name])
    frames_FCHW = read_frames(str(path), lambda length: range(12, 14))
    assert frames_FCHW.dtype == torch.uint8
    height, width = frames_FCHW.shape[-2:]
    assert (height, width) == ((HEIGHT, WIDTH) if MATRICES[name][0] else (WIDTH, HEIGHT))
    raw = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    expected = np.frombuffer(raw, np.uint8).reshape(14, height, width, 3)[12:].transpose(0, 3, 1, 2)
    # The bundled ffmpeg rounds a little differently; a picture turned the wrong way is off by more than 50.
    assert np.abs(frames_FCHW.numpy().astype(int) - expected).mean() < 3


def test_a_slanted_picture_is_refused(tmp_path):
    path = write_turned(tmp_path / "slanted.mp4", (1, 1, -1, 1))
    with pytest.raises(ClipError, match="no multiple of 90 degrees") as caught:
        read_frames(str(path), lambda length: range(2))
    assert caught.value.kind == "rotation"


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


def test_nothing_is_left_open(tmp_path):
    path = write_video(tmp_path / "a.mp4", options={"g": "12"})
    (tmp_path / "text.mp4").write_text("This is no video.")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_frames(str(path), lambda length: range(3))
        with pytest.raises(ClipError):
            read_frames(str(tmp_path / "text.mp4"), range)
    assert len(os.listdir("/proc/self/fd")) <= before
