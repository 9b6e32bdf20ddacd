"""MPEG-4 Part 2 (XviD, DivX) in AVI files: late frames without decoding all that come before them.

AVI has no presentation times, and its own index may be wrong, so a seek proves nothing. But most such files, those
without B-frames, hold exactly one coded picture in each packet: frame k is then packet k, and can be decoded from the
last intra picture at or before it. The headers of the pictures say whether a file is of this kind (ISO/IEC 14496-2,
sections 6.2.3 and 6.2.5). The packets come from one pass over the file, without a seek.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from framebridge_plugin.data.decoding.packet_index import DamagedPacketError, NotIndexedError

MAX_BYTES = 64 * 2**20
"""The packets of a file are kept in memory up to this size: hours of XviD video of UCF-101's kind."""

_START_CODE = b"\x00\x00\x01"
_PICTURE = _START_CODE + b"\xb6"
_LAYERS = range(0x20, 0x30)
# The profiles that encoders write into AVI, Simple and Advanced Simple. In others headers look otherwise.
_LAYER_TYPES = (1, 17)
_INTRA, _PREDICTED = "00", "01"


@dataclass(frozen=True)
class PicturePackets:
    """The packets of a file, in its order, each of which is one picture; and the numbers of the intra pictures."""

    packets: list[Packet]
    intra: list[int]

    @property
    def length(self) -> int:
        """Number of frames."""
        return len(self.packets)

    def last_intra(self, number: int) -> int:
        """Number of the last intra picture at or before a frame, where decoding may begin."""
        return self.intra[bisect_right(self.intra, number) - 1]

    def decoded(self, stream: VideoStream, start: int, last: int) -> Iterator[VideoFrame]:
        """Decode from an intra picture to the frame `last`; `NotIndexedError` if not every packet gives a frame."""
        # The first packet too: its headers name the encoder, whose arithmetic the decoder has to imitate.
        numbers = [*([0] if start > 0 else []), *range(start, last + 1)]
        count = 0
        for packet in (*(self.packets[number] for number in numbers), None):
            for frame in stream.decode(packet):
                if count < len(numbers) and numbers[count] >= start:
                    yield frame
                count += 1
        if count != len(numbers):
            raise NotIndexedError(f"{len(numbers)} packets of it give {count} frames")


def picture_packets(container: InputContainer, stream: VideoStream) -> PicturePackets:
    """List the packets of such a file; `NotIndexedError` if they do not say which frames decoding gives."""
    packets: list[Packet] = []
    intra: list[int] = []
    layer: bytes | None = None
    time_bits = size = 0
    for packet in container.demux(stream):
        if packet.dts is None and packet.size == 0:  # The empty packet at the end that flushes a decoder.
            break
        if packet.is_corrupt:
            raise DamagedPacketError("a packet of it is cut or damaged")
        content = bytes(packet)
        size += len(content)
        if size > MAX_BYTES:
            raise NotIndexedError(f"it holds more than {MAX_BYTES} bytes of video")
        for found in _layers(content):
            if layer is None:
                layer, time_bits = found, _time_bits(found)
            elif found != layer:
                raise NotIndexedError("its settings change within it")
        if layer is None:
            raise NotIndexedError("it does not begin with its settings")
        kind = _picture_kind(content, time_bits)
        if packet.is_keyframe != (kind == _INTRA):
            raise NotIndexedError("its index says otherwise than its pictures where it can be entered")
        if kind == _INTRA:
            intra.append(len(packets))
        packets.append(packet)
    if not intra or intra[0] != 0:
        raise NotIndexedError("it does not begin with a key frame")
    return PicturePackets(packets, intra)


def _layers(content: bytes) -> Iterator[bytes]:
    # The headers of the video object layers (VOL) in a packet, each up to the next start code.
    at = content.find(_START_CODE)
    end = content.find(_PICTURE)
    while 0 <= at < end:
        following = content.find(_START_CODE, at + 3)
        if content[at + 3] in _LAYERS:
            yield content[at + 4 : following]
        at = following


def _time_bits(layer: bytes) -> int:
    # How many bits a picture's header spends on its time within a second.
    bits = _bits(layer[:32])
    if int(bits[1:9], 2) not in _LAYER_TYPES:
        raise NotIndexedError("its profile is neither Simple nor Advanced Simple")
    at = 9
    at += 8 if bits[at] == "1" else 1  # version and priority
    at += 20 if bits[at : at + 4] == "1111" else 4  # shape of the pixels
    if bits[at] == "1":  # parameters of the decoder's buffer
        at += 83 if bits[at + 4] == "1" else 4
    at += 1
    if bits[at : at + 3] != "001":  # rectangular pictures, a marker
        raise NotIndexedError("its pictures are not rectangular")
    return max(1, (int(bits[at + 3 : at + 19], 2) - 1).bit_length())


def _picture_kind(content: bytes, time_bits: int) -> str:
    at = content.find(_PICTURE)
    if at < 0 or content.find(_PICTURE, at + 4) >= 0:
        raise NotIndexedError("a packet of it does not hold one picture")
    bits = _bits(content[at + 4 : at + 16])
    # Kind, seconds in unary, a marker, time, a marker, and whether anything is coded.
    time = bits.index("0", 2) + 2
    if bits[:2] not in (_INTRA, _PREDICTED):
        raise NotIndexedError("it has B-frames or sprites")
    if bits[time - 1] != "1" or bits[time + time_bits : time + time_bits + 2] != "11":
        raise NotIndexedError("a picture of it is left out, or its header is damaged")
    return bits[:2]


def _bits(content: bytes) -> str:
    # Headers that end too early run into zeros, which no marker is.
    return "".join(f"{byte:08b}" for byte in content.ljust(32, b"\x00"))
