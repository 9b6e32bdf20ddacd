"""Reading processes that hang or die end a run with one line that says what to do."""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import signal
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from torch.utils.data import Dataset

from framebridge_plugin.data import ClipSettings, ClipStream, index_dataset
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.training.finetrainers.arguments import TrainerSettings
from framebridge_plugin.training.loading import explained_reading_errors, median_clip_rate, sample_loader
from tests.data_layer.numbered_videos import write_video
from tests.data_layer.test_isolation import leased, write_data_set


def arguments(timeout: int = 0, workers: int = 1) -> SimpleNamespace:
    settings = TrainerSettings(dataloader_prefetch_factor=1, dataloader_timeout=timeout)
    return SimpleNamespace(dataloader_num_workers=workers, pin_memory=False, framebridge_trainer=settings)


class Numbers(Dataset):
    """Gives the positions that it is asked for, except where a worker comes to grief."""

    def __init__(self, **grief: int) -> None:
        self.grief = grief

    def __getitem__(self, position: int) -> int:
        if position == self.grief.get("killed"):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if position == self.grief.get("broken"):
            raise RuntimeError("DataLoader timed out, says the data set")
        return position


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_come_in_their_order(workers):
    assert list(sample_loader(Numbers(), arguments(workers=workers), [3, 1, 2])) == [3, 1, 2]


def test_a_file_that_hangs_ends_the_run_with_a_remedy(tmp_path):
    root = write_data_set(tmp_path / "data")
    stream = ClipStream([(index_dataset({"data_root": str(root)}), ClipSettings(5, 16, 16))], seed=3)
    with leased(root / "2.mp4"):
        samples = sample_loader(stream, arguments(timeout=1))
        started = time.monotonic()
        with (
            pytest.raises(FrameBridgeError, match="timed out after 1 seconds") as caught,
            explained_reading_errors(),
        ):
            list(itertools.islice(samples, 7))
        assert time.monotonic() - started < 40  # the file would be had after 45
    message = str(caught.value)
    assert "\n" not in message
    for remedy in ("framebridge.data.isolated=true", "framebridge.dataloader_timeout", "`finetrainers data check`"):
        assert remedy in message


def assert_explains_a_death(error: FrameBridgeError) -> None:
    message = str(error)
    assert message.startswith("a reading process died (DataLoader worker (pid")
    # torch's two ways to notice: the signal of the death, or a look at its workers while it waits.
    assert "killed by signal: Killed" in message or "exited unexpectedly" in message
    assert message.count("a reading process died") == 1
    assert "\n" not in message
    for remedy in ("framebridge.data.isolated=true", "dataloader.dataloader_num_workers", "`finetrainers data check`"):
        assert remedy in message


@pytest.mark.parametrize("timeout", [0, 30])
def test_a_death_while_the_run_waits_has_a_remedy(timeout):
    samples = iter(sample_loader(Numbers(killed=0), arguments(timeout), range(3)))
    with pytest.raises(FrameBridgeError) as caught, explained_reading_errors():
        next(samples)
    assert_explains_a_death(caught.value)


def test_a_death_while_the_run_trains_has_a_remedy():
    samples = iter(sample_loader(Numbers(killed=2), arguments(), range(9)))
    assert next(samples) == 0
    assert next(samples) == 1
    with pytest.raises(FrameBridgeError) as caught, explained_reading_errors():
        time.sleep(30)
    assert_explains_a_death(caught.value)


def test_a_death_that_torch_finds_by_an_empty_queue_has_a_remedy():
    with pytest.raises(FrameBridgeError) as caught, explained_reading_errors():
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from queue.Empty()
    assert_explains_a_death(caught.value)


def test_errors_of_the_data_set_are_passed_on_as_they_are():
    samples = iter(sample_loader(Numbers(broken=1), arguments(), range(3)))
    assert next(samples) == 0
    with (
        pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker") as caught,
        explained_reading_errors(),
    ):
        next(samples)
    assert not isinstance(caught.value, FrameBridgeError)


@pytest.mark.parametrize(("workers", "isolated"), [(0, False), (1, True)])
def test_the_rate_of_the_clips_is_the_median_of_what_is_seen(tmp_path, workers, isolated):
    root = tmp_path / "clips"
    root.mkdir()
    # At 25 frames per second: 5 frames 4 apart, 3 apart in a file too short for 4, none in files too short or broken.
    for name, frames in (("a", 17), ("b", 30), ("c", 13), ("d", 4)):
        write_video(root / f"{name}.mp4", frames=frames)
    (root / "e.mp4").write_text("no video")
    # At 2 to 100 frames per second, 20.66 in the mean.
    write_video(root / "f.mp4", frames=20, pts=[0, 1, *range(51, 57), *range(60, 84, 2)])
    for path in list(root.iterdir()):
        path.with_suffix(".txt").write_text("caption")
    index = index_dataset({"data_root": str(root)})
    settings = ClipSettings(5, 16, 16, frame_stride=4)

    def rate(settings: ClipSettings, seed: int, files_to_skip: Sequence[str] = ()) -> float | None:
        settings = settings.model_copy(update={"isolated": isolated})
        stream = ClipStream([(index, settings)], seed=seed, files_to_skip=files_to_skip)
        return median_clip_rate(stream, arguments(workers=workers))

    assert rate(settings, 1) == rate(settings, 2) == 6.25
    assert rate(settings, 1, [str(root / name) for name in ("a.mp4", "b.mp4", "f.mp4")]) == round(25 / 3, 3)
    assert rate(ClipSettings(1, 16, 16), 1) is None


def test_a_run_ends_in_one_line_when_a_clip_hangs(train, clips_folder, tmp_path):
    clips = shutil.copytree(clips_folder, tmp_path / "clips")
    with leased(next(clips.glob("*.mp4"))):
        result = train(
            f"framebridge.data.data_root={clips}",
            *("dataloader.dataloader_num_workers=1", "framebridge.dataloader_timeout=1"),
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: no clip came from the reading processes")
