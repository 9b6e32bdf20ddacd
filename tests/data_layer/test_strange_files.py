"""Data sets that a stranger made: what they name lies in their folder, comes to an end, and is of a sensible size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from framebridge_plugin.data import ClipError, ClipSettings, index_dataset, load_ucf101, load_webvid, read_clip, tables
from framebridge_plugin.data.bad_files import read_bad_files
from framebridge_plugin.data.tables import csv_files, parse_json, read_text
from framebridge_plugin.data.validation_rows import read_validation_rows
from framebridge_plugin.errors import FrameBridgeError
from tests.data_layer.numbered_videos import write_video

CLIP = ClipSettings(3, 16, 16)
LAYOUTS = {
    "csv": ("metadata.csv", "file_name,caption\n{name},a cat\n"),
    "jsonl": ("metadata.jsonl", '{{"file_name": "{name}", "caption": "a cat"}}\n'),
    "json": ("metadata.json", '[{{"file_name": "{name}", "caption": "a cat"}}]'),
    "list": ("videos.txt", "{name}\n"),
}


def write_layout(root: Path, layout: str, name: str = "a.mp4") -> Path:
    root.mkdir(exist_ok=True)
    file, text = LAYOUTS[layout]
    (root / file).write_text(text.format(name=name))
    if layout == "list":
        (root / "prompts.txt").write_text("a cat\n")
    return root / file


def elsewhere(path: Path) -> None:
    """Put a link in the place of a file, which is moved out of the data set."""
    folder = next(parent for parent in path.parents if parent.name.startswith("test_"))
    path.symlink_to(path.rename(folder / f"secret-{path.name}"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_lies_in_its_folder_and_names_what_lies_in_it(tmp_path, layout):
    root = tmp_path / "data"
    table = write_layout(root, layout)
    (root / "a.mp4").touch()
    (tmp_path / "named").symlink_to(root)
    for folder in (root, tmp_path / "named"):
        assert [caption for _, caption in index_dataset({"data_root": str(folder)})] == ["a cat"]
    (root / "moved").mkdir()
    table.symlink_to(table.rename(root / "moved" / table.name))
    assert len(index_dataset({"data_root": str(root)})) == 1
    table.unlink()
    (root / "moved" / table.name).rename(table)
    elsewhere(table)
    with pytest.raises(FrameBridgeError, match=f"{table.name} leads to .*secret.*, outside of the folder"):
        index_dataset({"data_root": str(root)})
    table.unlink()
    (tmp_path / "secret.mp4").touch()
    for name in ("../secret.mp4", f"{tmp_path}/secret.mp4", "x/../../secret.mp4"):
        write_layout(root, layout, name)
        with pytest.raises(FrameBridgeError, match=rf"1 names lead out of it, first '{name}'; put the videos"):
            index_dataset({"data_root": str(root)})
    (root / "sub").symlink_to(tmp_path)
    write_layout(root, layout, "sub/secret.mp4")
    with pytest.raises(FrameBridgeError, match=f"{root}/sub is a link to a folder, which is not followed"):
        index_dataset({"data_root": str(root)})
    write_layout(root, layout, f"{root}/a.mp4")
    assert index_dataset({"data_root": str(root)})[0][0] == f"{root}/a.mp4"


def test_captions_beside_their_videos(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.mp4").touch()
    (root / "a.txt").write_text("a secret")
    elsewhere(root / "a.mp4")
    index = index_dataset({"data_root": str(root)})
    assert index.description == "1 videos are links to files elsewhere, such as 'a.mp4'"
    elsewhere(root / "a.txt")
    with pytest.raises(FrameBridgeError, match=r"a\.txt leads to .*outside"):
        index_dataset({"data_root": str(root)})
    (root / "a.txt").unlink()
    os.mkfifo(root / "a.txt")
    with pytest.raises(FrameBridgeError, match=r"a\.txt cannot be read: it is no regular file"):
        index_dataset({"data_root": str(root)})
    (root / "a.txt").unlink()
    (root / "a.txt").write_text("x" * (tables.MAX_LINE + 1))
    with pytest.raises(FrameBridgeError, match=r"a\.txt has more than 1048576 characters"):
        index_dataset({"data_root": str(root)})


def test_a_video_may_be_a_link_to_a_file(tmp_path):
    write_video(tmp_path / "video.mp4", frames=5)
    os.mkfifo(tmp_path / "pipe")
    targets = {"video": tmp_path / "video.mp4", "pipe": tmp_path / "pipe", "zero": "/dev/zero", "folder": tmp_path}
    for name, target in targets.items():
        (tmp_path / f"{name}-link.mp4").symlink_to(target)
    generator = torch.Generator().manual_seed(0)
    assert read_clip(str(tmp_path / "video-link.mp4"), CLIP, generator).shape == (3, 3, 16, 16)
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(ClipError) as caught:
            read_clip(str(tmp_path / f"{name}-link.mp4"), CLIP, generator)
        assert caught.value.kind == "not_regular"


def test_a_playlist_is_no_video(tmp_path):
    write_video(tmp_path / "video.mp4", frames=5)
    texts = {
        "concat": "ffconcat version 1.0\nfile video.mp4\n",
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nvideo.mp4\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.mp4").write_text(text)
        with pytest.raises(ClipError, match="not a video file") as caught:
            read_clip(str(tmp_path / f"{name}.mp4"), CLIP, torch.Generator())
        assert caught.value.kind == "not_video"


def test_links_in_folders_of_classes(tmp_path, caplog):
    root = tmp_path / "classes"
    for name in ("left/a.mp4", "right/b.mp4"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    elsewhere(root / "left/a.mp4")
    (root / "more").symlink_to(tmp_path)
    rows = load_ucf101(root)
    assert [Path(path).name for path in rows["path"]] == ["a.mp4", "b.mp4"]
    assert rows.info.description.split("\n") == [
        "1 videos are links to files elsewhere, such as 'left/a.mp4'",
        "left out: 1 links to folders (such as more)",
    ]
    (tmp_path / "only").mkdir()
    (tmp_path / "only/left").symlink_to(root / "left")
    with pytest.raises(FrameBridgeError, match="holds no folders, but links to some, which are not followed"):
        load_ucf101(tmp_path / "only")
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").symlink_to("../list.txt")
    (tmp_path / "list.txt").write_text("left/a.mp4 1\n")
    with pytest.raises(FrameBridgeError, match=r"trainlist01\.txt leads to .*outside"):
        load_ucf101(root, "train")


def test_links_and_names_of_a_webvid(tmp_path):
    table, root = tmp_path / "t.csv", tmp_path / "videos"
    for name in ("1.mp4", "page/2.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (tmp_path / "3.mp4").touch()
    elsewhere(root / "page/2.mp4")
    (root / "linked").symlink_to(tmp_path)

    def load(*rows: str):
        table.write_text("\n".join(["videoid,name,page_dir", "1,a,", "2,b,page", *rows]) + "\n")
        return load_webvid(table, root, cache_dir=str(tmp_path / "cache"))

    counts = "0 have no file and 0 no caption; 2 are used"
    left_out = "left out: 1 links to folders (such as linked)"
    note = "1 videos are links to files elsewhere, such as 'page/2.mp4'"
    assert load().info.description == f"of 2 rows, {counts}; {note}; {left_out}"
    with pytest.raises(FrameBridgeError, match=f"{root}/linked is a link to a folder, which is not followed"):
        load("3,c,linked")
    for row in ("3,c,..", "../3,c,", "3,c,page/../.."):
        with pytest.raises(FrameBridgeError, match="1 names lead out of it"):
            load(row)
    (tmp_path / "tables").mkdir()
    table.rename(tmp_path / "tables/t.csv").rename(tmp_path / "t2.csv")
    (tmp_path / "tables/t.csv").symlink_to("../t2.csv")
    for given in (tmp_path / "tables", tmp_path / "tables/*.csv"):
        with pytest.raises(FrameBridgeError, match=r"t\.csv leads to .*outside"):
            csv_files(given)
    assert csv_files(tmp_path / "tables/t.csv") == [tmp_path / "tables/t.csv"]  # named by itself


@pytest.mark.parametrize("layout", ["csv", "jsonl", "json", "list"])
def test_long_lines_and_large_files(tmp_path, layout, monkeypatch):
    table = write_layout(tmp_path, layout, "x" * (tables.MAX_LINE + 10))
    if layout == "json":
        monkeypatch.setattr(tables.read_text, "__defaults__", (tables.MAX_LINE,))
    with pytest.raises(FrameBridgeError, match=rf"{table.name}.* has more than 1048576 characters"):
        index_dataset({"data_root": str(tmp_path)})
    monkeypatch.setattr(tables, "MAX_FILE_BYTES", 2**20)
    with pytest.raises(FrameBridgeError, match=f"{table.name} is larger than"):
        index_dataset({"data_root": str(tmp_path)})


def test_deep_json_is_refused_in_one_line(tmp_path):
    deep = "[" * 200_000
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.mp4", "caption": {deep}\n')
    with pytest.raises(FrameBridgeError, match=r"metadata\.jsonl:1 is no valid JSON") as caught:
        index_dataset({"data_root": str(tmp_path)})
    assert len(str(caught.value)) < 300
    with pytest.raises(FrameBridgeError, match="x is no valid JSON"):
        parse_json(deep, "x")
    with pytest.raises(
        FrameBridgeError, match="x is no valid JSON: a whole number of 5000 digits is too long to be read$"
    ):
        parse_json("9" * 5000, "x")
    (tmp_path / "bad.jsonl").write_text(deep + "\n" + json.dumps({"path": "/a.mp4"}))
    assert read_bad_files(tmp_path / "bad.jsonl") == [{"path": "/a.mp4"}]


def test_pipes_are_no_texts(tmp_path):
    for name in ("v.csv", "v.json", "v.parquet", "v.arrow"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(FrameBridgeError, match="it is no regular file"):
            read_validation_rows(tmp_path / name)
    for read in (read_text, read_bad_files):
        with pytest.raises(FrameBridgeError, match=r"v\.csv cannot be read: it is no regular file"):
            read(tmp_path / "v.csv")
