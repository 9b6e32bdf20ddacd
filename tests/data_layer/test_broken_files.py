"""Each kind of broken file is named for what it is, and what only looks broken gives the right frames."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from framebridge_plugin.data import ClipError, read_clip
from tests.data_layer.broken_files import CLIP, KINDS, Kind, write_corpus
from tests.data_layer.numbered_videos import numbers_in

TIME_LIMIT = 60


def assert_is(kind: Kind, path: Path, strict: bool, isolated: bool = False) -> None:
    settings = CLIP.model_copy(update={"strict": strict, "isolated": isolated})
    fault = kind.fault or (kind.strict_fault if strict else None)
    if fault is None:
        assert tuple(numbers_in(read_clip(str(path), settings, torch.Generator()))) == kind.frames
        return
    with pytest.raises(ClipError, match=kind.reason) as caught:
        read_clip(str(path), settings, torch.Generator())
    assert caught.value.kind == fault
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "named pipe"])
def test_what_the_reader_says(tmp_path, name, strict):
    path = tmp_path / "clip.mp4"
    KINDS[name].make(path)
    assert_is(KINDS[name], path, strict)


def test_a_child_process_says_the_same(tmp_path):
    for name, path in write_corpus(tmp_path / "files").items():
        assert_is(KINDS[name], path, strict=True, isolated=True)


def test_an_open_that_would_hang_does_not(tmp_path):
    path = tmp_path / "clip.mp4"
    KINDS["named pipe"].make(path)
    process = multiprocessing.get_context("fork").Process(target=assert_is, args=(KINDS["named pipe"], path, False))
    process.start()
    process.join(TIME_LIMIT)
    hangs = process.is_alive()
    process.kill()
    assert not hangs
    assert process.exitcode == 0
