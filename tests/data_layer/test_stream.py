"""The stream is a function of (seed, position): the same over workers, ranks and resumes."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from framebridge_plugin.data import ClipSettings, ClipStream, index_dataset
from framebridge_plugin.data.permutation import KeyedPermutation
from framebridge_plugin.errors import FrameBridgeError
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbers_in, write_video

SETTINGS = ClipSettings(num_frames=3, height=16, width=16, frame_stride=2, horizontal_flip=True)


def write_data_set(root: Path, clips: int, broken: int = 0) -> tuple:
    """Write a data set of links to one good file, the first `broken` of them to a text file."""
    root.mkdir()
    good = write_video(root.parent / f"{root.name}_good.mp4", frames=20, options={"g": "4"})
    bad = root.parent / f"{root.name}_bad.mp4"
    bad.write_text("no video")
    for number in range(clips):
        os.link(bad if number < broken else good, root / f"{number:03}.mp4")
        (root / f"{number:03}.txt").write_text(f"clip {number}")
    return index_dataset({"data_root": str(root)}), SETTINGS


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data") / "seven", 7)


def take(stream: ClipStream, count: int, workers: int = 0) -> list[dict]:
    return list(itertools.islice(DataLoader(stream, batch_size=None, num_workers=workers), count))


def assert_same(samples: list[dict], others: list[dict]) -> None:
    assert len(samples) == len(others) > 0
    for sample, other in zip(samples, others, strict=True):
        assert sample["caption"] == other["caption"]
        assert sample["sample_seed"] == other["sample_seed"]
        assert sample["skipped"] == other["skipped"]
        assert torch.equal(sample["video"], other["video"])


def test_samples_have_the_promised_form(data_set):
    (sample,) = take(ClipStream([data_set], seed=1), 1)
    assert set(sample) == {"caption", "video", "sample_seed", "skipped"}
    assert sample["skipped"] == []
    assert sample["video"].shape == (3, 3, 16, 16)
    assert sample["video"].dtype == torch.uint8
    assert isinstance(sample["sample_seed"], int)
    assert 0 <= sample["sample_seed"] < 2**63


def test_every_epoch_visits_each_clip_once_in_its_own_order(data_set):
    samples = take(ClipStream([data_set], seed=1), 21)
    epochs = [[sample["caption"] for sample in samples[start : start + 7]] for start in (0, 7, 14)]
    for epoch in epochs:
        assert sorted(epoch) == [f"clip {number}" for number in range(7)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({sample["sample_seed"] for sample in samples}) == 21
    other = take(ClipStream([data_set], seed=2), 7)
    assert [sample["caption"] for sample in other] != epochs[0]


def test_the_windows_of_a_release_are_the_windows_of_the_next(data_set):
    """Others would make a resumed run see other frames than the run that it goes on with."""
    stream = ClipStream([(data_set[0], ClipSettings(num_frames=2, height=HEIGHT, width=WIDTH))], seed=42)
    samples = list(itertools.islice(stream, 7))
    assert [numbers_in(sample["video"])[0] for sample in samples] == [12, 12, 1, 0, 8, 2, 15]
    assert samples[0]["sample_seed"] == 3102983107102520246


def test_windows_and_flips_change_between_epochs(data_set):
    samples = [sample for sample in take(ClipStream([data_set], seed=1), 56) if sample["caption"] == "clip 3"]
    assert len(samples) == 8
    assert len({sample["video"].numpy().tobytes() for sample in samples}) > 4


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(data_set, workers):
    assert_same(take(ClipStream([data_set], seed=1), 18), take(ClipStream([data_set], seed=1), 18, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_share_what_one_rank_sees(data_set, workers):
    alone = take(ClipStream([data_set], seed=1), 28)
    ranks = [take(ClipStream([data_set], seed=1, rank=r, world_size=2), 14, workers) for r in range(2)]
    assert_same(alone[0::2], ranks[0])
    assert_same(alone[1::2], ranks[1])
    # 7 clips do not divide by 2 ranks, and yet every epoch is whole.
    merged = [sample["caption"] for pair in zip(*ranks, strict=True) for sample in pair]
    for start in (0, 7, 14, 21):
        assert sorted(merged[start : start + 7]) == [f"clip {number}" for number in range(7)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_resumed_stream_continues_where_all_ranks_stopped(data_set, start, workers):
    whole = take(ClipStream([data_set], seed=1), 14)
    resumed = take(ClipStream([data_set], seed=1, rank=1, world_size=2, start=start), 3, workers)
    assert_same(whole[start + 1 : start + 6 : 2], resumed)


def test_several_data_sets_are_mixed_each_with_its_settings(data_set, tmp_path):
    other = (write_data_set(tmp_path / "other", 4)[0], ClipSettings(num_frames=2, height=8, width=24))
    stream = ClipStream([data_set, other], seed=1)
    assert stream.epoch_size == 11
    shapes = Counter(tuple(sample["video"].shape) for sample in take(stream, 11))
    assert shapes == {(3, 3, 16, 16): 7, (2, 3, 8, 24): 4}


def test_the_global_generators_are_neither_used_nor_moved(data_set):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    samples = list(itertools.islice(ClipStream([data_set], seed=1), 7))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert_same(samples, list(itertools.islice(ClipStream([data_set], seed=1), 7)))


def test_broken_clips_are_named_and_replaced_the_same_way_everywhere(tmp_path):
    data_set = write_data_set(tmp_path / "some_broken", 12, broken=2)
    alone = take(ClipStream([data_set], seed=5), 36)
    for start in (0, 12, 24):
        epoch = alone[start : start + 12]
        assert {sample["caption"] for sample in epoch} == {f"clip {number}" for number in range(2, 12)}
        skipped = [bad_file for sample in epoch for bad_file in sample["skipped"]]
        assert {bad_file["path"][-7:] for bad_file in skipped} == {"000.mp4", "001.mp4"}
        assert {bad_file["kind"] for bad_file in skipped} == {"not_video"}
    assert len({sample["sample_seed"] for sample in alone}) == 36
    # The next sound clip of the order takes the place.
    order = [f"clip {KeyedPermutation(12, 5, 0)[offset % 12]}" for offset in range(14)]
    for offset, sample in enumerate(alone[:12]):
        assert sample["caption"] == next(clip for clip in order[offset:] if clip not in ("clip 0", "clip 1"))
    assert_same(alone, take(ClipStream([data_set], seed=5), 36, workers=2))
    ranks = [take(ClipStream([data_set], seed=5, rank=r, world_size=3), 12) for r in range(3)]
    for rank in range(3):
        assert_same(alone[rank::3], ranks[rank])


def test_files_to_skip_are_not_opened(tmp_path):
    data_set = write_data_set(tmp_path / "some_broken", 12, broken=2)
    expected = take(ClipStream([data_set], seed=5), 12)
    known = {str(tmp_path / "some_broken" / f"00{number}.mp4") for number in (0, 1)}
    os.remove(tmp_path / "some_broken/000.mp4")
    samples = take(ClipStream([data_set], seed=5, files_to_skip=known), 12)
    assert [sample["skipped"] for sample in samples] == [[]] * 12
    assert_same(samples, [sample | {"skipped": []} for sample in expected])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_comes_without_a_clip_when_nothing_can_be_read(tmp_path, workers):
    data_set = write_data_set(tmp_path / "broken", 5, broken=5)
    paths = {str(tmp_path / "broken" / f"00{number}.mp4") for number in range(5)}
    for attempts in (1, 3, 16):
        for sample in take(ClipStream([data_set], seed=5, max_attempts=attempts), 6, workers):
            assert sample["video"].shape == (0, 3, 0, 0)
            assert len({bad_file["path"] for bad_file in sample["skipped"]}) == min(attempts, 5)
    for sample in take(ClipStream([data_set], seed=5, files_to_skip=paths), 6, workers):
        assert sample["video"].shape == (0, 3, 0, 0)
        assert sample["skipped"] == []


def test_no_clips_at_all_are_refused():
    with pytest.raises(FrameBridgeError, match="no clips"):
        ClipStream([], seed=1)
