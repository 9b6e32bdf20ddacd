"""finetrainers' dataset file: what its entries become, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framebridge_plugin.data import (
    BadFilePolicy,
    ClipSettings,
    index_dataset,
    load_bad_file_policy,
    load_dataset_config,
)
from framebridge_plugin.errors import UsageError

ENTRY = {"data_root": "data", "dataset_type": "video", "video_resolution_buckets": [[17, 256, 128]]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the file, in a folder with a data set of one clip."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.mp4").touch()
    (tmp_path / "data/a.txt").write_text("The video shows a cat")

    def write(*entries: object, **others: object) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"datasets": entries, **others}))
        return path

    return write


def test_entries_become_rows_and_settings(write, tmp_path):
    ours = {"frame_stride": 3, "window": "start", "horizontal_flip": True}
    ours |= {"decoder": "pyav", "strict": True, "resize": "decoder", "isolated": True}
    captions = {"reshape_mode": "resize_crop", "remove_common_llm_caption_prefixes": True, "id_token": None}
    config = write({**ENTRY, **captions}, {**ENTRY, **ours, "csv": None, "split": None, "refresh_index": None})
    (plain, plain_settings), (rows, settings) = load_dataset_config(config)
    assert list(plain) == [(str(tmp_path / "data/a.mp4"), "a cat")]
    assert list(rows) == [(str(tmp_path / "data/a.mp4"), "The video shows a cat")]
    assert list(index_dataset({"data_root": Path("data")}, tmp_path)) == list(rows)
    assert plain_settings == ClipSettings(17, 256, 128)
    assert settings == ClipSettings(17, 256, 128, **ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_strid": 3}, "'frame_strid'; did you mean 'frame_stride'?"),
        ({"zzz": 3}, "'zzz'; there are"),
        ({"num_frames": 9}, "it must be one size"),
        ({"dataset_type": "image"}, "dataset_type is 'image'"),
        ({"video_resolution_buckets": [[5, 16, 16], [9, 16, 16]]}, "it must be one size"),
        ({"video_resolution_buckets": None}, "it must be one size"),
        ({"video_resolution_buckets": [[5, 16, 0]]}, r"datasets\[0\]: width is 0"),
        ({"window": "middle"}, "window is 'middle'; it should be 'random' or 'start'"),
        ({"window_frames": 48}, "window_frames: has no effect"),
        ({"reshape_mode": "bicubic"}, "reshape_mode is 'bicubic'"),
        ({"id_token": 3}, "id_token is 3"),
        ({"remove_common_llm_caption_prefixes": "yes"}, "remove_common_llm_caption_prefixes is 'yes'"),
        ({"csv": "a.csv"}, "not csv and data_root"),
        ({"data_root": None}, "not none of them"),
        ({"split": "test"}, "split: has an effect with class_root only"),
        ({"refresh_index": True}, "refresh_index: has an effect with csv only"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(write, change, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset_config(write({**ENTRY, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"datasets": []}', '{"datasets": [3]}', '{"data": 1}', None])
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_dataset_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_policy_for_bad_files_stands_beside_the_entries(write):
    assert load_bad_file_policy(write()) == BadFilePolicy("skip", None, 0.5, 16)
    given = {"policy": "raise", "max_share": 1, "max_in_a_row": 3}
    assert load_bad_file_policy(write(bad_files=given)) == BadFilePolicy("raise", None, 1, 3)
    assert load_bad_file_policy(write(bad_files=None)) == BadFilePolicy()
    for wrong in ({"max_shares": 1}, [1]):
        with pytest.raises(UsageError, match="config.json: "):
            load_bad_file_policy(write(bad_files=wrong))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"policy": "ignore"}, "policy"),
        ({"policy": "quarantine"}, "quarantine_file"),
        ({"quarantine_file": "x"}, "quarantine_file"),
        ({"max_share": 1.5}, "max_share"),
        ({"max_share": True}, "max_share"),
        ({"max_in_a_row": 0}, "max_in_a_row"),
    ],
)
def test_a_wrong_policy_is_refused(values, name):
    with pytest.raises(UsageError, match=f"^bad_files: {name}"):
        BadFilePolicy(**values)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("window_frames", {"frame_sampling": "linspace"}),
        ("window_frames", {"window_frames": 48}),
        ("window_frames", {"frame_sampling": "linspace", "window_frames": 4}),
        ("frame_stride", {"frame_sampling": "linspace", "window_frames": 9, "frame_stride": 3}),
        ("strict", {"decoder": "decord", "strict": True}),
        ("resize", {"decoder": "decord", "resize": "decoder"}),
        ("num_frames", {"num_frames": 0}),
        ("width", {"width": 8.0}),
        ("frame_stride", {"frame_stride": True}),
        ("horizontal_flip", {"horizontal_flip": 1}),
        ("decoder", {"decoder": "torchcodec"}),
        ("frame_strid", {"frame_strid": 3}),
    ],
)
def test_wrong_clip_settings_are_refused(name, settings):
    with pytest.raises(UsageError, match=f"^clip settings: .*{name}"):
        ClipSettings(**{"num_frames": 5, "height": 8, "width": 8, **settings})
    with pytest.raises(UsageError, match="width is missing"):
        ClipSettings(5, 8)
