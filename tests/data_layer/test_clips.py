"""A clip is the right frames, the right part of the picture, in the right range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from framebridge_plugin.data import ClipError, ClipSettings, read_clip
from framebridge_plugin.data.clips import frame_window
from framebridge_plugin.errors import UsageError
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbered_picture, numbers_in, write_video


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("length", "num_frames", "stride", "expected"),
    [
        (100, 17, 3, 3),
        (49, 17, 3, 3),
        (48, 17, 3, 2),  # one frame short of stride 3
        (33, 17, 3, 2),
        (32, 17, 3, 1),
        (17, 17, 3, 1),
        (16, 17, 3, None),
        (5, 1, 4, 1),
        (1, 1, 1, 1),
        (0, 1, 1, None),
    ],
)
def test_a_short_file_gets_the_longest_stride_that_fits(length, num_frames, stride, expected):
    settings = ClipSettings(num_frames, 8, 8, frame_stride=stride)
    for position in (0.0, 0.5, 1 - 1e-12):
        window = frame_window(length, settings, position)
        if expected is None:
            assert window is None
        else:
            assert window is not None
            assert list(window) == list(range(window[0], window[0] + num_frames * expected, expected))
            assert 0 <= window[0] <= window[-1] < length


def test_random_windows_reach_every_start_and_start_windows_only_the_first():
    positions = torch.rand(2000, generator=generator(), dtype=torch.float64).tolist()
    random, start = (ClipSettings(5, 8, 8, frame_stride=2, window=window) for window in ("random", "start"))
    assert {frame_window(20, random, position)[0] for position in positions} == set(range(12))
    assert {frame_window(20, start, position)[0] for position in positions} == {0}


def test_the_clip_depends_on_the_generator_alone(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", options={"g": "12"}))
    settings = ClipSettings(5, HEIGHT, WIDTH, frame_stride=3)
    torch.manual_seed(1)
    first = read_clip(path, settings, generator(7))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, read_clip(path, settings, generator(7)))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    starts = set()
    for seed in range(12):
        numbers = numbers_in(read_clip(path, settings, generator(seed)))
        assert np.diff(numbers).tolist() == [3] * 4
        starts.add(numbers[0])
    assert len(starts) > 4


def test_values_and_layout(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", options={"qp": "0"}))
    clip = read_clip(path, ClipSettings(3, HEIGHT, WIDTH, window="start"), generator())
    assert clip.shape == (3, 3, HEIGHT, WIDTH)
    assert clip.dtype == torch.float32
    assert clip.is_contiguous()
    assert numbers_in(clip) == [0, 1, 2]
    # Frame 2 has one white block, the second from the left; the bottom is grey 96.
    assert clip[2, :, 4:12, 20:28].min() > 0.99
    assert clip[2, :, 4:12, 4:12].max() < -0.99
    assert clip[2, :, 36:].mean().item() == pytest.approx(96 / 127.5 - 1, abs=0.02)
    assert clip.min() >= -1
    assert clip.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(24, 24), (96, 96), (32, 64), (48, 20)])
def test_the_picture_is_resized_to_cover_and_its_centre_kept(tmp_path, height, width):
    def ramps(number, rows, columns):
        picture = np.zeros((rows, columns, 3))
        picture[..., 0] = np.linspace(0, 255, columns)
        picture[..., 1] = np.linspace(0, 255, rows)[:, None]
        return picture.round().astype(np.uint8)

    path = str(write_video(tmp_path / "a.mp4", frames=2, options={"qp": "0"}, size=(96, 128), picture=ramps))
    clip = read_clip(path, ClipSettings(1, height, width), generator())
    assert clip.shape == (1, 3, height, width)
    scale = max(height / 96, width / 128)
    for channel, (size, full) in enumerate([(width, 128), (height, 96)]):
        line = clip[0, channel].mean(dim=channel)  # over the rows for the horizontal ramp, else over the columns
        assert line.mean().abs() < 0.03, "the crop is not centred"
        step = (line[-3] - line[2]) / (size - 5)
        assert step.item() == pytest.approx(2 / (full * scale), rel=0.05), "the picture is squeezed"


def test_fine_patterns_become_grey_and_not_stripes(tmp_path):
    def stripes(number, rows, columns):
        return (
            np.where(np.arange(columns)[None, :, None] % 4 < 2, 0, 255).repeat(rows, 0).repeat(3, 2).astype(np.uint8)
        )

    path = str(write_video(tmp_path / "a.mp4", frames=1, options={"qp": "0"}, size=(160, 160), picture=stripes))
    clip = read_clip(path, ClipSettings(1, 16, 16), generator())
    assert clip[..., 2:-2, 2:-2].abs().max() < 0.2


def test_flips_mirror_about_half_of_the_clips(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", frames=1, picture=lambda _, *size: numbered_picture(1, *size)))
    plain = read_clip(path, ClipSettings(1, HEIGHT, WIDTH), generator())
    flipped = 0
    for seed in range(40):
        clip = read_clip(path, ClipSettings(1, HEIGHT, WIDTH, horizontal_flip=True), generator(seed))
        is_flipped = not torch.equal(clip, plain)
        assert torch.equal(clip, plain.flip(3) if is_flipped else plain)
        flipped += is_flipped
    assert 8 < flipped < 32


def test_a_file_with_too_few_frames_is_refused(tmp_path):
    path = str(write_video(tmp_path / "short.mp4", frames=4))
    with pytest.raises(ClipError, match="it has 4 frames, fewer than the 5 of a clip"):
        read_clip(path, ClipSettings(5, 8, 8), generator())


@pytest.mark.parametrize("length", [16, 29, 47, 48, 49, 300])
def test_linspace_spreads_the_frames_over_a_window_as_numpy_does(length):
    settings = ClipSettings(16, 8, 8, frame_sampling="linspace", window_frames=48)
    starts = set()
    for position in torch.rand(3000, generator=generator(), dtype=torch.float64).tolist():
        window = frame_window(length, settings, position)
        assert window is not None
        span = min(48, length)
        assert list(window) == np.linspace(window[0], window[0] + span - 1, 16, dtype=int).tolist()
        starts.add(window[0])
    assert starts == set(range(max(length - 48, 0) + 1))
    assert frame_window(15, settings, 0.0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_sampling": "linspace"}, "window_frames goes with frame_sampling linspace"),
        ({"window_frames": 48}, "window_frames goes with frame_sampling linspace"),
        ({"frame_sampling": "linspace", "window_frames": 4}, "window_frames is 4; it must be at least num_frames, 5"),
        ({"frame_sampling": "linspace", "window_frames": 9, "frame_stride": 3}, "frame_stride is for"),
        ({"frame_sampling": "random"}, "frame_sampling is 'random'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        ClipSettings(5, 8, 8, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_frames", 0),
        ("height", -8),
        ("width", 8.0),
        ("frame_stride", True),
        ("window", "middle"),
        ("horizontal_flip", 1),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value!r}"):
        ClipSettings(**{"num_frames": 5, "height": 8, "width": 8, name: value})
