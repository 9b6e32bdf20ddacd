from __future__ import annotations

import json
import os
import struct
import zlib

import av
import numpy as np
import pytest
import torch
from PIL import Image

from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.media import contact_sheet, loss_curve, picture_levels, read_image, to_uint8, write_video


def ramp(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth video whose brightness tells the frame: bytes [T, H, W, 3]."""
    levels = np.linspace(40, 200, frames)[:, None, None, None]
    across = np.linspace(-20, 20, width)[None, None, :, None]
    return np.broadcast_to(levels + across, (frames, height, width, 3)).round().astype(np.uint8)


def read_back(path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), container.streams.video[0]


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80), (33, 47), (256, 256)])
def test_a_written_video_reads_back(tmp_path, height, width):
    video = ramp(9, height, width)
    path = tmp_path / "new folder" / "video.mp4"
    write_video(video, path, fps=8)
    frames, stream = read_back(path)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert stream.average_rate == 8
    assert frames.shape == (9, height + height % 2, width + width % 2, 3)
    difference = np.abs(frames[:, :height, :width].astype(int) - video)
    assert difference.mean() < 3
    assert difference.max() < 25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_floats_become_bytes(dtype):
    video = torch.tensor([0.0, 0.5, 1.0], dtype=dtype).reshape(3, 1, 1, 1).expand(3, 3, 2, 4)
    frames = to_uint8(video)
    assert frames.shape == (3, 2, 4, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 128, 255]


def test_channels_stay_in_place():
    video = torch.zeros(2, 3, 4, 6)
    video[:, 1, 0, 5] = 1.0
    frames = to_uint8(video)
    assert frames[0, 0, 5].tolist() == [0, 255, 0]
    assert frames.sum() == 2 * 255


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 3, 4, 4), np.int64),
    ],
)
def test_what_is_no_video(video, tmp_path):
    with pytest.raises(FrameBridgeError, match=r"a video is uint8 \[T, H, W, 3\] or float"):
        write_video(video, tmp_path / "x.mp4")


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 255.0)])
def test_a_video_outside_of_its_range(tmp_path, low, high):
    video = torch.tensor([low, high]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    with pytest.raises(FrameBridgeError, match=rf"video: floats should be in \[0, 1\], these go from {low:g} to"):
        contact_sheet([video], tmp_path / "x.png")


def test_a_video_that_is_not_finite(tmp_path):
    with pytest.raises(FrameBridgeError, match="not finite"):
        write_video(torch.full((1, 3, 4, 4), torch.nan), tmp_path / "x.mp4")


def test_contact_sheet(tmp_path):
    first, second = ramp(9, 16, 24), ramp(3, 32, 16)
    contact_sheet([first, second], tmp_path / "sheet.png", columns=5)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (16 + 2 + 32, 5 * 26 - 2, 3)
    for column, frame in enumerate((0, 2, 4, 6, 8)):  # evenly from the first to the last
        assert np.array_equal(sheet[:16, column * 26 : column * 26 + 24], first[frame])
    for column in range(3):
        assert np.array_equal(sheet[18:, column * 18 : column * 18 + 16], second[column])
    contact_sheet([first, second], tmp_path / "labelled.png", columns=5, labels=["first", "second"])
    labelled = np.asarray(Image.open(tmp_path / "labelled.png"))
    assert labelled.shape[0] == sheet.shape[0] + 2 * 14
    assert np.array_equal(labelled[14:30, :24], first[0])
    assert labelled[:14].min() < 128  # the text
    image = Image.new("RGB", (20, 10), (255, 0, 0))  # at the frames' height it is 32 wide
    contact_sheet([first, second], tmp_path / "inputs.png", columns=5, images=[image, Image.new("L", (8, 8))])
    with_inputs = np.asarray(Image.open(tmp_path / "inputs.png"))
    assert (with_inputs[:16, :32] == (255, 0, 0)).all()
    assert np.array_equal(with_inputs[:, 40:], sheet)
    with pytest.raises(FrameBridgeError, match="at least one video"):
        contact_sheet([], tmp_path / "none.png")


def test_loss_curve(tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "plots" / "loss.png"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 101)]
    lines += [json.dumps({"step": 50, "validation": 1}), '{"step": 101, "lo']
    metrics.write_text("\n".join(lines))
    loss_curve(metrics, picture)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=1_000_000)) > 10  # axes, curve, mean
    with pytest.raises(FrameBridgeError, match="no line has both 'step' and 'accuracy'"):
        loss_curve(metrics, picture, key="accuracy")
    with pytest.raises(FrameBridgeError, match="no such file"):
        loss_curve(tmp_path / "nowhere.jsonl", picture)


def test_read_image(tmp_path):
    picture = Image.new("RGBA", (6, 4), (255, 0, 0, 255))
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 6)
    with pytest.raises(UsageError, match=r"nowhere\.png: no such file"):
        read_image(tmp_path / "nowhere.png")


FORMATS = ("png", "jpg", "webp", "bmp", "gif", "tif")


def test_a_picture_is_opened_by_its_format(tmp_path):
    picture = Image.new("RGB", (6, 4), (0, 0, 255))
    for name in FORMATS:
        picture.save(tmp_path / f"a.{name}", lossless=True)
        assert read_image((tmp_path / f"a.{name}").rename(tmp_path / "any.eps")).getpixel((0, 0))[2] > 250
    picture.save(tmp_path / "mpo.jpg", format="MPO", save_all=True, append_images=[picture])  # as phones have them
    assert read_image(tmp_path / "mpo.jpg").size == (6, 4)
    for name in ("eps", "ppm", "ico", "tga", "jp2"):
        picture.save(tmp_path / f"a.{name}")
        with pytest.raises(UsageError, match="is no picture; give a PNG, JPEG, WebP, BMP, GIF or TIFF file"):
            read_image((tmp_path / f"a.{name}").rename(tmp_path / "any.png"))


def test_what_a_small_file_says_of_its_size(tmp_path, recwarn):
    for size in ((20_000, 5_000), (60_000, 60_000)):
        header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + b"\x35\xaf\x06\x1e")
        with pytest.raises(UsageError, match=r"bomb\.png: is too large .*, more than 67108864 pixels; make") as caught:
            read_image(tmp_path / "bomb.png")
        assert "\n" not in str(caught.value)
    assert not recwarn.list


def test_what_never_ends_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "link.png"):
        with pytest.raises(UsageError, match=rf"{name}: cannot be read \(it is no regular file\)"):
            read_image(tmp_path / name)


GREY = np.array([[0, 13107, 32896, 65535]], np.uint16)  # 0, .2, .502, 1
LEVELS = [0, 51, 128, 255]
RED_AND_HIDDEN = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 0, 0, 51]]], np.uint8)


def grey_levels(path) -> list[int]:
    pixels = np.asarray(read_image(path))
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


@pytest.mark.parametrize("name, order", [("x.png", "<u2"), ("x.tif", "<u2"), ("x.tif", ">u2")])
def test_deep_grey_pictures_are_scaled(tmp_path, name, order):
    Image.fromarray(GREY.astype(order)).save(tmp_path / name)
    assert grey_levels(tmp_path / name) == LEVELS
    assert picture_levels(tmp_path / name)[0, :, 0] == pytest.approx(GREY[0] / 65535, abs=1e-6)


def test_deep_pictures_of_other_formats_are_scaled(tmp_path):
    Image.fromarray((GREY / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    assert grey_levels(tmp_path / "float.tif") == LEVELS
    Image.fromarray(GREY).save(tmp_path / "white_is_zero.tif", tiffinfo={262: 0})
    assert grey_levels(tmp_path / "white_is_zero.tif") == [255, 204, 127, 0]


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.array([[0, 255]], np.float32), r"floats should be in \[0, 1\], these go from 0 to 255"),
        (np.array([[-1, 1]], np.float32), r"floats should be in \[0, 1\], these go from -1 to 1"),
        (np.array([[0, np.nan]], np.float32), "not finite"),
        (np.array([[0, 65535]], np.int32), "values of type int32 have no known range"),
    ],
)
def test_a_picture_of_no_known_range_is_refused(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(UsageError, match=rf"x\.tif: .*{message}") as caught:
        read_image(tmp_path / "x.tif")
    assert "\n" not in str(caught.value)
    with pytest.raises(FrameBridgeError, match=f"image: .*{message}"):
        read_image(Image.open(tmp_path / "x.tif"))


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.tif", "x.gif"])
def test_transparent_pictures_are_put_on_white(tmp_path, name):
    Image.fromarray(RED_AND_HIDDEN).save(tmp_path / name, lossless=True)
    pixels = np.asarray(read_image(tmp_path / name))[0].tolist()
    assert pixels[:2] == [[255, 0, 0], [255, 255, 255]]
    assert pixels[2] == ([255, 0, 0] if name == "x.gif" else [255, 204, 204])  # a GIF hides wholly or not


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB", "P", "PA", "LA", "RGBa"])
def test_every_mode_may_have_a_hidden_colour(tmp_path, mode):
    if mode in ("PA", "LA", "RGBa"):
        picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0)).convert(mode)
    else:
        colour = (0, 0, 0) if mode == "RGB" else 0
        Image.new(mode, (2, 1), colour).save(tmp_path / "x.png", transparency=colour)
        picture = Image.open(tmp_path / "x.png")
        assert picture.mode == mode
    assert np.asarray(read_image(picture)).min() == 255


def test_of_an_animated_file_the_first_picture_counts(tmp_path):
    first, second = Image.new("RGB", (4, 4), "blue"), Image.new("RGB", (4, 4), "red")
    for name in ("a.gif", "a.png", "a.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert read_image(tmp_path / name).getpixel((0, 0)) == (0, 0, 255)
