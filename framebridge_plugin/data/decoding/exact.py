"""Exactly the frames that were asked for, out of any video file that FFmpeg reads.

Frame k of a file is the k-th frame that decoding it from its start puts out. Seeking is only trusted where it is
provably the same:

1. mp4, mov, mkv and webm of a codec that stores one frame per packet, whose packets all carry a decoding and a unique
   presentation time: the sorted presentation times of the packets that are shown are the index; decoding starts at
   the last key packet at or before the first wanted frame, and the decoded times must say that from there to the last
   wanted frame every frame of the index came, in its order, and no other.
2. AVI files of MPEG-4 Part 2 (XviD, DivX) without B-frames, whose packets are one coded picture each: frame k is
   packet k, and its packets go to the decoder from the last intra picture on (see `mpeg4_packets`).
3. Anything else, and any failure of 1 or 2: decode from the start and count.

What an index says about a file holds for every window of it: where decoding all gives fewer frames than the index has,
the frames keep the numbers of their times, and what did not come cannot be read.

Only wanted frames are converted to RGB, which is where most of the time goes otherwise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from framebridge_plugin.data.decoding.errors import ClipError, check_regular_file
from framebridge_plugin.data.decoding.mpeg4_packets import PicturePackets, picture_packets
from framebridge_plugin.data.decoding.packet_index import NotIndexedError, PacketIndex, packet_index
from framebridge_plugin.data.showing import AS_SHOWN, Conversion, check_size, pixel_aspect, to_rgb

if TYPE_CHECKING:
    import torch

# While the frames of a file are counted by decoding it, those that may be wanted are kept, up to this many bytes, so
# that most files are decoded once: a window is drawn only when the length is known.
HELD_BYTES = 256 * 2**20

CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,live_flv,asf,ogg,gif,mxf,nut,dv,rm,swf,wtv,"
    "yuv4mpegpipe,h261,h263,vc1,mjpeg,mjpeg_2000,nsv,nuv,bink,smk,apng,webp_pipe,vob,roq,dirac,avs2,avs3,vvc"
)
"""What a video may be, by FFmpeg's names; not a playlist, which has other files opened (concat, hls, dash, sdp)."""

Choose = Callable[[int], Sequence[int]]
"""From the number of frames in a file to the numbers of the wanted ones."""


def read_frames(path: str, choose: Choose) -> torch.Tensor:
    """Read chosen frames of a video file.

    Args:
        path: A video file.
        choose: Called with the number of frames in the file; returns the wanted frame numbers, strictly increasing,
            in [0, number of frames - 1]. It may be called more than once, also with a number of frames that turns
            out to be wrong, and may raise `ClipError`.

    Returns:
        uint8 RGB tensor of shape [F, 3, H, W], as it is to be shown: turned upright as the file's display matrix says,
        and stretched to square pixels where its sample aspect ratio says that they are not.

    Raises:
        ClipError: The file is missing, no regular file, empty, not a video, damaged where it matters, larger than
            8K, or changes its size within the clip; or the frames take more than 2 GiB together.
    """
    import torch  # Not above: decoding processes do without.

    return torch.from_numpy(read_pictures(path, choose)).permute(0, 3, 1, 2)


def read_first_picture(path: str) -> np.ndarray:
    """Read the first frame of a video as `read_frames` does: uint8 RGB [H, W, 3]."""
    return read_pictures(path, lambda length: [0])[0]


def read_pictures(path: str, choose: Choose, *, strict: bool = False, conversion: Conversion = AS_SHOWN) -> np.ndarray:
    """Do what `read_frames` does, as an array [F, H, W, 3], or of what `conversion` makes of each picture.

    With `strict`, damage in what is decoded is an error; else FFmpeg hides what it can, without a word.
    """
    check_regular_file(path)
    with damage_as_clip_error(path):
        pictures, index = _read_by_index(path, choose, strict, conversion)
        return _read_from_start(path, choose, strict, conversion, index) if pictures is None else pictures


@contextmanager
def damage_as_clip_error(path: str) -> Iterator[None]:
    """Turn FFmpeg's errors within the block into `ClipError`."""
    try:
        yield
    except av.FFmpegError as error:
        raise ClipError(path, f"the file is damaged ({_reason(error)})", "corrupt") from error


