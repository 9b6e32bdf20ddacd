"""Every decoder gives the right frames, or one line that says why it is not used."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest

from framebridge_plugin.data import BadFilePolicy, BadFileTracker, ClipError, ClipSettings, ClipStream, index_dataset
from framebridge_plugin.data.decoding.decoders import load_decoder, read_video
from framebridge_plugin.errors import UsageError
from tests.data_layer import broken_files
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbers_in, tensor, write_video
from tests.data_layer.video_kinds import (
    DATA,
    FRAMES,
    KINDS,
    MATRICES,
    WINDOWS,
    ffmpeg,
    rewrite,
    write_cut,
    write_turned,
)


def assert_refused(path, reason: str) -> None:
    with pytest.raises(ClipError, match=reason) as caught:
        read_video(str(path), lambda length: range(length // 2, length), decoder="decord")
    assert caught.value.kind == "wrong_container"
    message = str(caught.value)
    assert message.startswith(f"cannot read the clip {path}: decord does not read it rightly, because ")
    assert message.endswith("; use decoder: pyav")
    assert "\n" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_frames_or_a_refusal(tmp_path, kind):
    path = KINDS[kind].write(tmp_path)
    if not KINDS[kind].decord:
        assert_refused(path, "its container is|its codec is|open groups|interlaced|times are|begin at its key")
    for wanted in WINDOWS:
        try:
            pictures = read_video(str(path), lambda length, w=wanted: w if length == FRAMES else [], decoder="decord")
        except ClipError as error:
            if KINDS[kind].decord or error.kind != "wrong_container":
                raise
            continue
        assert pictures.dtype == np.uint8
        assert pictures.shape == (len(wanted), HEIGHT, WIDTH, 3)
        assert numbers_in(tensor(pictures)) == list(wanted)


def test_frames_that_are_stored_before_a_key_frame_and_shown_after_it_are_refused(tmp_path):
    source = write_video(tmp_path / "source.mp4", frames=24, options={"g": "12", "bf": "0"})
    path = tmp_path / "a.mp4"
    with av.open(str(source)) as whole, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        times = [packet.pts for packet in packets]
        times[11:13] = reversed(times[11:13])
        for packet, time in zip(packets, times, strict=True):
            packet.pts, packet.stream = time + times[1], stream
            target.mux(packet)
    assert_refused(path, "stored before a key frame")


@pytest.mark.parametrize("cut_at", ["0.5", "0.77"])
def test_files_with_hidden_frames_are_refused(tmp_path, cut_at):
    write_cut(tmp_path / "cut.mp4", cut_at)
    assert_refused(tmp_path / "cut.mp4", "an edit list hides")


@pytest.mark.parametrize("name", MATRICES)
def test_decord_turns_pictures_upright_the_same_way(tmp_path, name):
    # In size: decord cannot turn pictures whose width is no multiple of 32 after it.
    path = write_turned(tmp_path / "turned.mp4", MATRICES[name], size=(64, 96))
    if "mirrored" in name or "upside" in name or "transposed" in name:
        assert_refused(path, "mirrored")
        return
    wanted = [3, 12, 13]
    expected = read_video(str(path), lambda length: wanted)
    pictures = read_video(str(path), lambda length: wanted, decoder="decord")
    assert pictures.shape == expected.shape == (3, *((64, 96) if MATRICES[name][0] else (96, 64)), 3)
    # Decoders round colours a little differently; a picture turned the wrong way is off by more than 20.
    assert np.abs(pictures.astype(int) - expected).mean() < 3


def test_h264_without_reorder_information_is_refused():
    assert_refused(DATA / "h264_no_reorder_info.mp4", "how far its pictures are reordered")


def test_a_size_that_changes_at_a_later_key_frame_is_refused_where_it_matters(tmp_path):
    for name, size in (("first", (HEIGHT, WIDTH)), ("second", (96, 128))):
        whole = write_video(tmp_path / f"{name}.mp4", frames=20, options={"g": "12", "bf": "0"}, size=size)
        ffmpeg("-i", whole, "-c", "copy", "-bsf:v", "h264_mp4toannexb", "-f", "h264", tmp_path / name)
    (tmp_path / "both").write_bytes((tmp_path / "first").read_bytes() + (tmp_path / "second").read_bytes())
    path = tmp_path / "changing.mp4"
    ffmpeg("-f", "h264", "-r", "25", "-i", tmp_path / "both", "-c", "copy", path)
    assert_refused(path, "its picture size changes")
    assert read_video(str(path), lambda length: [3, 15], decoder="decord").shape == (2, HEIGHT, WIDTH, 3)
    assert read_video(str(path), lambda length: [30, 35]).shape == (2, 96, 128, 3)


def test_a_sound_file_on_which_decord_fails_is_no_broken_one(tmp_path):
    # decord cannot turn pictures of this width.
    path = write_turned(tmp_path / "turned.mp4", MATRICES["90"])
    with pytest.raises(ClipError, match="decord cannot decode it .*, but it is sound; use decoder: pyav") as caught:
        read_video(str(path), range, decoder="decord")
    assert caught.value.kind == "wrong_container"


def test_the_array_type_that_a_program_has_chosen_for_decord_does_not_matter(tmp_path):
    path = KINDS["h264, no B-frames"].write(tmp_path)
    expected = read_video(str(path), range, decoder="decord")
    # Not imported at the top: if its libvpx is loaded before PyAV's, that can write no VP8 and VP9 any more.
    with load_decoder("decord").bridge.use_torch():
        pictures = read_video(str(path), range, decoder="decord")
    assert isinstance(pictures, np.ndarray)
    assert np.array_equal(pictures, expected)


BROKEN = [
    *("missing", "link to itself", "folder", "named pipe", "empty", "text", "cut at head", "cut in the middle"),
    *("cut at tail, index in front", "zero frames", "sound only", "unknown codec"),
]


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_told_as_by_pyav(tmp_path, kind):
    path = tmp_path / "broken.mp4"
    broken_files.KINDS[kind].make(path)
    with pytest.raises(ClipError) as caught:
        read_video(str(path), range, decoder="decord")
    assert broken_files.KINDS[kind].reason in str(caught.value)
    assert caught.value.kind == broken_files.KINDS[kind].fault
    assert "\n" not in str(caught.value)


def test_pictures_that_decord_would_replace_by_their_neighbours_are_an_error(tmp_path):
    whole = KINDS["h264, no B-frames"].write(tmp_path)
    path = rewrite(
        whole, tmp_path / "damaged.mp4", lambda n, packet: packet[:6] + bytes(len(packet)) if n == 5 else packet
    )
    with pytest.raises(ClipError) as caught:
        read_video(str(path), range, decoder="decord")
    assert caught.value.kind == "corrupt"
    assert re.search(r"decord cannot decode it \((?!\[)", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_a_run_with_a_decoder_that_does_not_suit_its_files_ends_at_once(tmp_path, policy):
    root = tmp_path / "data/Archery"
    root.mkdir(parents=True)
    KINDS["mpeg4 avi"].write(root)
    quarantine = str(tmp_path / "quarantine.jsonl") if policy == "quarantine" else None
    tracker = BadFileTracker(BadFilePolicy(policy, quarantine), tmp_path)
    rows = index_dataset({"class_root": str(root.parent)})
    stream = ClipStream([(rows, ClipSettings(5, 16, 16, decoder="decord"))], seed=1)
    with pytest.raises(UsageError, match=r"a.avi: decord .* its container is avi, .*; use decoder: pyav$"):
        next(tracker.watch(stream))
    assert quarantine is None or Path(quarantine).read_text() == ""


BAD_INSTALLATIONS = {
    "missing": "raise ModuleNotFoundError(\"No module named 'decord'\")",
    "not loading": "raise RuntimeError('Could not load libdecord.\\nLikely causes:\\n 1. FFmpeg')",
}


@pytest.mark.parametrize("state", BAD_INSTALLATIONS)
def test_a_decoder_that_does_not_load_is_told_in_one_line(tmp_path, state):
    package = tmp_path / "decord"
    package.mkdir()
    (package / "__init__.py").write_text(BAD_INSTALLATIONS[state])
    program = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from framebridge_plugin.data.decoding.decoders import read_video
        from framebridge_plugin.errors import UsageError
        try:
            read_video("a.mp4", range, decoder="decord")
        except UsageError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.fullmatch(r"decoder decord does not load here \((No module|Could not load)[^\n]*\n", printed)
    assert printed.endswith("use decoder: pyav\n")
