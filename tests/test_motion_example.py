"""The example's folder in the shape of UCF-101: what is in it, what is held out, and whether classes move as named."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from framebridge_plugin.data import index_dataset, read_frames

ROOT = Path(__file__).parents[1]
REAL_VIDEOS = ROOT / "quickstart-data" / "source" / "videos"
CLASSES = ["PanDown", "PanLeft", "PanRight", "PanUp", "ZoomIn", "ZoomOut"]
LENGTHS = {"bikes": 250, "bigbuckbunny": 132, "carphone_pristine": 120}
CLIPS_PER_SHOT = 3


def _load_example():
    path = ROOT / "examples" / "ucf101" / "prepare_motion.py"
    spec = importlib.util.spec_from_file_location("prepare_motion", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_textures(folder: Path) -> Path:
    """Stand-ins for the source videos, as long as those: one still texture each."""
    folder.mkdir()
    for seed, (name, length) in enumerate(LENGTHS.items()):
        noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (144, 240, 3), np.uint8))
        smooth = np.asarray(noise.filter(ImageFilter.GaussianBlur(3)), dtype=float)
        picture = (128 + 40 * (smooth - smooth.mean()) / smooth.std()).clip(0, 255).astype(np.uint8)
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "14", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 240, 144, "yuv420p"
            for _ in range(length):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return folder


@pytest.fixture(scope="module", params=["textures", "real"])
def prepared(request, tmp_path_factory) -> tuple[str, Path]:
    """The kind of source, and the folder made from it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "real" and not all((REAL_VIDEOS / f"{name}.mp4").is_file() for name in LENGTHS):
        pytest.skip("the real source videos are not here: `make quickstart` fetches them")
    videos = REAL_VIDEOS if request.param == "real" else _write_textures(folder / "videos")
    _load_example().prepare(folder / "data", videos, CLIPS_PER_SHOT, CLIPS_PER_SHOT)
    return request.param, folder / "data"


def test_the_splits_are_class_folders_of_avi_and_mp4(prepared):
    _, folder = prepared
    for split, shots in (("train", 5), ("heldout", 3)):
        rows = list(index_dataset({"class_root": str(folder / split)}))
        assert sorted({label for _, label in rows}) == CLASSES
        assert len(rows) == shots * len(CLASSES) * CLIPS_PER_SHOT
        for path, label in rows:
            assert Path(path).parent.name == label
            assert Path(path).name.startswith(f"v_{label}_g")
        for ending, codec in ((".avi", "mpeg4"), (".mp4", "h264")):
            of_kind = [path for path, _ in rows if path.endswith(ending)]
            assert len(of_kind) * 3 == len(rows) * (2 if ending == ".avi" else 1)
            with av.open(of_kind[0]) as container:
                stream = container.streams.video[0]
                assert (stream.codec_context.name, stream.width, stream.height) == (codec, 64, 48)
                assert stream.codec_context.codec_tag == ("XVID" if ending == ".avi" else "avc1")
            assert len(read_frames(of_kind[0], range)) == 24


def test_no_source_frame_is_on_both_sides(prepared):
    _, folder = prepared
    frames: dict[str, set[tuple[str, int]]] = {"train": set(), "heldout": set()}
    with open(folder / "sources.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        split = row["clip"].split("/")[0]
        frames[split] |= {(row["video"], number) for number in range(int(row["start"]), int(row["stop"]))}
    files = {str(path.relative_to(folder)) for path in folder.glob("*/*/*")}
    assert {row["clip"] for row in rows} == files
    assert not frames["train"] & frames["heldout"]
    # A whole scene is held out, and every other held-out frame comes after all training frames of its video.
    last = {video: max(number for name, number in frames["train"] if name == video) for video, _ in frames["train"]}
    assert set(last) == {"bikes", "bigbuckbunny"}
    assert {video for video, _ in frames["heldout"]} == set(LENGTHS)
    assert all(number > last.get(video, -1) for video, number in frames["heldout"])


def _shift(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far the picture has moved (rows, columns), by phase correlation."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    spectra = [np.fft.fft2((picture - picture.mean()) * window) for picture in (first, second)]
    cross = spectra[1] * spectra[0].conj()
    correlation = np.fft.ifft2(cross / (np.abs(cross) + 1e-3 * np.abs(cross).max())).real
    peak = np.unravel_index(correlation.argmax(), correlation.shape)
    return np.array([(p + n // 2) % n - n // 2 for p, n in zip(peak, correlation.shape, strict=True)])


def _motion(path: Path) -> tuple[np.ndarray, float]:
    """Median motion of the picture over three frames, and how far a zoom tears its edges apart over six."""
    pictures = read_frames(str(path), range).float().mean(1).numpy()

    def shift(columns: slice, step: int) -> np.ndarray:
        pairs = zip(pictures[:-step:step, :, columns], pictures[step::step, :, columns], strict=False)
        return np.median([_shift(first, second) for first, second in pairs], axis=0)

    return shift(slice(None), 3), shift(slice(-24, None), 6)[1] - shift(slice(24), 6)[1]


def test_the_pictures_move_as_the_class_says(prepared):
    kind, folder = prepared
    # A camera that turns to the left moves the picture to the right.
    expected = {"PanLeft": (0, 2), "PanRight": (0, -2), "PanUp": (2, 0), "PanDown": (-2, 0)}
    for name in CLASSES:
        paths = sorted(folder.glob(f"*/{name}/*"))
        motions = [_motion(path) for path in paths]
        if name in expected:
            right = [np.abs(whole - expected[name]).max() <= 1 for whole, _ in motions]
        else:
            sign = 1 if name == "ZoomIn" else -1
            right = [sign * spread > 0 and np.abs(whole).max() <= 2 for whole, spread in motions]
        # In the real shots cars and people go their own way, and now and then fill the picture.
        assert np.mean(right) >= (1.0 if kind == "textures" else 0.75), (name, motions)


def test_the_same_videos_give_the_same_folder(prepared, tmp_path):
    kind, folder = prepared
    videos = REAL_VIDEOS if kind == "real" else folder.parent / "videos"
    _load_example().prepare(tmp_path, videos, CLIPS_PER_SHOT, CLIPS_PER_SHOT)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files
    changed = [str(file) for file in files if (tmp_path / file).read_bytes() != (folder / file).read_bytes()]
    assert not changed
