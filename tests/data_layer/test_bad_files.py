"""What a run does about bad files: it goes on without them, says so, and knows when to stop."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import re
import threading
import time
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from framebridge_plugin.data import BadFilePolicy, BadFileTracker, ClipSettings, ClipStream
from framebridge_plugin.data.bad_files import TooManyBadFilesError, read_bad_files
from framebridge_plugin.data.folders import ClipIndex
from framebridge_plugin.errors import FrameBridgeError
from tests.data_layer.broken_files import CLIP, KINDS, write_corpus

LENIENT = {"max_share": 1.0, "max_in_a_row": len(KINDS)}
BROKEN = {name for name, kind in KINDS.items() if kind.fault}


def index_of(paths: dict[str, Path]) -> ClipIndex:
    rows = {"path": [str(path) for path in paths.values()], "caption": list(paths)}
    return ClipIndex(datasets.Dataset.from_dict(rows), "caption")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> ClipIndex:
    return index_of(write_corpus(tmp_path_factory.mktemp("corpus") / "files"))


def watched(
    index: ClipIndex, tracker: BadFileTracker, count: int, workers: int = 0, clip: ClipSettings = CLIP, **stream
) -> list[dict]:
    """The first samples of a run."""
    clips = ClipStream(
        [(index, clip)],
        seed=3,
        max_attempts=tracker.policy.max_attempts,
        files_to_skip=tracker.files_to_skip,
        **stream,
    )
    loader = DataLoader(clips, batch_size=None, num_workers=workers)
    try:
        return list(itertools.islice(tracker.watch(loader), count))
    except FrameBridgeError as error:
        # Frees the loader here; if the garbage collector found it later, it would wait seconds for the workers.
        error.__traceback__ = None
        raise


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(samples: list[dict], others: list[dict]) -> None:
    assert [sample["caption"] for sample in samples] == [other["caption"] for other in others]
    for sample, other in zip(samples, others, strict=True):
        assert sample["sample_seed"] == other["sample_seed"]
        assert torch.equal(sample["video"], other["video"])


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_an_epoch_of_the_whole_corpus(corpus, tmp_path, policy, caplog):
    runs = []
    for workers in (0, 2):
        run = tmp_path / str(workers)
        options = {"quarantine_file": str(run / "quarantine.jsonl")} if policy == "quarantine" else {}
        tracker = BadFileTracker(BadFilePolicy(policy, **options, **LENIENT), run)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            runs.append(watched(corpus, tracker, len(corpus), workers))
        assert {sample["caption"] for sample in runs[-1]} == KINDS.keys() - BROKEN
        assert set(runs[-1][0]) == {"caption", "video", "sample_seed"}
        assert tracker.count() == len(BROKEN)
        found = {entry["path"]: entry["kind"] for entry in lines(run / "bad_files.jsonl")}
        expected = {path: KINDS[name].fault for path, name in corpus if name in BROKEN}
        assert found == expected
        assert len(lines(run / "bad_files.jsonl")) == len(expected)
        logged = [record.getMessage() for record in caplog.records]
        assert len(logged) == len(expected)
        for path, kind in expected.items():
            assert sum(f"{path}: {kind}: " in message for message in logged) == 1
        if policy == "quarantine":
            assert {entry["path"] for entry in lines(run / "quarantine.jsonl")} == set(expected)
    assert_same(*runs)


def test_raise_stops_at_the_first(corpus, tmp_path):
    messages = []
    for workers in (0, 2):
        tracker = BadFileTracker(BadFilePolicy("raise"), tmp_path)
        with pytest.raises(TooManyBadFilesError) as caught:
            watched(corpus, tracker, len(corpus), workers)
        (entry,) = lines(tmp_path / "bad_files.jsonl")
        messages.append(str(caught.value))
        assert f"{entry['path']}: {entry['kind']}: {entry['reason']}" in messages[-1]
        assert str(tmp_path / "bad_files.jsonl") in messages[-1]
        assert entry["kind"] == {path: KINDS[name].fault for path, name in corpus}[entry["path"]]
    assert messages[0] == messages[1]


def test_a_later_run_does_not_open_what_is_in_quarantine(tmp_path):
    paths = write_corpus(tmp_path / "files", ("whole", "empty", "text", "rotated", "odd size", "one frame"))
    index = index_of(paths)
    policy = BadFilePolicy("quarantine", str(tmp_path / "lists/quarantine.jsonl"), **LENIENT)
    first = watched(index, BadFileTracker(policy, tmp_path / "first"), 12)
    quarantine = (tmp_path / "lists/quarantine.jsonl").read_text()
    assert len(quarantine.splitlines()) == 3
    # It would be read now, if it was opened.
    paths["empty"].write_bytes(paths["whole"].read_bytes())
    tracker = BadFileTracker(policy, tmp_path / "second")
    assert tracker.files_to_skip == {str(paths[name]) for name in ("empty", "text", "one frame")}
    assert_same(watched(index, tracker, 12), first)
    assert tracker.count() == 0
    assert (tmp_path / "lists/quarantine.jsonl").read_text() == quarantine
    assert len(lines(tmp_path / "second/quarantined.jsonl")) == 3


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path):
    # The second file is bad only where the clip reaches its end: left unopened from then on, it would be missed.
    sometimes_bad = "flipped bytes at the end"
    paths = write_corpus(tmp_path / "files", ("whole", sometimes_bad, "text", "rotated", "empty"))
    index = index_of(paths)
    clip = CLIP.model_copy(update={"window": "random", "strict": True})
    quarantine, run = tmp_path / "quarantine.jsonl", tmp_path / "run"
    policy = BadFilePolicy("quarantine", str(quarantine), **LENIENT)
    quarantine.write_text(json.dumps({"path": str(paths["text"])}) + "\n")
    whole = watched(index, BadFileTracker(policy, run), 40, clip=clip)
    found = lines(run / "bad_files.jsonl")
    assert {entry["path"] for entry in found} == {str(paths[sometimes_bad]), str(paths["empty"])}
    last = found[1]["sample"]
    assert any(sample["caption"] == sometimes_bad for sample in whole[last + 1 :])
    for start in (last - 1, last, last + 1, 30):
        tracker = BadFileTracker(policy, run, start=start, resumed=True)
        assert tracker.files_to_skip == {str(paths["text"])}
        assert tracker.count() == sum(entry["sample"] < start for entry in found)
        assert_same(watched(index, tracker, 40 - start, clip=clip, start=start), whole[start:])
        assert tracker.count() == 2
        assert lines(run / "bad_files.jsonl") == found
        assert len(lines(quarantine)) == 3
    # The next run is a new one.
    assert len(BadFileTracker(policy, run).files_to_skip) == 3
    assert lines(run / "bad_files.jsonl") == []


def test_a_sound_file_is_not_left_out(tmp_path):
    # `finetrainers data check` lists it for a decoder that reads such files wrongly.
    quarantine = tmp_path / "list.jsonl"
    entries = [{"path": f"/{kind}.mp4", "kind": kind, "reason": ""} for kind in ("wrong_container", "too_short")]
    quarantine.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    tracker = BadFileTracker(BadFilePolicy("quarantine", str(quarantine)), tmp_path)
    assert tracker.files_to_skip == {"/too_short.mp4"}


REPEATED = ("whole", "empty", "text", "rotated")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_too_large_a_share_stops_the_run_with_a_report(tmp_path, share, workers):
    index = index_of(write_corpus(tmp_path / "files", REPEATED))
    tracker = BadFileTracker(BadFilePolicy(max_share=share), tmp_path / "run")
    if share == 0.9:
        assert len(watched(index, tracker, 100, workers)) == 100
        return
    with pytest.raises(TooManyBadFilesError) as caught:
        watched(index, tracker, 100, workers)
    problem, *report, whole_list, remedy = str(caught.value).splitlines()
    bad = attempts = 0
    samples = iter(ClipStream([(index, CLIP)], seed=3))
    while attempts < 64:
        failed = len(next(samples)["skipped"])
        bad, attempts = bad + failed, attempts + failed + 1
    assert 0.2 < bad / attempts < 0.9
    assert problem == f"{bad} of {attempts} attempts to read a clip failed"
    found = lines(tmp_path / "run/bad_files.jsonl")
    assert report == [f"  {entry['path']}: {entry['kind']}: {entry['reason']}" for entry in found]
    assert {entry["kind"] for entry in found} == {"empty", "not_video"}
    assert whole_list == f"all of them, 2 so far: {tmp_path / 'run/bad_files.jsonl'}"
    assert "finetrainers data check" in remedy
    assert "framebridge.bad_files.max_share, which is 0.2" in remedy


def test_a_share_as_large_as_the_limit_is_allowed(tmp_path):
    bad = {"path": "/a.mp4", "kind": "empty", "reason": "it is"}
    samples = [{"skipped": [bad] * (number % 2), "caption": ""} for number in range(100)]
    assert len(list(BadFileTracker(BadFilePolicy(max_share=1 / 3), tmp_path).watch(samples))) == 100
    with pytest.raises(TooManyBadFilesError):
        list(BadFileTracker(BadFilePolicy(max_share=0.32), tmp_path).watch(samples))


def test_the_share_means_nothing_at_first(tmp_path):
    index = index_of(write_corpus(tmp_path / "files", REPEATED))
    tracker = BadFileTracker(BadFilePolicy(max_share=0.0), tmp_path / "run")
    assert len(watched(index, tracker, 20)) == 20
    assert tracker.count() == 2
    with pytest.raises(TooManyBadFilesError, match="attempts to read a clip failed"):
        watched(index, tracker, 64)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_in_a_row_stop_the_run_with_a_report(tmp_path, workers):
    paths = write_corpus(tmp_path / "files", ("whole", "empty"))
    many = {f"bad {number}": paths["empty"].with_name(f"{number}.mp4") for number in range(40)}
    for path in many.values():
        path.touch()
    index = index_of({**paths, **many})
    with pytest.raises(TooManyBadFilesError) as caught:
        watched(index, BadFileTracker(BadFilePolicy(max_in_a_row=7), tmp_path / "run"), 100, workers)
    problem, *report, whole_list, remedy = str(caught.value).splitlines()
    assert problem == "7 clips in a row cannot be read"
    assert len(report) == 5
    assert all(line.endswith(": empty: the file is empty") for line in report)
    assert "all of them" in whole_list
    assert "raise framebridge.bad_files.max_in_a_row" in remedy


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_at_once(tmp_path, workers):
    paths = write_corpus(tmp_path / "files", ("empty", "text", "folder"))
    index = index_of(paths)
    with pytest.raises(TooManyBadFilesError, match="^no clip of the data can be read"):
        watched(index, BadFileTracker(BadFilePolicy(), tmp_path / "run"), 10, workers)
    assert len(lines(tmp_path / "run/bad_files.jsonl")) == 3
    policy = BadFilePolicy("quarantine", str(tmp_path / "run/quarantine.jsonl"))
    (tmp_path / "run/bad_files.jsonl").rename(tmp_path / "run/quarantine.jsonl")
    with pytest.raises(TooManyBadFilesError, match="^every clip is in quarantine") as caught:
        watched(index, BadFileTracker(policy, tmp_path / "again"), 10, workers)
    assert len(str(caught.value).splitlines()) == 2


def test_a_rank_reads_the_list_when_the_first_has_written_it(tmp_path):
    quarantine = tmp_path / "quarantine.jsonl"
    quarantine.write_text(json.dumps({"path": "/a.mp4", "kind": "empty", "reason": "it is"}) + "\n")
    policy, run = BadFilePolicy("quarantine", str(quarantine)), tmp_path / "run"

    def wait_for_the_first() -> None:
        BadFileTracker(policy, run, rank=0, world_size=2)

    assert BadFileTracker(policy, run, rank=1, world_size=2, barrier=wait_for_the_first).files_to_skip == {"/a.mp4"}


def test_a_line_is_written_under_a_lock(tmp_path):
    tracker = BadFileTracker(BadFilePolicy(), tmp_path)
    sample = {"skipped": [{"path": "/a.mp4", "kind": "empty", "reason": "it is"}], "video": torch.zeros(1)}
    writer = threading.Thread(target=lambda: list(tracker.watch([sample])))
    with tracker.path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waits = re.compile(rf"-> FLOCK .* \S+:{os.fstat(file.fileno()).st_ino} ")
        writer.start()
        while writer.is_alive() and not waits.search(Path("/proc/locks").read_text()):
            time.sleep(0.01)
        assert writer.is_alive()
        assert tracker.path.read_text() == ""
    writer.join()
    assert len(lines(tracker.path)) == 1


def _train_as(rank: int, folder: Path, index: ClipIndex, counts) -> None:
    torch.set_num_threads(1)  # the threads of the process it was forked from do not exist in it
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    policy = BadFilePolicy("quarantine", str(folder / "quarantine.jsonl"), **LENIENT)
    tracker = BadFileTracker(policy, folder, rank=rank, world_size=2, barrier=torch.distributed.barrier)
    for _ in range(2):
        watched(index, tracker, 4, rank=rank, world_size=2)
        counts.put((rank, tracker.count()))
    torch.distributed.destroy_process_group()


def test_two_ranks_keep_one_account(corpus, tmp_path):
    context = multiprocessing.get_context("fork")
    counts = context.SimpleQueue()
    ranks = [context.Process(target=_train_as, args=(rank, tmp_path, corpus, counts)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    found = [counts.get() for _ in range(4)]
    assert len({count for _, count in found}) == 1
    entries = lines(tmp_path / "bad_files.jsonl")
    assert len({entry["path"] for entry in entries}) == found[0][1] > 4
    assert {entry["sample"] % 2 for entry in entries} == {0, 1}
    assert {entry["path"] for entry in lines(tmp_path / "quarantine.jsonl")} == {entry["path"] for entry in entries}


def test_a_list_with_lines_that_say_nothing_is_read(tmp_path, caplog):
    path = tmp_path / "list.jsonl"
    path.write_text('{"path": "/a.mp4"}\n\nnot JSON\n{"reason": "no path"}\n[1]\n{"path": "/b.mp4", "kind": "emp')
    with caplog.at_level(logging.WARNING):
        assert [entry["path"] for entry in read_bad_files(path)] == ["/a.mp4"]
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == [
        f"{path}:{line}" for line in (3, 4, 5, 6)
    ]
    assert read_bad_files(tmp_path / "none.jsonl") == []


def test_an_account_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for policy, output in (
        (BadFilePolicy(), tmp_path / "file/run"),
        (BadFilePolicy("quarantine", str(tmp_path / "file/quarantine.jsonl")), tmp_path / "run"),
    ):
        with pytest.raises(FrameBridgeError, match=f"^cannot write {tmp_path / 'file'}[^\n]*$"):
            BadFileTracker(policy, output)
