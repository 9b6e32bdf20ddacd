"""Which frames a video file holds, told from its packets without decoding them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

INDEXED_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})

# Every packet of these is one picture. In others a packet can hold none that is shown (VP8's hidden pictures, those
# that MPEG-4 leaves out), so that counting packets would count too many.
INDEXED_CODECS = ("h264", "hevc", "vp9", "av1")

_WHOLE_PICTURES = (0, 1)  # FFmpeg's field orders "unknown" and "progressive"


class NotIndexedError(Exception):
    """Why the packets of a file do not say which frames decoding it gives, in a few words."""


class DamagedPacketError(NotIndexedError):
    """The same, because the file is damaged."""


@dataclass(frozen=True)
class PacketIndex:
    """What the packets of a file say about its frames; both lists of presentation times are sorted."""

    shown_pts: list[int]
    key_pts: list[int]
    has_decoding_times: bool
    hides_frames: bool
    """Whether an edit list hides frames that must be decoded."""
    has_open_groups: bool
    """Whether frames are stored after a key frame and shown before it."""

    @property
    def length(self) -> int:
        """Number of frames that are shown."""
        return len(self.shown_pts)

    def last_key(self, number: int) -> int:
        """Presentation time of the last key packet at or before a frame, where decoding may begin."""
        return self.key_pts[bisect_right(self.key_pts, self.shown_pts[number]) - 1]


def packet_index(container: InputContainer, stream: VideoStream) -> PacketIndex:
    """List the frames of a file, at least one, without decoding it; `NotIndexedError` if the packets do not tell."""
    if INDEXED_CONTAINERS.isdisjoint(container.format.name.split(",")):
        raise NotIndexedError(f"its container is {container.format.name}, not mp4, mov, mkv or webm")
    codec = stream.codec_context.codec.canonical_name
    if codec not in INDEXED_CODECS:
        raise NotIndexedError(f"its codec is {codec}, none of {', '.join(INDEXED_CODECS)}")
    if codec == "h264" and stream.codec_context.field_order not in _WHOLE_PICTURES:
        raise NotIndexedError("it is interlaced: a packet may hold half a picture")
    shown_pts: list[int] = []
    key_pts: list[int] = []
    has_decoding_times, hides_frames, has_open_groups, is_reordered = True, False, False, False
    latest: int | None = None
    for packet in container.demux(stream):
        if packet.size == 0:  # The empty packet at the end that flushes a decoder.
            continue
        if packet.is_corrupt:
            raise DamagedPacketError("a packet of it is cut or damaged")
        if packet.pts is None:
            raise NotIndexedError("a packet of it carries no presentation time")
        if packet.is_keyframe:
            if latest is not None and latest >= packet.pts:
                raise NotIndexedError("frames that are stored before a key frame are shown after it")
            key_pts.append(packet.pts)
        if not key_pts:
            raise NotIndexedError("it does not begin with a key frame")
        has_decoding_times &= packet.dts is not None
        if codec == "vp9" and _shown_by_vp9(packet) != 1:
            raise NotIndexedError("a packet of it does not hold one shown picture")
        has_open_groups |= packet.pts < key_pts[-1]
        is_reordered |= latest is not None and packet.pts < latest
        latest = packet.pts if latest is None else max(latest, packet.pts)
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
    if has_decoding_times and stream.codec_context.has_b_frames and not is_reordered and len(shown_pts) > 1:
        raise NotIndexedError("its times are those of decoding, not of showing")
    return PacketIndex(shown_pts, key_pts, has_decoding_times, hides_frames, has_open_groups)


def _shown_by_vp9(packet: Packet) -> int:
    # How many of the pictures in a packet are shown (VP9 bitstream specification, section 7.2 and annex B).
    content = memoryview(packet)
    start, shown = 0, 0
    for size in _vp9_frame_sizes(content):
        if start >= len(content):
            return 0
        header = content[start] << 1 if content[start] & 0x30 == 0x30 else content[start]  # Profile 3 has a bit more.
        shown += bool(header & 0x08 or header & 0x02)  # Shows an earlier picture, or itself.
        start += size
    return shown


def _vp9_frame_sizes(content: memoryview) -> list[int]:
    last = content[-1]
    count, width = (last & 0x07) + 1, (last >> 3 & 0x03) + 1
    index = content[-(2 + count * width) :]
    if last & 0xE0 != 0xC0 or len(index) < 2 + count * width or index[0] != last:
        return [len(content)]
    return [int.from_bytes(index[1 + i * width : 1 + (i + 1) * width], "little") for i in range(count)]
