"""What can be wrong with a video file, and the check that comes before any decoder opens one."""

from __future__ import annotations

import os
import stat
from typing import Literal

from framebridge_plugin.errors import FrameBridgeError, escaped

ClipErrorKind = Literal[
    "missing", "unreadable", "not_regular", "empty", "not_video", "no_video_stream", "codec", "no_frames", "too_short",
    "too_large", "corrupt", "size_change", "rotation", "pixel_aspect", "wrong_container", "timeout", "crashed",
]  # fmt: skip
"""What is wrong with a file, in one word.

"wrong_container" is a sound file of a kind that the chosen decoder reads wrongly or not at all; "rotation" one that is
to be shown turned by an angle that is no multiple of 90 degrees; "pixel_aspect" one whose sample aspect ratio cannot
be; "timeout" and "crashed" come from isolated decoding only.
"""


class ClipError(FrameBridgeError):
    """A video file that cannot give the clip that was asked for.

    Args:
        path: The file.
        reason: What is wrong with it, in a few words.
        kind: The same in one word that does not change, for counting.
    """

    def __init__(self, path: str, reason: str, kind: ClipErrorKind) -> None:
        super().__init__(path, reason, kind)
        self.path = path
        self.reason = reason
        self.kind: ClipErrorKind = kind

    def __str__(self) -> str:
        return escaped(f"cannot read the clip {self.path}: {self.reason}")


def check_regular_file(path: str) -> None:
    """Refuse what is not a file with content: decoders wait for ever on a named pipe as soon as they open it."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ClipError(path, f"{error.strerror} (missing file or dangling link?)", "missing") from error
    except OSError as error:
        raise ClipError(path, error.strerror or str(error), "unreadable") from error
    if not stat.S_ISREG(status.st_mode):
        raise ClipError(path, "not a regular file", "not_regular")
    if status.st_size == 0:
        raise ClipError(path, "the file is empty", "empty")
