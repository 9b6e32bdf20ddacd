"""Which frames a video file holds, told from its packets without decoding them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from av.container import InputContainer
from av.video.stream import VideoStream

INDEXED_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})

# Every packet of these is one picture. In others a packet can hold none that is shown (VP8's hidden pictures, those
# that MPEG-4 leaves out), so that counting packets would count too many.
INDEXED_CODECS = ("h264", "hevc", "vp9", "av1")


class NotIndexedError(Exception):
    """Why the packets of a file do not say which frames decoding it gives, in a few words."""


class DamagedPacketError(NotIndexedError):
    """The same, because the file is damaged."""


@dataclass(frozen=True)
class PacketIndex:
    """What the packets of a file say about its frames.

    Attributes:
        shown_pts: Presentation times of the frames that are shown, sorted.
        key_pts: Presentation times of the key packets, in the order of the file.
        has_decoding_times: Whether every packet carries a decoding time.
        hides_frames: Whether an edit list hides frames that must be decoded.
        has_open_groups: Whether frames are stored after a key frame and shown before it.
    """

    shown_pts: list[int]
    key_pts: list[int]
    has_decoding_times: bool
    hides_frames: bool
    has_open_groups: bool


def packet_index(container: InputContainer, stream: VideoStream) -> PacketIndex:
    """List the frames of a file without decoding it.

    Args:
        container: The open file, at its start.
        stream: Its video stream.

    Returns:
        The index, of at least one frame.

    Raises:
        NotIndexedError: The packets do not say which frames decoding gives.
    """
    if INDEXED_CONTAINERS.isdisjoint(container.format.name.split(",")):
        raise NotIndexedError(f"its container is {container.format.name}, not mp4, mov, mkv or webm")
    codec = stream.codec_context.codec.canonical_name
    if codec not in INDEXED_CODECS:
        raise NotIndexedError(f"its codec is {codec}, none of {', '.join(INDEXED_CODECS)}")
    shown_pts: list[int] = []
    key_pts: list[int] = []
    has_decoding_times, hides_frames, has_open_groups = True, False, False
    for packet in container.demux(stream):
        if packet.size == 0:  # The empty packet at the end that flushes a decoder.
            continue
        if packet.is_corrupt:
            raise DamagedPacketError("a packet of it is cut or damaged")
        if packet.pts is None:
            raise NotIndexedError("a packet of it carries no presentation time")
        if packet.is_keyframe:
            key_pts.append(packet.pts)
        if not key_pts:
            raise NotIndexedError("it does not begin with a key frame")
        has_decoding_times &= packet.dts is not None
        has_open_groups |= packet.pts < key_pts[-1]
        # Edit lists mark what must be decoded but is not shown.
        if packet.is_discard:
            hides_frames = True
        else:
            shown_pts.append(packet.pts)
    shown_pts.sort()
    # Decoders drop what comes before the first key frame, so the packets would count too many.
    if not shown_pts or shown_pts[0] < key_pts[0]:
        raise NotIndexedError("it does not begin with a key frame")
    if any(a == b for a, b in pairwise(shown_pts)):
        raise NotIndexedError("two of its frames have the same presentation time")
    return PacketIndex(shown_pts, key_pts, has_decoding_times, hides_frames, has_open_groups)
