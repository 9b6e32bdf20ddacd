"""Every kind of file gives exactly the frames that were asked for."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from framebridge_plugin.data import ClipError, read_frames
from framebridge_plugin.data.decoding import exact
from framebridge_plugin.data.decoding.exact import read_pictures
from framebridge_plugin.data.showing import AS_SHOWN
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbers_in, tensor, write_video
from tests.data_layer.video_kinds import (
    DATA,
    FRAMES,
    KINDS,
    MATRICES,
    OPEN_GOP,
    WINDOWS,
    X265,
    X265_GROUPS,
    Kind,
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
    whole = exact._read_from_start(str(path), range, strict, AS_SHOWN)
    random = np.random.default_rng(0)
    for wanted in [*WINDOWS, *(sorted(random.choice(FRAMES, 3, replace=False).tolist()) for _ in range(6))]:
        assert read_numbers(path, wanted, strict) == list(wanted)
        pictures = read_pictures(str(path), lambda length, wanted=wanted: wanted, strict=strict)
        assert np.array_equal(pictures, whole[list(wanted)])
    by_index, _ = exact._read_by_index(str(path), lambda length: range(30, 33))
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


def test_a_hidden_vp9_picture_is_noticed_by_every_clip(tmp_path):
    whole = KINDS["vp9"].write(tmp_path)

    def hide_twelve(number: int, content: bytes) -> bytes:
        return bytes([content[0] & ~0x02]) + content[1:] if number == 12 else content  # Its flag "show this frame".

    path = rewrite(whole, tmp_path / "hidden.webm", hide_twelve)
    expected = decoded_numbers(path)
    assert expected == [number for number in range(FRAMES) if number != 12]
    assert numbers_in(read_frames(str(path), lambda length: [10, 14, 15])) == [expected[k] for k in (10, 14, 15)]
    assert numbers_in(read_frames(str(path), lambda length: range(30, length))) == expected[30:]


def numbers_in_case(pictures_FHWC: np.ndarray) -> list[int]:
    """The numbers in the pictures of `h264_no_reorder_info.mp4`: a column of 6 pixels for each bit."""
    bits = pictures_FHWC[:, 2:6].mean(axis=(1, 3)).reshape(-1, 8, 12)[:, :, 3:9].mean(axis=2) > 128
    return (bits @ (1 << np.arange(8))).tolist()


def test_h264_without_reorder_information_keeps_every_picture():
    path = str(DATA / "h264_no_reorder_info.mp4")
    with av.open(path) as container:
        assert len(list(container.decode(video=0))) == 109, "FFmpeg leaves none out any more"
    assert numbers_in_case(read_pictures(path, range)) == list(range(110))
    assert numbers_in_case(exact._read_from_start(path, range, False, AS_SHOWN)) == list(range(110))
    random = np.random.default_rng(0)
    for first in (0, 109, *random.integers(110, size=20).tolist()):
        wanted = range(first, min(first + 17, 110), 3)
        assert numbers_in_case(read_pictures(path, lambda length, wanted=wanted: wanted)) == list(wanted)


def test_a_picture_that_the_decoder_leaves_out_costs_no_other_its_number(tmp_path):
    groups = f"{X265_GROUPS}:open-gop=0:bframes=1:b-adapt=0:scenecut=0"
    whole = Kind("whole.mp4", encoded_again=(*X265, groups)).write(tmp_path)
    # Of the first B-frame, which no other frame needs, only a delimiter is left.
    path = rewrite(whole, tmp_path / "a.mp4", lambda n, content: b"\0\0\0\3\x46\x01\x50" if n == 2 else content)
    (missing,) = set(range(FRAMES)) - set(decoded_numbers(path))
    for wanted in (range(3 + missing), [0, missing]):
        with pytest.raises(ClipError, match="gives 39 of its 40 frames") as caught:
            read_pictures(str(path), lambda length, wanted=wanted: wanted)
        assert caught.value.kind == "corrupt"
    for wanted in ([0], [missing + 1], [0, missing + 1, 11, 30], range(20, FRAMES)):
        assert read_numbers(path, wanted) == list(wanted)


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
    by_index, _ = exact._read_by_index(str(path), lambda length: range(20, 30))
    assert (by_index is not None) == is_still_so
    if edit != "no settings":
        expected = exact._read_from_start(str(path), lambda length: range(20, 30), False, AS_SHOWN)
        assert np.array_equal(read_pictures(str(path), lambda length: range(20, 30)), expected)


@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_frames_of_xvid_are_those_that_decoding_gives(tmp_path, b_frames):
    whole = write_video(tmp_path / "whole.mp4", frames=FRAMES, options={"qp": "0"})
    path = tmp_path / "a.avi"
    ffmpeg("-i", whole, "-c:v", "libxvid", "-bf", b_frames, "-g", "12", path)
    expected = decoded_numbers(path)
    for first in range(0, len(expected) - 8, 3):
        assert numbers_in(read_frames(str(path), lambda length, k=first: range(k, k + 8))) == expected[first:][:8]
    assert (exact._read_by_index(str(path), lambda length: range(20, 30))[0] is not None) == (b_frames == "0")


def count_decoded(monkeypatch) -> list[int]:
    """Grows by the time of each frame that is decoded from now on."""
    decoded = []
    checked = exact.checked

    def counting(*arguments):
        for frame in checked(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(exact, "checked", counting)
    return decoded


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"), [("a.mp4", "libx264", "0"), ("a.mp4", "libx264", "2"), ("a.avi", "mpeg4", "0")]
)
def test_seeking_decodes_no_more_than_the_groups_that_are_wanted(tmp_path, monkeypatch, name, codec, b_frames):
    path = write_video(tmp_path / name, codec, frames=FRAMES, options={"g": "8", "bf": b_frames})
    decoded = count_decoded(monkeypatch)
    for first, key in ((0, 0), (24, 24), (26, 24), (31, 24)):
        decoded.clear()
        assert read_numbers(path, range(first, 32)) == list(range(first, 32))
        assert len(decoded) == 32 - key, "from the last key frame to the last wanted frame"


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
    decoded = count_decoded(monkeypatch)
    for bound, times in ((50_000, 2), (exact.HELD_BYTES, 1)):
        monkeypatch.setattr(exact, "HELD_BYTES", bound)
        decoded.clear()
        assert read_numbers(path, range(FRAMES)) == list(range(FRAMES))
        assert len(decoded) == times * FRAMES


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
