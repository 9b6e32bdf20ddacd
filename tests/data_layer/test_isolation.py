"""A decoder that crashes or hangs in its child process costs one clip, and leaves nothing behind.

A hang is a real one: opening a file of which another process holds a lease waits, in the kernel, until the lease is
given back or has been called back in vain for 45 seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from framebridge_plugin.data import ClipError, ClipSettings, ClipStream, index_dataset, read_clip
from framebridge_plugin.data.decoding import isolation
from framebridge_plugin.data.decoding.decoders import read_video
from framebridge_plugin.data.decoding.isolation import read_video_isolated
from framebridge_plugin.data.showing import Conversion
from framebridge_plugin.errors import UsageError
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbers_in, tensor, write_video
from tests.data_layer.video_kinds import FRAMES, KINDS, WINDOWS, announce, last_five_of, write_turned

SETTINGS = ClipSettings(5, HEIGHT, WIDTH, frame_stride=2, isolated=True)


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    isolation._close_child()


@contextlib.contextmanager
def leased(path: Path) -> Iterator[None]:
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # Sent to the holder when another process opens the file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between opening and reading
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 30 seconds")


def error_in(path: Path) -> ClipError:
    with pytest.raises(ClipError) as caught:
        read_video_isolated(str(path), range)
    assert "\n" not in str(caught.value)
    return caught.value


def reads(path: Path) -> bool:
    return numbers_in(tensor(read_video_isolated(str(path), lambda length: [2, 3]))) == [2, 3]


def waits_for_the_lease() -> bool:
    """Whether another process waits in the kernel for a lease of this one."""
    locks = Path("/proc/locks").read_text().splitlines()
    return any({"LEASE", "BREAKING", str(os.getpid())} <= set(line.split()) for line in locks)


def test_the_memory_of_a_large_clip_is_given_back(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "a.mp4"))
    for bound, kept in ((1000, 0), (isolation.KEPT_BYTES, 9 * HEIGHT * WIDTH * 3)) * 2:
        monkeypatch.setattr(isolation, "KEPT_BYTES", bound)
        assert numbers_in(tensor(read_video_isolated(path, lambda length: range(9)))) == list(range(9))
        assert os.fstat(isolation._child._frames.fileno()).st_size == kept


def test_the_frames_are_the_same_as_without_isolation(tmp_path):
    paths = [KINDS[kind].write(tmp_path) for kind in ("h264, open groups", "mpeg4 avi with B-frames")]
    paths.append(write_turned(tmp_path / "turned.mp4", (0, 1, -1, 0)))
    for path, wanted in itertools.product(paths, [*WINDOWS[1:4], [0, 5, 6, 12]]):
        for cover in (None, (32, 24)):
            pictures, expected = (
                read(str(path), lambda length, w=wanted: [n for n in w if n < length], conversion=Conversion(cover))
                for read in (read_video_isolated, read_video)
            )
            assert pictures.flags.c_contiguous
            assert expected.flags.c_contiguous
            assert np.array_equal(pictures, expected)
    assert numbers_in(tensor(read_video_isolated(str(paths[0]), range, strict=True))) == list(range(40))


def test_one_child_serves_all_clips_and_errors_pass_through(tmp_path):
    good = write_video(tmp_path / "good.mp4", frames=9)
    (tmp_path / "text.mp4").write_text("no video")
    for _ in range(3):
        assert reads(good)
        pid = isolation._child.process.pid
        assert error_in(tmp_path / "text.mp4").kind == "not_video"
        assert error_in(tmp_path / "missing.mp4").kind == "missing"
        with pytest.raises(ClipError, match="it has 9 frames, fewer than the 10 of a clip") as caught:
            read_clip(str(good), ClipSettings(10, 8, 8, isolated=True), torch.Generator())
        assert caught.value.kind == "too_short"
        with pytest.raises(ClipError, match="use decoder: pyav") as caught:
            read_video_isolated(str(KINDS["mpeg4 avi"].write(tmp_path)), range, decoder="decord")
        assert caught.value.kind == "wrong_container"
        assert isolation._child.process.pid == pid


def test_a_header_that_announces_too_few_frames_does_not_end_the_search(tmp_path):
    path = announce(KINDS["mpeg4 avi"].write(tmp_path), 3)
    pictures = read_video_isolated(str(path), last_five_of(str(path)))
    assert numbers_in(tensor(pictures)) == list(range(FRAMES - 5, FRAMES))


def test_a_decoder_that_does_not_load_is_a_usage_error(tmp_path, monkeypatch):
    (tmp_path / "decord").mkdir()
    (tmp_path / "decord/__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"decoder decord does not load here \(not here\)"):
        read_video_isolated("a.mp4", range, decoder="decord")


def test_a_hang_costs_one_clip(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", frames=9)
    assert reads(path)
    pid = isolation._child.process.pid
    monkeypatch.setattr(isolation, "TIME_LIMIT_S", 0.5)
    with leased(path):
        error = error_in(path)
    assert error.kind == "timeout"
    assert "did not end within 0.5 s" in str(error)
    assert not is_running(pid)
    monkeypatch.setattr(isolation, "TIME_LIMIT_S", 60)
    assert reads(path)
    assert isolation._child.process.pid != pid


@pytest.mark.parametrize(("number", "name"), [(signal.SIGABRT, "Aborted"), (signal.SIGKILL, "Killed")])
def test_a_crash_costs_one_clip(tmp_path, number, name):
    path = write_video(tmp_path / "a.mp4", frames=9)
    read_video_isolated(str(path), lambda length: [0])
    child = isolation._child.process

    def crash() -> None:
        wait_for(waits_for_the_lease)
        os.kill(child.pid, number)

    with leased(path):
        killer = threading.Thread(target=crash)
        killer.start()
        error = error_in(path)
        killer.join()
    assert error.kind == "crashed"
    assert f"signal {int(number)}, {name}" in str(error)
    assert reads(path)


def test_a_child_lost_between_clips_costs_nothing(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=9)
    read_video_isolated(str(path), lambda length: [0])
    os.kill(isolation._child.process.pid, signal.SIGKILL)
    wait_for(lambda: not isolation._child.is_alive())
    assert reads(path)


def test_an_interrupted_clip_is_not_taken_for_the_next(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=9)

    def interrupt(length: int):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_video_isolated(str(path), interrupt)
    assert reads(path)


def write_data_set(root: Path) -> Path:
    root.mkdir()
    for number in range(6):
        write_video(root / f"{number}.mp4", frames=20, options={"g": "4"})
        (root / f"{number}.txt").write_text(f"clip {number}")
    return root


def test_loader_workers_survive_a_hang(tmp_path, monkeypatch):
    root = write_data_set(tmp_path / "data")
    stream = ClipStream([(index_dataset({"data_root": str(root)}), SETTINGS)], seed=3)
    before = list(itertools.islice(stream, 6))
    monkeypatch.setattr(isolation, "TIME_LIMIT_S", 3)
    with leased(root / "2.mp4"):
        # The children of this process must not be used, nor kept alive, by its forks.
        loader = iter(DataLoader(stream, batch_size=None, num_workers=2))
        samples = [next(loader) for _ in range(6)]
    skipped = [entry for sample in samples for entry in sample["skipped"]]
    assert {(Path(entry["path"]).name, entry["kind"]) for entry in skipped} == {("2.mp4", "timeout")}
    others = [(a, b) for a, b in zip(samples, before, strict=True) if b["caption"] != "clip 2"]
    assert len(others) == 5
    for sample, expected in others:
        assert sample["caption"] == expected["caption"]
        assert torch.equal(sample["video"], expected["video"])


def test_nothing_is_left_when_a_run_is_killed(tmp_path):
    root = write_data_set(tmp_path / "data")
    program = f"""
        import itertools, os, sys
        from pathlib import Path
        import torch
        from torch.utils.data import DataLoader
        from framebridge_plugin.data import ClipSettings, ClipStream, index_dataset
        settings = ClipSettings(5, 16, 16, isolated=True)
        stream = ClipStream([(index_dataset({{"data_root": {str(root)!r}}}), settings)], seed=3)
        def children(pid):
            found = [int(p) for p in Path(f"/proc/{{pid}}/task/{{pid}}/children").read_text().split()]
            return found + [p for child in found for p in children(child)]
        next(iter(stream))
        loader = iter(DataLoader(stream, batch_size=None, num_workers=2))
        [next(loader) for _ in range(4)]
        print(*children(os.getpid()), flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
        assert sum(bool(re.search("decoding.child", command)) for command in commands) == 3
        process.kill()
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def test_a_child_that_hangs_when_its_run_is_killed_ends_by_itself(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=9)
    program = f"""
        from framebridge_plugin.data.decoding import isolation
        isolation.TIME_LIMIT_S = 2
        isolation.read_video_isolated({str(path)!r}, lambda length: [0])
        print(isolation._child.process.pid, flush=True)
        input()
        isolation.read_video_isolated({str(path)!r}, lambda length: [0])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        with leased(path):
            process.stdin.write("go on\n")
            process.stdin.flush()
            wait_for(waits_for_the_lease)
            process.kill()
            wait_for(lambda: not is_running(pid))
