"""Reading with another decoder than PyAV, where that is known to give the same frames.

decord can be faster, but it seeks on its own, and to the wrong frames, without a word. It only reads those
whose packets prove that frame k is what it takes for it; others are refused, with the reason and the remedy.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from framebridge_plugin.data.decoding.errors import ClipError, check_regular_file
from framebridge_plugin.data.decoding.exact import Choose, checked, damage_as_clip_error, opened, read_pictures
from framebridge_plugin.data.decoding.packet_index import (
    DamagedPacketError,
    NotIndexedError,
    PacketIndex,
    packet_index,
)
from framebridge_plugin.data.showing import AS_SHOWN, Conversion, check_bytes, pixel_aspect, resized, turn_of
from framebridge_plugin.errors import UsageError, first_line
from framebridge_plugin.sizes import square_pixel_size


def load_decoder(name: str) -> ModuleType:
    """Import a decoder's library; `UsageError` if it is not installed or does not load."""
    try:
        return importlib.import_module("av" if name == "pyav" else name)
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"decoder {name} does not load here ({_first_line(error)}); install {name} anew, or use decoder: pyav"
        ) from error


def read_video(
    path: str,
    choose: Choose,
    *,
    decoder: str = "pyav",
    strict: bool = False,
    conversion: Conversion = AS_SHOWN,
) -> np.ndarray:
    """Do what `read_pictures` does, by another decoder too; `ClipError` "wrong_container" where that may be wrong."""
    if decoder == "pyav":
        return read_pictures(path, choose, strict=strict, conversion=conversion)
    decord = load_decoder(decoder)
    check_regular_file(path)
    with damage_as_clip_error(path):
        index = _trusted_index(path)
        numbers = choose(index.length)
        shown_size = _checked_size(path, index, numbers)
    pictures = _read_with_decord(decord, path, numbers)
    if pictures.shape[1:3] != shown_size:
        pictures = resized(pictures, *shown_size)
    return pictures if conversion.finish is None else np.stack([*map(conversion.finish, pictures)])


def _refused(path: str, reason: str) -> ClipError:
    return ClipError(path, f"decord does not read it rightly, because {reason}; use decoder: pyav", "wrong_container")


def _trusted_index(path: str) -> PacketIndex:
    """The frames of a file whose packets prove that decord reads it rightly."""
    with opened(path) as (container, stream):
        try:
            index = packet_index(container, stream)
        except DamagedPacketError as error:
            raise ClipError(path, str(error), "corrupt") from error
        except NotIndexedError as error:
            raise _refused(path, str(error)) from error
        codec = stream.codec_context.codec.canonical_name
    if index.hides_frames:
        raise _refused(path, "an edit list hides some of its frames")
    if codec == "av1":
        raise _refused(path, "its codec is av1")
    if index.has_open_groups:
        raise _refused(path, "frames before a key frame depend on it (open groups of pictures)")
    is_reordered = codec == "h264" and len(index.key_pts) < index.length
    if is_reordered and _first_delay(path, {}) != _first_delay(path, {"strict": "1"}):
        raise _refused(path, "it does not say how far its pictures are reordered")
    return index


def _first_delay(path: str, options: dict[str, str]) -> int | None:
    """How many packets a decoder takes before its first frame; None if there is no frame."""
    with opened(path) as (container, stream):
        stream.codec_context.options = options
        return next((n for n, packet in enumerate(container.demux(stream)) if stream.decode(packet)), None)


def _key_frames(container: InputContainer, stream: VideoStream, last_pts: int) -> Iterator[VideoFrame]:
    for packet in container.demux(stream):
        if packet.pts is None or packet.pts > last_pts:
            break
        if packet.is_keyframe:
            # As if decoding began with it: with an earlier frame in hand, a decoder passes on what it cannot mend.
            yield from [*stream.decode(packet), *stream.decode(None)]
            stream.codec_context.flush_buffers()


def _checked_size(path: str, index: PacketIndex, numbers: Sequence[int]) -> tuple[int, int]:
    """Height and width at which the wanted frames are to be shown, of a file whose first frame is of their size."""
    with opened(path) as (container, stream):
        aspect = pixel_aspect(path, stream)
        first = next(checked(path, container.decode(stream)), None)
        if first is None:
            raise ClipError(path, "no frame of it can be decoded", "no_frames")
        start, end = index.last_key(numbers[0]), index.shown_pts[numbers[-1]]
        container.seek(start, stream=stream, backward=True)
        entered = []
        for key in _key_frames(container, stream, end):
            if (key.height, key.width) != (first.height, first.width):
                raise _refused(path, "its picture size changes")
            entered.append(key.pts)
        if entered != [pts for pts in index.key_pts if start <= pts <= end]:
            raise _refused(path, "decoding cannot begin at its key frames")
    turn = turn_of(path, first)
    if turn.is_reflection:
        raise _refused(path, "it is shown mirrored")
    shown_size = turn.size(square_pixel_size(first.height, first.width, aspect))
    check_bytes(path, (len(numbers), *shown_size))  # nothing of a stored picture is left out of it
    return shown_size


def _read_with_decord(decord: ModuleType, path: str, numbers: Sequence[int]) -> np.ndarray:
    try:
        # Frames that cannot be decoded are filled with their neighbours up to this share of all frames.
        reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
        pictures = reader.get_batch(list(numbers))
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError) as error:
        reason = f"decord cannot decode it ({_first_line(error)})"
        try:
            read_pictures(path, lambda length: numbers, strict=True)
        except ClipError:
            raise ClipError(path, reason, "corrupt") from error
        raise ClipError(path, f"{reason}, but it is sound; use decoder: pyav", "wrong_container") from error
    # Its type depends on a setting of decord's that other code of the process may have changed.
    return pictures.asnumpy() if isinstance(pictures, decord.nd.NDArray) else np.asarray(pictures)


def _first_line(error: Exception) -> str:
    # decord puts the time of day and the place in its own source in front.
    return re.sub(r"\[[\d:]+\] \S+: ", "", first_line(error))
