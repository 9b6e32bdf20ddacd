"""What of a data set is part of the fingerprint of latents that are computed from it."""

from __future__ import annotations

import datasets

from framebridge_plugin.backbones.fingerprint import component_fingerprint, first_difference
from framebridge_plugin.data import ClipIndex, ClipSettings
from framebridge_plugin.training.precomputation.fingerprint import data_fingerprint

CLIP_CHANGES = {
    "num_frames": {"num_frames": 17},
    "height": {"height": 32},
    "width": {"width": 32},
    "frame_stride": {"frame_stride": 2},
    "window": {"window": "start"},
    "horizontal_flip": {"horizontal_flip": True},
    "frame_sampling": {"frame_sampling": "linspace", "window_frames": 9},
    "window_frames": {"frame_sampling": "linspace", "window_frames": 9},
    "decoder": {"decoder": "decord"},
    "strict": {"strict": True},
    "resize": {"resize": "decoder"},
}


def test_every_clip_setting_is_part_of_the_fingerprint_but_not_the_reading_process():
    index = ClipIndex(datasets.Dataset.from_dict({"path": ["/a/b.mp4"], "caption": ["c"]}), "caption")
    settings = ClipSettings(9, 64, 64)
    there = data_fingerprint(index, settings)
    assert CLIP_CHANGES.keys() | {"isolated"} == set(type(settings).model_fields)
    for name, changes in CLIP_CHANGES.items():
        here = data_fingerprint(index, settings.model_copy(update=changes))
        assert there["clip"][name] != here["clip"][name]
    resized = data_fingerprint(index, settings.model_copy(update={"resize": "decoder"}))
    assert first_difference(there, resized) == "clip.resize is torch there and decoder here"
    assert first_difference(there, data_fingerprint(index, settings.model_copy(update={"isolated": True}))) is None


def test_files_and_captions_are_part_of_the_fingerprint(tmp_path):
    def fingerprint(names: list[str], captions: list[str]) -> dict:
        rows = {"path": [str(tmp_path / name) for name in names], "caption": captions}
        return data_fingerprint(ClipIndex(datasets.Dataset.from_dict(rows), "caption"), ClipSettings(9, 64, 64))

    there = fingerprint(["a.mp4", "b.mp4"], ["c", "d"])
    for name, here in {
        "rows": fingerprint(["a.mp4", "b.mp4", "c.mp4"], ["c", "d", "e"]),
        "files": fingerprint(["a.mp4", "c.mp4"], ["c", "d"]),
        "captions": fingerprint(["a.mp4", "b.mp4"], ["c", "e"]),
    }.items():
        assert first_difference(there, here).startswith(f"{name} is ")


def test_what_lies_between_the_blocks_of_weights_is_seen_on_request(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(8_000_000))
    before = component_fingerprint(tmp_path), component_fingerprint(tmp_path, whole=True)
    with path.open("r+b") as file:
        file.seek(6_000)
        file.write(b"\1")
    assert component_fingerprint(tmp_path) == before[0]
    assert component_fingerprint(tmp_path, whole=True) != before[1]
