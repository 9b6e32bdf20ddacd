"""How finetrainers' own data path reads videos and pictures."""

from __future__ import annotations

import functools
import importlib
import io
import os
from typing import Any

import torch

from framebridge_plugin.files import local_copy
from framebridge_plugin.media import read_image
from framebridge_plugin.training.finetrainers.repairs import Repair


def _datasets_version() -> tuple[int, int]:
    import datasets

    major, minor = datasets.__version__.split(".")[:2]
    return int(major), int(minor)


def _datasets_has_left_decord() -> bool:
    return _datasets_version() >= (4, 0)


def _decode_with_decord() -> None:
    from datasets.features.video import Video

    def decode_example(self: Any, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> Any:
        import decord
        from datasets.utils.file_utils import is_local_path, xopen

        if not self.decode:
            raise RuntimeError("Decoding is disabled for this feature; use Video(decode=True).")
        if not isinstance(value, str | dict):
            return value
        path, content = (value, None) if isinstance(value, str) else (value["path"], value["bytes"])
        if content is None and is_local_path(path):
            return decord.VideoReader(path)
        if content is None:
            with xopen(path, "rb") as file:
                content = file.read()
        return decord.VideoReader(io.BytesIO(content))

    feature: Any = Video
    feature.decode_example = decode_example


def _expects_torchvision_reader() -> bool:
    return _datasets_version() >= (3, 4)


def _read_decord() -> None:
    dataset: Any = importlib.import_module("finetrainers.data.dataset")
    original = dataset._preprocess_video

    @functools.wraps(original)
    def preprocess_video(video: Any) -> torch.Tensor:
        import decord

        if not isinstance(video, decord.VideoReader):
            return original(video)
        # finetrainers sets decord's torch bridge when it is imported, but decord keeps it for one thread only.
        frames = video.get_batch(range(len(video)))
        frames = frames if isinstance(frames, torch.Tensor) else torch.from_numpy(frames.asnumpy())
        return frames.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0

    dataset._preprocess_video = preprocess_video


def _cuts_pictures_off() -> bool:
    from PIL import Image

    dataset: Any = importlib.import_module("finetrainers.data.dataset")
    return dataset.load_image(Image.new("I;16", (1, 1), 2**15)).getpixel((0, 0)) != (128, 128, 128)


def _read_pictures_whole() -> None:
    dataset: Any = importlib.import_module("finetrainers.data.dataset")
    original = dataset.load_image

    @functools.wraps(original)
    def load_image(source: Any) -> Any:
        if not isinstance(source, str | os.PathLike):
            return original(source, convert_method=read_image)
        with local_copy(os.fspath(source)) as path:
            return read_image(path)

    dataset.load_image = load_image


REPAIRS = (
    Repair(
        "video decoding",
        "lets datasets decode with decord, which finetrainers reads and datasets has left in version 4",
        _datasets_has_left_decord,
        _decode_with_decord,
    ),
    Repair(
        "video reading",
        "reads decord's videos, because from datasets 3.4 on finetrainers expects torchvision's",
        _expects_torchvision_reader,
        _read_decord,
    ),
    Repair(
        "pictures",
        "reads the pictures of a validation file by the range of their type and on white, which diffusers cuts off",
        _cuts_pictures_off,
        _read_pictures_whole,
    ),
)
