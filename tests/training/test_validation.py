"""How the rows of a validation file are shared by the processes and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import torch
from PIL import Image

from framebridge_plugin import register
from framebridge_plugin.training.validation import ValidationVideo, sample_validation_videos

register()

from finetrainers.data import VideoArtifact  # noqa: E402

ROWS = [
    {"prompt": "one", "image": Image.new("RGB", (16, 16), (200, 30, 30))},
    {"prompt": "two", "image": Image.new("RGB", (16, 16)), "export_fps": 5.0},
    {"prompt": "three", "image": Image.new("RGB", (16, 16)), "export_fps": None},
]


def validate(folder: Path, rank: int, world_size: int) -> tuple[list[ValidationVideo], list[tuple[str, int]]]:
    """What one process writes, and the prompts that it samples with the seeds of their generators."""
    calls = []

    def validation(*, pipeline: Any, generator: torch.Generator, prompt: str, image: Image.Image) -> list[Any]:
        calls.append((prompt, generator.initial_seed()))
        return [VideoArtifact(value=[image] * 3)]

    place = {"rank": rank, "world_size": world_size}
    written = sample_validation_videos(ROWS, None, validation, folder, fps=8.0, label="final", seed=7, **place)
    return written, calls


def test_videos_have_the_rate_of_their_row_or_of_the_clips(tmp_path):
    written, _ = validate(tmp_path, 0, 1)
    assert [(item.number, item.caption) for item in written] == [(0, "one"), (1, "two"), (2, "three")]
    rates = []
    for item in written:
        with av.open(str(item.video)) as container:
            rates.append(float(container.streams.video[0].average_rate))
        assert item.sheet.is_file()
    assert rates == [8.0, 5.0, 8.0]


def test_all_processes_make_as_many_calls_and_write_each_video_once(tmp_path):
    _, alone = validate(tmp_path, 0, 1)
    assert len({seed for _, seed in alone}) == len(ROWS)
    shares = [validate(tmp_path, rank, 2) for rank in range(2)]
    assert [[item.number for item in written] for written, _ in shares] == [[0, 2], [1]]
    assert [calls for _, calls in shares] == [[alone[0], alone[2]], [alone[1], alone[0]]]
