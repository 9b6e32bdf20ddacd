"""Exactly the frames that were asked for, out of any video file that FFmpeg reads.

Frame k of a file is the k-th frame that decoding it from its start puts out. Seeking is only trusted where it is
provably the same:

1. mp4, mov, mkv and webm whose packets all carry a decoding and a unique presentation time: the sorted presentation
   times of the packets that are shown are the index; decoding starts at the last key packet at or before the first
   wanted frame, and the decoded times must say that it did and that every wanted frame came.
2. Anything else, and any failure of 1: decode from the start and count.

Only wanted frames are converted to RGB, which is where most of the time goes otherwise.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from framebridge_plugin.errors import FrameBridgeError

MAX_PIXELS = 7680 * 4320
"""Largest picture that is decoded (8K): a broken header can announce one that fills the memory."""

SEEKABLE_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})

# While the frames of a file are counted by decoding it, they are kept up to this many bytes, so that most files are
# decoded once: a window is drawn only when the length is known.
HELD_BYTES = 256 * 2**20


class ClipError(FrameBridgeError):
    """A video file that cannot give the clip that was asked for.

    Args:
        path: The file.
        reason: What is wrong with it, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the clip {self.path}: {self.reason}"


def read_frames(path: str, choose: Callable[[int], Sequence[int]]) -> torch.Tensor:
    """Read chosen frames of a video file.

    Args:
        path: A video file.
        choose: Called with the number of frames in the file; returns the wanted frame numbers, strictly increasing,
            in [0, number of frames - 1]. It may be called twice, and may raise `ClipError`.

    Returns:
        uint8 RGB tensor of shape [F, 3, H, W], turned upright as the file's display matrix says.

    Raises:
        ClipError: The file is missing, no regular file, empty, not a video, damaged where it matters, larger than
            `MAX_PIXELS`, or changes its size within the clip.
    """
    _check_regular_file(path)
    try:
        frames = _read_by_seeking(path, choose)
        return _read_from_start(path, choose) if frames is None else frames
    except av.FFmpegError as error:
        raise ClipError(path, f"not a video file, or a damaged one ({_reason(error)})") from error


def _check_regular_file(path: str) -> None:
    # Decoders wait for ever on a named pipe, so this must come before any of them opens the path.
    try:
        status = os.stat(path)
    except OSError as error:
        raise ClipError(path, f"{error.strerror or error} (missing file or dangling link?)") from error
    if not stat.S_ISREG(status.st_mode):
        raise ClipError(path, "not a regular file")
    if status.st_size == 0:
        raise ClipError(path, "the file is empty")


