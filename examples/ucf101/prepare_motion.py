"""Write a small folder of videos in the shape of UCF-101: a folder per class, and the class says how the camera moves.

The pictures are the real frames of the quickstart's source videos, playing at their own speed. A virtual camera looks
at a part of each frame and pans or zooms at a constant speed, so what a class predicts is the motion of the whole
picture, while people, cars and the rabbit go on as they like:

    <output>/train/<class>/v_<class>_g01_c01.avi ...     clips of the first four fifths (in time) of two videos
    <output>/heldout/<class>/v_<class>_g06_c03.mp4 ...   their last fifth, and a scene that nothing is trained on
    <output>/sources.csv                                 of each clip: its source video, and which frames of it

A class is named after the camera: in `PanLeft` it turns left, so the picture moves to the right. As in UCF-101, a
group (`g01`) holds the clips of one shot, frames are 4:3, and the .avi files are MPEG-4 Part 2 as XviD writes it;
every third clip is an H.264 .mp4 file. The same source videos always give the same frames.

    python examples/ucf101/prepare_motion.py --output ucf101-data
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

from prepare_clips import HELDOUT, TRAIN, Shot, obtain_videos, read_frames

CLASSES = ("PanDown", "PanLeft", "PanRight", "PanUp", "ZoomIn", "ZoomOut")
WIDTH, HEIGHT = 64, 48
ENOUGH_HEIGHT = 288  # larger source frames are shrunk first, for speed
CLIP_LENGTH = 24  # frames; the shortest shot has 26
PAN_STEP = 2 / 3 / HEIGHT  # travel from frame to frame as a part of the visible height: 2 pixels in 3 frames
ZOOM_STEP = 1.4 ** (1 / 21)  # change of size from frame to frame: 1.4 times over a window of 22 frames
TRAIN_CLIPS, HELDOUT_CLIPS = 40, 3  # of each class and shot
# The first shot looks down on a passing bus: its own camera moves, whatever ours does.
TRAIN_SHOTS = TRAIN[1:]

Source = tuple[str, str, int, int]  # clip, source video, its first frame, the frame after its last one
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the source frame


def camera_path(class_name: str, width: int, height: int, draw: random.Random) -> list[Box]:
    """Draw where the virtual camera looks in each frame of a clip.

    Args:
        class_name: One of CLASSES.
        width: Width of the source frames in pixels.
        height: Height of the source frames in pixels.
        draw: Source of the camera's place and of how much it sees.

    Returns:
        CLIP_LENGTH boxes of shape 4:3, all inside the frame.
    """
    aspect = WIDTH / HEIGHT
    steps = np.arange(CLIP_LENGTH)
    if class_name.startswith("Zoom"):
        tallest = min(height, width / aspect) * draw.uniform(0.5, 0.75)
        heights = tallest * ZOOM_STEP ** -(steps if class_name == "ZoomIn" else steps[::-1])
        centre_x = draw.uniform(tallest * aspect / 2, width - tallest * aspect / 2) + 0 * steps
        centre_y = draw.uniform(tallest / 2, height - tallest / 2) + 0 * steps
    else:
        visible = height * draw.uniform(0.35, 0.55)
        heights = np.full(CLIP_LENGTH, visible)
        towards_x, towards_y = {"PanLeft": (-1, 0), "PanRight": (1, 0), "PanUp": (0, -1), "PanDown": (0, 1)}[
            class_name
        ]
        travel = (steps - steps.mean()) * PAN_STEP * visible
        margin_x = visible * aspect / 2 + abs(towards_x) * travel[-1]
        margin_y = visible / 2 + abs(towards_y) * travel[-1]
        centre_x = draw.uniform(margin_x, width - margin_x) + towards_x * travel
        centre_y = draw.uniform(margin_y, height - margin_y) + towards_y * travel
    return [
        (x - h * aspect / 2, y - h / 2, x + h * aspect / 2, y + h / 2)
        for x, y, h in zip(centre_x.tolist(), centre_y.tolist(), heights.tolist(), strict=True)
    ]


def look(frame: Image.Image, box: Box, mirrored: bool) -> Image.Image:
    """Cut a box out of a frame, mirrored first or not, and shrink it to the size of the clips."""
    if mirrored:
        frame = frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Rounding may put an edge that touches the frame's a hair outside, which Pillow refuses.
    left, top, right, bottom = box
    inside = (max(left, 0.0), max(top, 0.0), min(right, float(frame.width)), min(bottom, float(frame.height)))
    return frame.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=inside)


def write_clip(path: Path, frames: list[Image.Image], rate: Fraction) -> None:
    """Write a clip as XviD would (.avi) or as H.264 (.mp4), compressed so little that it is hardly visible."""
    avi = path.suffix == ".avi"
    if avi:
        codec, options = "mpeg4", {"qmin": "2", "qmax": "2"}
    else:
        # With x264's mbtree, pictures as small as these become other bits on every run.
        codec, options = "libx264", {"crf": "14", "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1  # x264's output depends on its number of threads
        if avi:
            stream.codec_context.codec_tag = "XVID"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_folder(folder: Path, shots: list[tuple[int, Shot]], videos: Path, clips_per_shot: int) -> list[Source]:
    """Write the class folders of one split.

    Args:
        folder: Where to write; what was there is removed.
        shots: Number of the group, and the shot that its clips are cut from.
        videos: Folder of the source videos.
        clips_per_shot: Clips of each class from each shot.

    Returns:
        Where each clip comes from.
    """
    sources: list[Source] = []
    if folder.is_dir():
        shutil.rmtree(folder)
    for class_name in CLASSES:
        (folder / class_name).mkdir(parents=True)
    for group, shot in shots:
        frames, rate = read_frames(videos / f"{shot.video}.mp4", shot.start, shot.stop)
        for frame in frames:
            frame.thumbnail((frame.width, ENOUGH_HEIGHT), Image.Resampling.LANCZOS)
        for class_name in CLASSES:
            for number in range(1, clips_per_shot + 1):
                name = f"v_{class_name}_g{group:02d}_c{number:02d}"
                draw = random.Random(name)
                first = draw.randint(0, len(frames) - CLIP_LENGTH)
                boxes = camera_path(class_name, frames[0].width, frames[0].height, draw)
                mirrored = draw.random() < 0.5
                views = [look(frame, box, mirrored) for frame, box in zip(frames[first:], boxes, strict=False)]
                path = folder / class_name / f"{name}{'.mp4' if number % 3 == 0 else '.avi'}"
                write_clip(path, views, rate)
                start = shot.start + first
                sources.append((f"{folder.name}/{class_name}/{path.name}", shot.video, start, start + CLIP_LENGTH))
    return sources


def prepare(output: Path, videos: Path, train_clips: int = TRAIN_CLIPS, heldout_clips: int = HELDOUT_CLIPS) -> None:
    """Write both splits and the table of sources, and say what is there.

    Args:
        output: Folder to write.
        videos: Folder of the source videos.
        train_clips: Training clips of each class from each shot.
        heldout_clips: Held-out clips of each class from each shot.
    """
    shots = list(enumerate(TRAIN_SHOTS + HELDOUT, start=1))
    train = write_folder(output / "train", shots[: len(TRAIN_SHOTS)], videos, train_clips)
    heldout = write_folder(output / "heldout", shots[len(TRAIN_SHOTS) :], videos, heldout_clips)
    with open(output / "sources.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("clip", "video", "start", "stop"))
        writer.writerows(train + heldout)
    print(f"{output}: {len(train)} training clips, {len(heldout)} held-out clips ({WIDTH}x{HEIGHT})")


def main() -> None:
    """Fetch the source videos, unless they are there already, and write the folder."""
    parser = argparse.ArgumentParser(description="Write a UCF-101-shaped folder of real frames with camera motion.")
    parser.add_argument("--output", type=Path, default=Path("ucf101-data"), help="folder to write")
    parser.add_argument("--source", type=Path, default=Path("quickstart-data/source"), help="folder of the videos")
    arguments = parser.parse_args()
    prepare(arguments.output, obtain_videos(arguments.source))


if __name__ == "__main__":
    main()
