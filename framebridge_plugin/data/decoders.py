"""Reading with another decoder than PyAV, where that is known to give the same frames.

decord and torchcodec can be faster, but both seek on their own, and in some files to the wrong frames, without a word.
They are therefore only used for files of which the packets prove that frame k is what they take for it; any other file
is refused, with the reason and the remedy.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import numpy as np

from framebridge_plugin.data.clip_errors import ClipError, check_regular_file
from framebridge_plugin.data.decoding import (
    Choose,
    checked,
    damage_as_clip_error,
    opened,
    read_pictures,
    turn_of,
)
from framebridge_plugin.data.packet_index import DamagedPacketError, NotIndexedError, packet_index
from framebridge_plugin.errors import UsageError

Decoder = Literal["pyav", "decord", "torchcodec"]

_MODULES = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec.decoders"}


def load_decoder(name: Decoder) -> ModuleType:
    """Import a decoder's library.

    Args:
        name: The decoder.

    Returns:
        The module that holds its reader.

    Raises:
        UsageError: It is not installed, or does not load.
    """
    try:
        return importlib.import_module(_MODULES[name])
    # torchcodec raises RuntimeError where FFmpeg's shared libraries are missing or of the wrong version.
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"decoder {name} does not load here ({_first_line(error)}); install {name} in a version that fits this "
            "torch and FFmpeg, or use decoder: pyav"
        ) from error


def read_video(
    path: str,
    choose: Choose,
    *,
    decoder: Decoder = "pyav",
    strict: bool = False,
    cover: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read chosen frames of a video file with the decoder of one's choice.

    Args:
        path: A video file.
        choose: From the number of frames in the file to the wanted ones (see `read_frames`).
        decoder: What reads it.
        strict: Whether damage is an error; "pyav" only.
        cover: Size that the decoder resizes the pictures to cover; "pyav" only.

    Returns:
        uint8 RGB array of shape [F, H, W, 3], in one piece, turned upright.

    Raises:
        ClipError: The file is broken, or (kind "wrong_container") this decoder is not known to read it rightly.
        UsageError: The decoder does not load.
    """
    if decoder == "pyav":
        return read_pictures(path, choose, strict=strict, cover=cover)
    module = load_decoder(decoder)
    numbers = choose(_length_for(decoder, path))
    read = {"decord": _read_with_decord, "torchcodec": _read_with_torchcodec}[decoder]
    return read(module, path, numbers)


def _length_for(decoder: Decoder, path: str) -> int:
    """Number of frames in a file that this decoder reads rightly."""

    def refused(reason: str) -> ClipError:
        return ClipError(
            path, f"{decoder} does not read it rightly, because {reason}; use decoder: pyav", "wrong_container"
        )

    check_regular_file(path)
    with damage_as_clip_error(path):
        with opened(path) as (container, stream):
            try:
                index = packet_index(container, stream)
            except DamagedPacketError as error:
                raise ClipError(path, str(error), "corrupt") from error
            except NotIndexedError as error:
                raise refused(str(error)) from error
            codec = stream.codec_context.codec.canonical_name
        with opened(path) as (container, stream):
            first = next(checked(path, container.decode(stream)), None)
    if first is None:
        raise ClipError(path, "no frame of it can be decoded", "no_frames")
    if index.hides_frames:
        raise refused("an edit list hides some of its frames")
    if decoder == "decord" and codec == "av1":
        raise refused("its codec is av1")
    if decoder == "decord" and index.has_open_groups:
        raise refused("frames before a key frame depend on it (open groups of pictures)")
    if turn_of(path, first).is_reflection:
        raise refused("it is shown mirrored")
    return len(index.shown_pts)


def _read_with_decord(decord: ModuleType, path: str, numbers: Sequence[int]) -> np.ndarray:
    try:
        # Frames that cannot be decoded are filled with their neighbours up to this share of all frames.
        reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
        pictures = reader.get_batch(list(numbers))
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError) as error:
        raise _damaged(path, "decord", error) from error
    # Its type depends on a setting of decord's that other code of the process may have changed.
    return pictures.asnumpy() if isinstance(pictures, decord.nd.NDArray) else np.asarray(pictures)


def _read_with_torchcodec(torchcodec: ModuleType, path: str, numbers: Sequence[int]) -> np.ndarray:
    try:
        reader = torchcodec.VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="exact")
        return reader.get_frames_at(list(numbers)).data.contiguous().numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise _damaged(path, "torchcodec", error) from error


def _damaged(path: str, decoder: str, error: Exception) -> ClipError:
    return ClipError(path, f"{decoder} cannot decode it ({_first_line(error)})", "corrupt")


def _first_line(error: Exception) -> str:
    # decord puts the time of day and the place in its own source in front.
    return re.sub(r"\[[\d:]+\] \S+: ", "", (str(error).strip() or type(error).__name__).splitlines()[0])
