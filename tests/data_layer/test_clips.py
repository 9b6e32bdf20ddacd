"""A clip is the right frames, the right part of the picture, in the right range."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch

from framebridge_plugin.data import ClipError, ClipSettings, read_clip, read_frames, showing
from framebridge_plugin.data.clips import frame_window
from framebridge_plugin.resizing import resize_and_crop
from tests.data_layer.numbered_videos import HEIGHT, WIDTH, numbered_picture, numbers_in, write_video
from tests.data_layer.video_kinds import DATA, ffmpeg, write_turned


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


@pytest.mark.parametrize("resize", ["torch", "decoder"])
@pytest.mark.parametrize(("height", "width"), [(24, 24), (96, 96), (32, 64), (48, 20)])
def test_the_picture_is_resized_to_cover_and_its_centre_kept(tmp_path, height, width, resize):
    def ramps(number, rows, columns):
        picture = np.zeros((rows, columns, 3))
        picture[..., 0] = np.linspace(0, 255, columns)
        picture[..., 1] = np.linspace(0, 255, rows)[:, None]
        return picture.round().astype(np.uint8)

    path = str(write_video(tmp_path / "a.mp4", frames=2, options={"qp": "0"}, size=(96, 128), picture=ramps))
    clip = read_clip(path, ClipSettings(1, height, width, resize=resize), generator())
    assert clip.shape == (1, 3, height, width)
    assert clip.is_contiguous()
    scale = max(height / 96, width / 128)
    for channel, (size, full) in enumerate([(width, 128), (height, 96)]):
        line = clip[0, channel].mean(dim=channel)  # over the rows for the horizontal ramp, else over the columns
        assert line.mean().abs() < 0.03, "the crop is not centred"
        step = (line[-3] - line[2]) / (size - 5)
        assert step.item() == pytest.approx(2 / (full * scale), rel=0.05), "the picture is squeezed"


SHAPES = {
    # Arguments of ffmpeg, and width over height of the disc in `sar_16_9.mp4`; as stored it is 9/16.
    "by the container": ([], 1.0),
    "otherwise by the codec": (["-bsf:v", "h264_metadata=sample_aspect_ratio=4/3"], 1.0),
    "by the codec alone": (["-f", "h264"], 1.0),
    "square by the container": (["-aspect", "4:3"], 9 / 16),
    "twice as wide by the container": (["-aspect", "8:3"], 9 / 8),
    "higher than wide": (["-aspect", "2:3"], 9 / 32),
}


def disc_shape(picture_CHW: torch.Tensor) -> float:
    """Width over height of the bright disc."""
    disc = picture_CHW.float().mean(0)
    disc = disc > (disc.max() + disc.min()) / 2
    return float(disc.any(0).sum() / disc.any(1).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_are_cut_as_they_are_shown(tmp_path, shape):
    arguments, expected = SHAPES[shape]
    path = tmp_path / ("a.h264" if "h264" in arguments else "a.mp4")
    ffmpeg("-i", DATA / "sar_16_9.mp4", "-c", "copy", *arguments, path)
    frames = read_frames(str(path), lambda length: [11])
    assert disc_shape(frames[0]) == pytest.approx(expected, rel=0.03)
    assert frames.shape[2] >= 120, "the picture was made smaller"
    assert frames.shape[3] >= 160
    for settings in ({}, {"resize": "decoder"}, {"isolated": True}, {"decoder": "decord"}):
        if settings.get("decoder") == "decord" and path.suffix == ".h264":
            continue
        clip = read_clip(str(path), ClipSettings(12, 64, 64, **settings), generator())
        assert clip.shape == (12, 3, 64, 64)
        assert disc_shape(clip[11]) == pytest.approx(expected, rel=0.08), settings


@pytest.mark.parametrize("rotation", ["90", "180"])
def test_pixels_are_stretched_before_the_picture_is_turned(tmp_path, rotation):
    path = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", rotation, "-i", DATA / "sar_16_9.mp4", "-c", "copy", path)
    assert read_frames(str(path), lambda length: [0]).shape[2:] == ((284, 120) if rotation == "90" else (120, 284))
    for settings in ({}, {"resize": "decoder"}, {"decoder": "decord"}):
        clip = read_clip(str(path), ClipSettings(12, 64, 64, **settings), generator())
        assert disc_shape(clip[11]) == pytest.approx(1.0, rel=0.08), settings


@pytest.mark.parametrize("aspect", ["1:255", "60000:1"])
def test_a_senseless_pixel_aspect_is_refused(tmp_path, aspect):
    path = tmp_path / "a.mp4"
    ffmpeg("-i", DATA / "sar_16_9.mp4", "-c", "copy", "-aspect", aspect, path)
    for settings in ({}, {"resize": "decoder"}, {"decoder": "decord"}):
        with pytest.raises(ClipError, match="sample aspect ratio is .*, which no picture has") as caught:
            read_clip(str(path), ClipSettings(3, 64, 64, **settings), generator())
        assert caught.value.kind == "pixel_aspect"


def blobs(number: int, rows: int, columns: int) -> np.ndarray:
    """Smooth shapes in colours, as films have them."""
    noise = torch.rand(1, 3, rows // 8, columns // 8, generator=generator(number))
    picture = torch.nn.functional.interpolate(noise, size=(rows, columns), mode="bicubic")[0].clamp(0, 1)
    return (picture.permute(1, 2, 0) * 160 + 40).byte().numpy()


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """In dB, of values in [-1, 1]."""
    return float(10 * torch.log10(4 / (first - second).square().mean()))


def grey_blobs(number: int, rows: int, columns: int) -> np.ndarray:
    return blobs(number, rows, columns)[..., :1].repeat(3, 2)


# Colours are stored at half the resolution, and the two ways differ in how they spread them.
@pytest.mark.parametrize(("picture", "bound"), [(grey_blobs, 45), (blobs, 30)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (120, 120), (150, 90)])
def test_the_decoder_resizes_nearly_as_torch_does(tmp_path, height, width, turned, picture, bound):
    path = tmp_path / "a.mp4"
    write_turned(path, (0, 1, -1, 0) if turned else (1, 0, 0, 1), size=(96, 160), picture=picture)
    settings = ClipSettings(3, height, width)
    expected = read_clip(str(path), settings, generator())
    clip = read_clip(str(path), settings.model_copy(update={"resize": "decoder"}), generator())
    assert clip.shape == expected.shape == (3, 3, height, width)
    assert not torch.equal(clip, expected)
    assert psnr(clip, expected) > bound
    if picture is grey_blobs:  # One pixel off would be less near.
        assert psnr(clip[..., 1:], expected[..., :-1]) < bound
        assert psnr(clip[..., 1:, :], expected[..., :-1, :]) < bound


@pytest.mark.parametrize(("height", "width"), [(32, 32), (45, 80), (100, 130)])
def test_frames_of_eight_bits_are_resized_to_within_one_step(height, width):
    frames = torch.from_numpy(np.stack([blobs(number, 72, 96) for number in range(3)])).permute(0, 3, 1, 2)
    resized = resize_and_crop(frames, height, width)
    assert resized.dtype == torch.float32
    assert (resized - resize_and_crop(frames / 255.0, height, width)).abs().max() < 1.01 / 255


def test_fine_patterns_become_grey_and_not_stripes(tmp_path):
    def stripes(number, rows, columns):
        return (
            np.where(np.arange(columns)[None, :, None] % 4 < 2, 0, 255).repeat(rows, 0).repeat(3, 2).astype(np.uint8)
        )

    path = str(write_video(tmp_path / "a.mp4", frames=1, options={"qp": "0"}, size=(160, 160), picture=stripes))
    for resize in ("torch", "decoder"):
        clip = read_clip(path, ClipSettings(1, 16, 16, resize=resize), generator())
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
    with pytest.raises(ClipError, match="it has 4 frames, fewer than the 5 of a clip") as caught:
        read_clip(path, ClipSettings(5, 8, 8), generator())
    assert caught.value.kind == "too_short"


def test_isolation_and_other_decoders_change_nothing_but_who_decodes(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", options={"g": "12"}))
    settings = ClipSettings(5, 24, 32, frame_stride=3, horizontal_flip=True)
    expected = read_clip(path, settings, generator(7))
    assert torch.equal(read_clip(path, settings.model_copy(update={"isolated": True}), generator(7)), expected)
    assert torch.equal(read_clip(path, settings.model_copy(update={"strict": True}), generator(7)), expected)
    # Decoders round colours a little differently.
    assert psnr(read_clip(path, settings.model_copy(update={"decoder": "decord"}), generator(7)), expected) > 35


def test_the_fingerprint_names_what_changes_pixels():
    settings = ClipSettings(5, 24, 32)
    fingerprint = settings.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    others = [
        *({"num_frames": 6}, {"height": 16}, {"width": 16}, {"frame_stride": 2}, {"window": "start"}),
        *({"horizontal_flip": True}, {"frame_sampling": "linspace", "window_frames": 9}, {"decoder": "decord"}),
        *({"strict": True}, {"resize": "decoder"}),
    ]
    assert {name for other in others for name in other} == set(ClipSettings.model_fields) - {"isolated"}
    for other in others:
        changed = settings.model_copy(update=other).fingerprint()
        assert {name for name in changed if changed[name] != fingerprint[name]} == set(other)
    assert settings.model_copy(update={"isolated": True}).fingerprint() == fingerprint


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


def test_large_pictures_are_never_held_together(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "a.mp4", frames=12, size=(720, 1280)))
    settings, all_pictures = ClipSettings(12, 48, 64), 12 * 720 * 1280 * 3
    tracemalloc.start()
    clip = read_clip(path, settings, generator())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < all_pictures / 3
    frames = read_frames(path, range)
    expected = resize_and_crop(frames, 48, 64).mul_(2).sub_(1)
    assert torch.equal(clip, expected)
    # Where they have to be, there is a limit on all of them together.
    monkeypatch.setattr(showing, "MAX_BYTES", all_pictures - 1)
    assert torch.equal(read_clip(path, settings, generator()), clip)
    for read in (
        lambda: read_frames(path, range),
        lambda: read_clip(path, ClipSettings(12, 48, 64, decoder="decord"), generator()),
    ):
        with pytest.raises(ClipError, match="its 12 pictures of 1280x720 take .* resize: decoder") as caught:
            read()
        assert caught.value.kind == "too_large"
    with pytest.raises(ClipError, match="its 12 pictures of 1280x720 take .*; take fewer frames, or a smaller"):
        read_clip(path, ClipSettings(12, 720, 1280), generator())
