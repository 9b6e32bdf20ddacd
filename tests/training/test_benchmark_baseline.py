"""What the benchmark of data loading compares with is what finetrainers computes."""

from __future__ import annotations

from pathlib import Path

import torch

from framebridge_plugin import register
from framebridge_plugin.data import ClipSettings

register()

import decord  # noqa: E402
from finetrainers.data import dataset  # noqa: E402
from finetrainers.functional import resize_to_nearest_bucket_video  # noqa: E402


def test_the_whole_video_way_is_what_finetrainers_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from clip_rates import read_whole_video
    from made_videos import VideoForm, write_video

    path = tmp_path / "a.mp4"
    write_video(path, VideoForm(96, 64, 20, key_every=12, bit_rate=100_000))
    whole = dataset._preprocess_video(decord.VideoReader(str(path)))
    expected, _ = resize_to_nearest_bucket_video(whole, [[5, 32, 32]], "resize_crop")
    assert torch.equal(read_whole_video(path, ClipSettings(num_frames=5, height=32, width=32)), expected)