@contextmanager
def _opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    # Tags in a foreign encoding are no reason to refuse a video.
    with av.open(path, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise ClipError(path, "it holds no video stream")
        if stream.codec_context is None:
            raise ClipError(path, "its video codec is unknown")
        _check_size(path, stream.codec_context.width, stream.codec_context.height)
        # FFmpeg's own threads can deadlock on an early stop, and loader workers already fill the cores.
        stream.codec_context.thread_count = 1
        yield container, stream


def _decoded(path: str, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    try:
        yield from container.decode(stream)
    except IndexError as error:
        # PyAV's answer when a transport stream announces a stream that was not there when it was opened.
        raise ClipError(path, "a new stream begins in the middle of it") from error


def _read_by_seeking(path: str, choose: Callable[[int], Sequence[int]]) -> torch.Tensor | None:
    """Read by rule 1; None where it does not apply or failed."""
    try:
        with _opened(path) as (container, stream):
            if SEEKABLE_CONTAINERS.isdisjoint(container.format.name.split(",")):
                return None
            index = _presentation_index(container, stream)
            if index is None:
                return None
            shown_pts, dts_of_key_pts = index
            wanted_pts = [shown_pts[number] for number in choose(len(shown_pts))]
            keys = [pts for pts in dts_of_key_pts if pts <= wanted_pts[0]]
            if not keys:
                return None
            container.seek(dts_of_key_pts[max(keys)], stream=stream, backward=True)
            return _to_rgb(path, _frames_at(_decoded(path, container, stream), wanted_pts))
    except (av.FFmpegError, _SeekFailedError):
        return None


class _SeekFailedError(Exception):
    """Decoding after a seek began too late, or did not bring every wanted frame."""


def _presentation_index(container: InputContainer, stream: VideoStream) -> tuple[list[int], dict[int, int]] | None:
    # Returns, without decoding, the sorted presentation times of the frames that are shown, and the decoding time of
    # each key packet by its presentation time; None when the packets do not say enough.
    shown_pts: list[int] = []
    dts_of_key_pts: dict[int, int] = {}
    first_key_pts: int | None = None
    for packet in container.demux(stream):
        if packet.size == 0:  # The empty packet at the end that flushes a decoder.
            continue
        if packet.pts is None or packet.dts is None or packet.is_corrupt:
            return None
        if packet.is_keyframe:
            dts_of_key_pts[packet.pts] = packet.dts
        if first_key_pts is None:
            if not packet.is_keyframe:
                return None
            first_key_pts = packet.pts
        # Edit lists mark what must be decoded but is not shown.
        if not packet.is_discard:
            shown_pts.append(packet.pts)
    shown_pts.sort()
    # Decoders drop what comes before the first key frame, so the packets would count too many.
    if not shown_pts or first_key_pts is None or shown_pts[0] < first_key_pts:
        return None
    if any(a == b for a, b in pairwise(shown_pts)):
        return None
    return shown_pts, dts_of_key_pts


def _frames_at(frames: Iterable[VideoFrame], wanted_pts: Sequence[int]) -> Iterator[VideoFrame]:
    remaining = iter(wanted_pts)
    wanted = next(remaining)
    for frame in frames:
        if frame.pts is None or frame.pts > wanted:
            raise _SeekFailedError
        if frame.pts == wanted:
            yield frame
            following = next(remaining, None)
            if following is None:
                return
            wanted = following
    raise _SeekFailedError


def _read_from_start(path: str, choose: Callable[[int], Sequence[int]]) -> torch.Tensor:
    """Read by rule 2."""
    held: list[VideoFrame] = []
    held_bytes = length = 0
    with _opened(path) as (container, stream):
        for frame in _decoded(path, container, stream):
            _check_size(path, frame.width, frame.height)
            length += 1
            held_bytes += sum(plane.buffer_size for plane in frame.planes)
            if held_bytes <= HELD_BYTES:
                held.append(frame)
    if length == 0:
        raise ClipError(path, "no frame of it can be decoded")
    numbers = choose(length)
    if numbers[-1] < len(held):
        return _to_rgb(path, [held[number] for number in numbers])
    held.clear()
    wanted = set(numbers)
    with _opened(path) as (container, stream):
        frames = enumerate(_decoded(path, container, stream))
        return _to_rgb(path, (frame for number, frame in frames if number in wanted))


def _to_rgb(path: str, frames: Iterable[VideoFrame]) -> torch.Tensor:
    pictures: list[np.ndarray] = []
    matrix: bytes | None = None
    reformatter = VideoReformatter()
    for frame in frames:
        if not pictures:
            matrix = _display_matrix(frame)
        _check_size(path, frame.width, frame.height)
        rgb = reformatter.reformat(frame, format="rgb24", threads=1)
        picture = rgb.to_ndarray()
        if pictures and picture.shape != pictures[0].shape:
            (h0, w0), (h1, w1) = pictures[0].shape[:2], picture.shape[:2]
            raise ClipError(path, f"its picture size changes from {w0}x{h0} to {w1}x{h1} within the clip")
        pictures.append(picture)
    video_FCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return video_FCHW if matrix is None else _upright(path, video_FCHW, matrix)


def _display_matrix(frame: VideoFrame) -> bytes | None:
    side_data: Any = frame.side_data  # A mapping by name, which PyAV's type stub does not say.
    try:
        return bytes(side_data["DISPLAYMATRIX"])
    except KeyError:
        return None


def _upright(path: str, video_FCHW: torch.Tensor, matrix: bytes) -> torch.Tensor:
    # Nine 32-bit numbers (a b u, c d v, x y w) that send a stored point (p, q) to (a p + c q, b p + d q).
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    if b == c == 0 and a and d:
        right, down = a, d
    elif a == d == 0 and b and c:
        video_FCHW = video_FCHW.transpose(2, 3)
        right, down = c, b
    else:
        raise ClipError(path, "it is shown rotated by an angle that is no multiple of 90 degrees")
    mirrored = [dimension for dimension, sign in ((2, down), (3, right)) if sign < 0]
    return video_FCHW.flip(mirrored)


def _check_size(path: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ClipError(path, f"its pictures of {width}x{height} exceed the limit of {MAX_PIXELS} pixels")


def _reason(error: av.FFmpegError) -> str:
    return (error.strerror or str(error) or type(error).__name__).splitlines()[0]
