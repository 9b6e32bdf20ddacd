"""The program that `isolation` starts: it reads the clips that it is asked for until its asker is gone.

Requests are (path, options of `read_video` or None for `read_timing`, time limit in seconds). The answer is a
`Timing`, or the number of frames in the file, once or more often, each of which is answered by the wanted numbers or
by a `ClipError` that says why there are none; then an exception, or the shape of the frames [F, H, W, 3], which lie in
shared memory until the next request.

It does not load torch, so that it starts fast and needs little memory beside the many others.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from framebridge_plugin.data.decoding.decoders import read_video
from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.data.decoding.exact import read_timing
from framebridge_plugin.errors import FrameBridgeError


def main(requests_fd: int, replies_fd: int, frames_fd: int) -> None:
    """Serve until the other end of the line is closed; the file descriptors are two pipes and the shared memory."""
    # Ctrl-C in a terminal reaches the whole group, and a scheduler tells all processes to stop; the asker decides what
    # it means.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    requests = Connection(requests_fd, writable=False)
    replies = Connection(replies_fd, readable=False)
    try:
        replies.send("ready")
        while True:
            path, options, time_limit = requests.recv()
            # The asker ends this process at the limit. If the asker is gone, the kernel does so a little later, even
            # where a decoder never comes back to Python.
            signal.setitimer(signal.ITIMER_REAL, 2 * time_limit)
            _serve(requests, replies, frames_fd, path, options)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, BrokenPipeError):
        pass


def _serve(
    requests: Connection, replies: Connection, frames_fd: int, path: str, options: dict[str, Any] | None
) -> None:
    def choose(length: int) -> Sequence[int]:
        replies.send(length)
        answer = requests.recv()
        if isinstance(answer, ClipError):
            raise answer
        return answer

    try:
        if options is None:
            replies.send(read_timing(path))
            return
        pictures = read_video(path, choose, **options)
    except (EOFError, BrokenPipeError):
        raise
    except FrameBridgeError as error:
        replies.send(error)
        return
    except Exception:
        replies.send(RuntimeError(f"isolated decoding of {path} failed:\n{traceback.format_exc()}"))
        return
    os.lseek(frames_fd, 0, os.SEEK_SET)
    with open(frames_fd, "wb", closefd=False) as shared:
        shared.write(pictures.data)
    replies.send(pictures.shape)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