@contextmanager
def opened(path: str, strict: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a regular file and choose its video stream; `ClipError` if it is no video that can be decoded."""
    try:
        # Tags in a foreign encoding are no reason to refuse a video.
        container = av.open(path, metadata_errors="ignore", options={"format_whitelist": CONTAINERS})
    except PermissionError as error:
        raise ClipError(path, error.strerror or "it may not be read", "unreadable") from error
    except av.FFmpegError as error:
        reason = f"not a video file, or one with a damaged header ({_reason(error)})"
        raise ClipError(path, reason, "not_video") from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise ClipError(path, "it holds no video stream", "no_video_stream")
        if stream.codec_context is None:
            raise ClipError(path, "its video codec is unknown", "codec")
        check_size(path, stream.codec_context.width, stream.codec_context.height)
        # FFmpeg's own threads can deadlock on an early stop, and loader workers already fill the cores.
        stream.codec_context.thread_count = 1
        options = {"err_detect": "explode"} if strict else {}
        if stream.codec_context.codec.canonical_name == "h264":
            # Without it, FFmpeg learns how far pictures are reordered by leaving one out, if the stream does not say.
            options["strict"] = "1"
        stream.codec_context.options = options
        yield container, stream


def checked(path: str, frames: Iterable[VideoFrame], strict: bool = False) -> Iterator[VideoFrame]:
    """Pass decoded frames on; damage, and if `strict` a picture marked as damaged, is a `ClipError`."""
    try:
        for frame in frames:
            if strict and frame.is_corrupt:
                raise ClipError(path, "a picture of it is damaged", "corrupt")
            yield frame
    except IndexError as error:
        # PyAV's answer when a transport stream announces a stream that was not there when it was opened.
        raise ClipError(path, "a new stream begins in the middle of it", "corrupt") from error


class Timing(NamedTuple):
    """Frames per second of a video, a mean (0 if it does not say), and its number of frames."""

    rate: float
    length: int


def read_timing(path: str) -> Timing:
    """Read how fast and how long a video is, from its header where that says so; raises `ClipError`."""
    check_regular_file(path)
    with damage_as_clip_error(path), opened(path) as (container, stream):
        length = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        # Theora gives no mean.
        return Timing(float(stream.average_rate or stream.guessed_rate or 0), length)


def _read_by_index(
    path: str, choose: Choose, strict: bool = False, conversion: Conversion = AS_SHOWN
) -> tuple[np.ndarray | None, PacketIndex | PicturePackets | None]:
    """Read by rule 1 or 2; no pictures where neither applies, or it failed. With the index, if there is one."""
    index: PacketIndex | PicturePackets | None = None
    try:
        with opened(path, strict) as (container, stream):
            aspect = pixel_aspect(path, stream)
            if container.format.name == "avi" and stream.codec_context.codec.canonical_name == "mpeg4":
                index = picture_packets(container, stream)
                numbers = choose(index.length)
                start = index.last_intra(numbers[0])
                frames = checked(path, index.decoded(stream, start, numbers[-1]), strict)
            else:
                index = packet_index(container, stream)
                if not index.has_decoding_times:
                    return None, index
                numbers = choose(index.length)
                # By its presentation time: by the decoding time, FFmpeg would seek to the key packet before it.
                key = index.last_key(numbers[0])
                container.seek(key, stream=stream, backward=True)
                start = bisect_left(index.shown_pts, key)
                decoded = checked(path, container.decode(stream), strict)
                frames = _span(decoded, index.shown_pts[start : numbers[-1] + 1])
            return to_rgb(path, _numbered(frames, numbers, start), len(numbers), aspect, conversion), index
    except (av.FFmpegError, NotIndexedError):
        pass
    except ClipError as error:
        # In a file with open groups, a seek can make damage of what is whole.
        if error.kind != "corrupt":
            raise
    return None, index


def _span(frames: Iterable[VideoFrame], expected_pts: Sequence[int]) -> Iterator[VideoFrame]:
    # The frames at these times. From the first to the last of them, none may be missing and no other come.
    expected = iter(expected_pts)
    following: int | None = next(expected)
    has_begun = False
    for frame in frames:
        if frame.pts != following:
            if has_begun or frame.pts is None or following is None or frame.pts > following:
                raise NotIndexedError("decoding after a seek gives other frames")
            continue
        has_begun = True
        yield frame
        following = next(expected, None)
        if following is None:
            return
    raise NotIndexedError("decoding after a seek gives too few frames")


def _numbered(frames: Iterable[VideoFrame], numbers: Sequence[int], first: int) -> Iterator[VideoFrame]:
    wanted = set(numbers)
    return (frame for number, frame in enumerate(frames, start=first) if number in wanted)


def _read_from_start(
    path: str,
    choose: Choose,
    strict: bool,
    conversion: Conversion,
    index: PacketIndex | PicturePackets | None = None,
) -> np.ndarray:
    """Read by rule 3."""
    held: dict[int, VideoFrame] = {}
    held_bytes = 0
    times: list[int | None] = []
    with opened(path, strict) as (container, stream):
        aspect = pixel_aspect(path, stream)
        expected = _chosen_of_announced(choose, stream.frames if index is None else index.length)
        for frame in checked(path, container.decode(stream), strict):
            check_size(path, frame.width, frame.height)
            if (expected is None or len(times) in expected) and held_bytes <= HELD_BYTES:
                held_bytes += sum(plane.buffer_size for plane in frame.planes)
                held[len(times)] = frame
            times.append(frame.pts)
    if not times:
        raise ClipError(path, "no frame of it can be decoded", "no_frames")
    places = _places(path, choose(len(times) if index is None else index.length), times, index)
    if all(place in held for place in places):
        return to_rgb(path, (held[place] for place in places), len(places), aspect, conversion)
    held.clear()
    with opened(path, strict) as (container, stream):
        wanted = _numbered(checked(path, container.decode(stream), strict), places, 0)
        return to_rgb(path, wanted, len(places), aspect, conversion)


def _places(
    path: str, numbers: Sequence[int], times: Sequence[int | None], index: PacketIndex | PicturePackets | None
) -> Sequence[int]:
    """Where the wanted frames stand among all that were decoded, at these times."""
    if index is None or len(times) == index.length:
        return numbers
    known = [time for time in times if time is not None]
    if isinstance(index, PacketIndex) and known == sorted(set(known)) and len(known) == len(times):
        place_of = {time: place for place, time in enumerate(known)}
        wanted = [index.shown_pts[number] for number in numbers]
        if place_of.keys() >= set(wanted):
            return [place_of[time] for time in wanted]
    reason = f"its decoder gives {len(times)} of its {index.length} frames, and not all that are wanted"
    raise ClipError(path, reason, "corrupt")


def _chosen_of_announced(choose: Choose, length: int) -> set[int] | None:
    # What will be wanted if the header tells the right number of frames; None if it cannot be said. Keeping all
    # frames would double the time, since a decoder fills the same memory again with each frame that is let go.
    try:
        return set(choose(length)) if length > 0 else None
    except ClipError:
        return None


def _reason(error: av.FFmpegError) -> str:
    return (error.strerror or str(error) or type(error).__name__).splitlines()[0]
