"""Every layout is found and read; whatever is wrong with one is said in one line."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import os
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch

from framebridge_plugin import files
from framebridge_plugin.data import (
    UCF101_CLASSES,
    ClipError,
    ClipSettings,
    index_dataset,
    read_clip,
)
from framebridge_plugin.data.class_folders import class_names
from framebridge_plugin.data.folders import COMMON_PREFIXES
from framebridge_plugin.errors import FrameBridgeError

DATA = Path(__file__).parents[1] / "data"
CAPTIONS = ['A dog, a cat and "friends".', "Two\nlines", "  Ümlaut — 狗  ", "NA", "The video shows a red car"]
CLEAN = [caption.strip() for caption in CAPTIONS]


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_csv(path: Path, header: list[str], rows: list[list[str]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([header, *rows])
    return path


def metadata_csv(root: Path, column: str = "caption", encoding: str = "utf-8") -> None:
    rows = [["x", f"clips/{number}.mp4", caption] for number, caption in enumerate(CAPTIONS)]
    write_csv(root / "metadata.csv", ["other", "file_name", column], rows, encoding)


def metadata_jsonl(root: Path) -> None:
    rows = [{"file_name": f"clips/{number}.mp4", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def metadata_json(root: Path) -> None:
    rows = [{"file_name": f"clips/{number}.mp4", "text": caption} for number, caption in enumerate(CAPTIONS)]
    (root / "metadata.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    "write",
    [
        metadata_csv,
        metadata_jsonl,
        metadata_json,
        lambda root: metadata_csv(root, "prompt"),
        lambda root: metadata_csv(root, "text", "utf-8-sig"),
    ],
    ids=["csv", "jsonl", "json", "csv with prompt", "csv with a byte order mark"],
)
def test_metadata_files(tmp_path, write):
    touch(tmp_path, *(f"clips/{number}.mp4" for number in range(5)))
    write(tmp_path)
    index = index_dataset({"data_root": tmp_path.name}, tmp_path.parent)
    assert list(index) == [(str(tmp_path / f"clips/{n}.mp4"), caption) for n, caption in enumerate(CLEAN)]
    assert len(index) == 5
    assert index[-1] == index[4]
    assert index[1:3] == [index[1], index[2]]
    with pytest.raises(IndexError):
        index[5]
    assert list(pickle.loads(pickle.dumps(index))) == list(index)


def test_pairs_of_video_and_text(tmp_path, caplog):
    names = ["b.mp4", "a.mov", "c.avi", "d.webm", "e.mkv"]
    touch(tmp_path, *names, "uncaptioned.mp4")
    for name, caption in zip(names, CAPTIONS, strict=True):
        (tmp_path / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("belongs to no video")
    index = index_dataset({"data_root": str(tmp_path)})
    assert list(index) == sorted((str(tmp_path / name), caption) for name, caption in zip(names, CLEAN, strict=True))
    assert "1 videos without a .txt caption" in caplog.text


@pytest.mark.parametrize(("videos", "captions"), [("videos.txt", "prompts.txt"), ("video.txt", "captions.txt")])
def test_lists_of_videos_and_captions(tmp_path, videos, captions):
    touch(tmp_path, "one.mp4", "clips/two.mp4")
    (tmp_path / videos).write_text("clips/two.mp4\none.mp4\n")
    (tmp_path / captions).write_text("the second\nthe first\n")
    expected = [(str(tmp_path / "clips/two.mp4"), "the second"), (str(tmp_path / "one.mp4"), "the first")]
    assert list(index_dataset({"data_root": str(tmp_path)})) == expected


def webvid(tmp_path: Path, ids: list[str], captions: list[str]) -> dict[str, str]:
    rows = [
        [i, f"https://host/{i}.mp4", "PT00H00M10S", "000001_000050", c] for i, c in zip(ids, captions, strict=True)
    ]
    write_csv(tmp_path / "results.csv", ["videoid", "contentUrl", "duration", "page_dir", "name"], rows)
    (tmp_path / "videos").mkdir()
    return {"csv": "results.csv", "video_root": "videos"}


def test_the_reference_table_and_its_folder(tmp_path, caplog):
    ids = ["0042", "1e5", "1066702", "7", "null"]
    entry = webvid(tmp_path, ids, CAPTIONS)
    touch(tmp_path / "videos", *(f"{name}.mp4" for name in ids), "unlisted.mp4")
    index = index_dataset(entry, tmp_path)
    assert list(index) == [(str(tmp_path / f"videos/{i}.mp4"), caption) for i, caption in zip(ids, CLEAN, strict=True)]
    assert not caplog.records


def test_newlines_in_captions_of_a_table_larger_than_a_block(tmp_path):
    ids = [f"{number:06}" for number in range(30_000)]
    entry = webvid(tmp_path, ids, [f'caption "{name}",\n{name * 12}' for name in ids])
    touch(tmp_path / "videos", "000000.mp4", "029999.mp4")
    expected = [f'caption "{name}",\n{name * 12}' for name in ids]
    (captions,) = [captions for _, captions in index_dataset(entry, tmp_path).batches()]
    assert captions == expected


def test_options_of_captions(tmp_path):
    touch(tmp_path, *(f"clips/{number}.mp4" for number in range(5)))
    metadata_csv(tmp_path)
    entry = {"data_root": str(tmp_path), "id_token": "XYZ", "remove_common_llm_caption_prefixes": True}
    assert index_dataset(entry)[4][1] == "XYZ a red car"
    assert index_dataset({**entry, "id_token": None})[4][1] == "a red car"
    assert index_dataset({**entry, "remove_common_llm_caption_prefixes": False})[4][1] == f"XYZ {CLEAN[4]}"


def test_the_common_prefixes_are_those_of_finetrainers():
    folder = importlib.util.find_spec("finetrainers").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("finetrainers_constants", f"{folder}/constants.py")
    constants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(constants)
    assert set(COMMON_PREFIXES) == set(constants.COMMON_LLM_START_PHRASES)


@pytest.mark.parametrize(
    ("files", "facts"),
    [
        ({"metadata.csv": "", "metadata.jsonl": ""}, ["metadata.csv", "metadata.jsonl"]),
        ({"b.mp4": ""}, ["metadata.csv"]),
        ({"metadata.csv": "file_name,caption\nb.mp4,b\nx/c.mp4,c\n"}, ["2 of 2", "'b.mp4'"]),
        ({"metadata.csv": "file_name,label\na.mp4,a\n"}, ["caption or prompt or text", "file_name, label"]),
        ({"metadata.csv": "file_name,caption\n"}, ["no clips"]),
        ({"metadata.csv": ""}, ["no column file_name"]),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "caption": "a"}\n{"file_name"\n'}, ["metadata.jsonl:2"]),
        ({"metadata.jsonl": '{"file_name": "a.mp4"}\n'}, ["metadata.jsonl:1", "caption, prompt, text"]),
        ({"metadata.json": '{"a.mp4": "a"}'}, ["metadata.json", "list"]),
        ({"videos.txt": "a.mp4\na.mp4\n", "prompts.txt": "a\n"}, ["videos.txt has 2", "prompts.txt has 1"]),
        ({"videos.txt": "a.mp4\n\n", "prompts.txt": "a\nb\n"}, ["videos.txt has 1", "prompts.txt has 2"]),
        ({"videos.txt": "\na.mp4\n", "prompts.txt": "a\nb\n"}, ["videos.txt:1"]),
        ({"videos.txt": "a.mp4\n", "prompts.txt": "a\n", "captions.txt": "a\n"}, ["metadata.csv"]),
        ({"train/0001.tar": "", "train/0000.txt": ""}, ["train/0001.tar", "unpack"]),
        ({"data/train.parquet": ""}, ["data/train.parquet", "unpack"]),
        ({"a.mov": "", "a.txt": ""}, ["a.mp4 and a.mov"]),
        ({"a.txt": "", "a.TXT": ""}, ["a.TXT and a.txt"]),
    ],
)
def test_a_wrong_folder_is_refused_in_one_line(tmp_path, files, facts):
    touch(tmp_path, "a.mp4", *files)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FrameBridgeError) as caught:
        index_dataset({"data_root": str(tmp_path)})
    assert all(fact in str(caught.value) for fact in [str(tmp_path), *facts])
    assert "\n" not in str(caught.value)


BOM = b"\xef\xbb\xbf"
ODD = "null|NA|2024|a\u2028b\x0cc\x85d".split("|")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "lists", "pairs"])
def test_captions_stay_as_they_are(tmp_path, kind, end):
    """With a byte order mark, any line end, empty rows at the end, and all extensions in capitals."""
    touch(tmp_path, *(f"{number}.MOV" for number in range(4)))
    names = [f"{number}.mov" for number in range(4)]
    if kind == "csv":
        lines = {"metadata.CSV": ["file_name,caption", *map(",".join, zip(names, ODD, strict=True)), "", ",", " , "]}
    elif kind == "jsonl":
        rows = [{"file_name": name, "caption": text} for name, text in zip(names, ODD, strict=True)]
        lines = {"metadata.jsonl": [json.dumps(row, ensure_ascii=False) for row in rows] + ["", " "]}
    elif kind == "json":
        rows = [{"file_name": name, "caption": text} for name, text in zip(names, ODD, strict=True)]
        lines = {"metadata.json": json.dumps(rows, ensure_ascii=False, indent=1).split("\n")}
    elif kind == "lists":
        # An empty line in both shifts nothing.
        lines = {"Videos.TXT": [*names[:2], "", *names[2:], ""], "PROMPTS.txt": [*ODD[:2], "", *ODD[2:], "", ""]}
    else:
        lines = {f"{number}.TXT": [text, ""] for number, text in enumerate(ODD)}
    for name, content in lines.items():
        (tmp_path / name).write_bytes(BOM + end.join(line.encode() for line in content))
    index = index_dataset({"data_root": str(tmp_path)})
    assert list(index) == [(f"{tmp_path}/{number}.MOV", caption) for number, caption in enumerate(ODD)]
    assert index.description == ""


@pytest.mark.parametrize(
    ("name", "content", "where", "message"),
    [
        ("metadata.csv", 'file_name,caption\na.mp4,"cat\na.mp4,dog\n', ":2 ", "a quote opens a cell"),
        ("metadata.csv", 'file_name,caption\na.mp4,x\na.mp4,"cat\na.mp4,"dog"\n', ":3 ", "a quote opens a cell"),
        ("metadata.csv", "file_name;caption\na.mp4;cat\n", ":1 ", "has semicolons between its cells"),
        ("metadata.csv", 'file_name,caption\na.mp4,x\na.mp4, "cat"\n', ":3 ", "a space stands between a comma and"),
        ("metadata.csv", "file_name\tcaption\na.mp4\tcat\n", ":1 ", "has tabs between its cells"),
        ("metadata.csv", "file_name,Caption\na.mp4,cat\n", ":1 ", "calls a column 'Caption'; rename it to caption"),
        ("metadata.csv", "file name,caption\na.mp4,cat\n", ":1 ", "calls a column 'file name'"),
        ("metadata.csv", "file_name,caption,caption\na.mp4,a,b\n", ":1 ", "the column caption 2 times"),
        ("metadata.csv", "file_name,caption\na.mp4,a\0b\n", ":2 ", "NUL"),
        ("metadata.csv", "file_name,caption\na.mp4\n", ":2 ", "it has 1 cells, the first row 2"),
        ("metadata.csv", "file_name,caption\na.mp4,x\n".encode("utf-16"), ":1 ", "UTF-16"),
        ("metadata.csv", "file_name,caption\na.mp4,x\n".encode("utf-16-le"), ":1 ", "NUL"),
        ("metadata.csv", b"file_name,caption\ra.mp4,\xe9\r", ":2 ", "byte 0xe9 is of another encoding"),
        ("metadata.jsonl", b'{"file_name": "a.mp4", "caption": "a"}\n"\xe9"\n', ":2 ", "byte 0xe9"),
        ("metadata.jsonl", '\n{"file_name": "a.mp4", "caption": 2024}\n', ":2 ", "both text"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "Caption": "a"}\n', ":1 ", "calls a column 'Caption'"),
        (
            "metadata.jsonl",
            '{"file_name": "a.mp4", "caption": "a", "caption": "b"}\n',
            ":1 ",
            "'caption' stands twice",
        ),
        (
            "metadata.json",
            '[{"file_name": "a.mp4", "caption": "\\ud83d\\ude00 \\\\ud83d"},\n'
            ' {"file_name": "a.mp4", "caption": "\\ud83d"}]',
            " ",
            r"half a surrogate pair, \ud83d in line 2",
        ),
        ("metadata.json", r'[{"file_name": "a.mp4", "caption": "\udc00"}]', " ", r"half a surrogate pair, \udc00"),
        ("a.txt", b"ok\n\xfc", ":2 ", "byte 0xfc"),
    ],
)
def test_a_text_that_is_not_as_it_should_be(tmp_path, name, content, where, message):
    touch(tmp_path, "a.mp4")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FrameBridgeError) as caught:
        index_dataset({"data_root": str(tmp_path)})
    assert f"{tmp_path / name}{where}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "clips", "left_out"),
    [
        ("upper_case", [("IMG_1.MOV", "dog"), ("a.mp4", "cat")], ""),
        ("pairs_mac", [("a.mp4", "cat")], "left out: 2 hidden files (such as ._a.mp4)"),
    ],
)
def test_folders_of_other_systems(case, clips, left_out):
    root = DATA / "cases" / case
    index = index_dataset({"data_root": str(root)})
    assert list(index) == [(str(root / name), caption) for name, caption in clips]
    assert index.description == left_out


def test_quotes_and_spaces_that_are_as_they_should_be(tmp_path, caplog):
    touch(tmp_path, "a.mp4")
    table = 'file_name,caption\na.mp4,"a, ""b"", ""c"", "\na.mp4,\na.mp4," ""d"" e\n, "\n'
    (tmp_path / "metadata.csv").write_text(table)
    index = index_dataset({"data_root": str(tmp_path)})
    assert [caption for _, caption in index] == ['a, "b", "c",', "", '"d" e\n,']
    assert index.description == "1 of 3 clips have an empty caption, first 'a.mp4': used as it is"
    assert index.description in caplog.text


@pytest.mark.parametrize("layout", ["metadata", "pairs", "lists"])
def test_names_in_another_normal_form(tmp_path, layout):
    (tmp_path / "e\u0301").mkdir()
    name = "o\u0308.MP4" if layout == "pairs" else "e\u0301/o\u0308.MP4"
    touch(tmp_path, name)
    if layout == "metadata":
        write_csv(tmp_path / "metadata.csv", ["file_name", "caption"], [["\u00e9/\u00f6.mp4", "a"]])
    elif layout == "pairs":
        (tmp_path / "\u00f6.txt").write_text("a")
    else:
        (tmp_path / "videos.txt").write_text("\u00e9/\u00f6.mp4\n")
        (tmp_path / "prompts.txt").write_text("a\n")
    assert list(index_dataset({"data_root": str(tmp_path)})) == [(str(tmp_path / name), "a")]


def test_what_is_left_out_of_a_folder_is_counted_by_reason(tmp_path, caplog):
    touch(tmp_path, "a.mp4", "a.txt", "b.MP4", "c.txt", ".DS_Store", "._a.mp4")
    (tmp_path / "a.txt").write_text("a")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")).touch()
    index = index_dataset({"data_root": str(tmp_path)})
    assert index.description == (
        "left out: 1 hidden files (such as ._a.mp4), 1 names not in UTF-8 (such as caf\\xe9.mp4), "
        "1 texts without a video beside them (such as c.txt), "
        "1 videos without a .txt caption beside them (such as b.MP4)"
    )
    assert index.description in caplog.text


def test_a_listed_file_that_is_missing_is_a_bad_file(tmp_path, caplog):
    touch(tmp_path, "a.mp4")
    write_csv(tmp_path / "metadata.csv", ["file_name", "caption"], [["a.mp4", "a"], ["x/b.mp4", "b"]])
    index = index_dataset({"data_root": str(tmp_path)})
    assert index.description == "1 of 2 listed clips are missing, first 'x/b.mp4': bad files"
    assert index.description in caplog.text
    with pytest.raises(ClipError) as caught:
        read_clip(index[1][0], ClipSettings(1, 8, 8), torch.Generator())
    assert caught.value.kind == "missing"


def test_a_missing_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(FrameBridgeError, match="data_root .*nowhere is not an existing folder$"):
        index_dataset({"data_root": "nowhere"}, tmp_path)


def test_class_folders(tmp_path):
    touch(
        tmp_path, "PanLeft/b.avi", "PanLeft/a.MP4", "PanLeft/notes.txt", "ZoomIn/c.mp4", ".cache/d.mp4", "readme.txt"
    )
    (tmp_path / "Empty").mkdir()
    rows = index_dataset({"class_root": str(tmp_path)})
    assert list(rows) == [
        (f"{tmp_path}/PanLeft/a.MP4", "PanLeft"),
        (f"{tmp_path}/PanLeft/b.avi", "PanLeft"),
        (f"{tmp_path}/ZoomIn/c.mp4", "ZoomIn"),
    ]
    # A class without clips keeps its number, and capitals come first, as in the reference.
    assert class_names(tmp_path) == ["Empty", "PanLeft", "ZoomIn"]


def test_class_folders_without_classes_or_videos_are_refused(tmp_path):
    with pytest.raises(FrameBridgeError, match="holds no folders"):
        index_dataset({"class_root": str(tmp_path)})
    (tmp_path / "Empty").mkdir()
    with pytest.raises(FrameBridgeError, match="hold no videos"):
        index_dataset({"class_root": str(tmp_path)})
    touch(tmp_path, "PanLeft/notes.txt")
    with pytest.raises(FrameBridgeError, match="hold no videos"):
        index_dataset({"class_root": str(tmp_path)})


def test_ucf101_has_its_101_classes_in_the_order_of_its_folders(tmp_path):
    for name in UCF101_CLASSES:
        (tmp_path / name).mkdir()
    assert len(UCF101_CLASSES) == 101
    assert class_names(tmp_path) == list(UCF101_CLASSES)
    assert UCF101_CLASSES[0] == "ApplyEyeMakeup"
    assert UCF101_CLASSES[34:36] == ("HammerThrow", "Hammering")
    assert UCF101_CLASSES[100] == "YoYo"


def test_a_data_set_of_the_hub_comes_from_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "datasets--someone--clips"
    metadata_csv_folder = stored / "snapshots" / "abc"
    touch(metadata_csv_folder, *(f"clips/{number}.mp4" for number in range(len(CAPTIONS))))
    metadata_csv(metadata_csv_folder)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    rows = index_dataset({"data_root": "someone/clips"})
    assert rows[0] == (str(metadata_csv_folder / "clips/0.mp4"), CLEAN[0])
    announced = "someone/clips is no folder here: it is taken from the Hugging Face Hub, revision main\n"
    assert capsys.readouterr().err == announced
    with pytest.raises(FrameBridgeError, match=r"'someone/others' is neither a folder nor to be had from the hub"):
        index_dataset({"data_root": "someone/others"})
    (tmp_path / "someone").mkdir()  # the name is one of a folder here
    with pytest.raises(FrameBridgeError, match="someone/clips is not an existing folder"):
        index_dataset({"data_root": "someone/clips"}, tmp_path)


def test_tar_files_are_refused_by_their_name_and_do_no_harm_beside_a_layout(tmp_path):
    touch(tmp_path, *(f"clips/{number}.mp4" for number in range(5)), "clips.tar")
    with pytest.raises(FrameBridgeError, match=r"\(clips.tar\)"):
        index_dataset({"data_root": "clips.tar"}, tmp_path)
    metadata_csv(tmp_path)
    assert len(index_dataset({"data_root": str(tmp_path)})) == 5


def test_a_data_set_of_tar_files_is_refused_before_it_is_downloaded(monkeypatch, capsys):
    files = ["README.md", "train/0000.tar", "train/0001.tar"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, repo_type: files)
    downloads = []

    def download(name, repo_type):
        downloads.append(name)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FrameBridgeError, match=r"someone/shards is a data set of tar .*\(train/0000.tar\)") as caught:
        index_dataset({"data_root": "someone/shards"})
    assert "\n" not in str(caught.value)
    assert downloads == []
    announced = "someone/shards is no folder here: it is taken from the Hugging Face Hub, revision main\n"
    assert capsys.readouterr().err == announced
    files.append("metadata.csv")
    with pytest.raises(FrameBridgeError, match="no network"):
        index_dataset({"data_root": "someone/shards"})
    assert downloads == ["someone/shards"]


def test_a_data_set_of_the_hub_is_recorded_and_a_run_that_goes_on_keeps_to_its_commit(tmp_path, monkeypatch):
    repository = tmp_path / "datasets--owner--recorded"
    for commit in ("1" * 40, "2" * 40):
        folder = repository / "snapshots" / commit
        touch(folder, "a.mp4")
        (folder / "a.txt").write_text(commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("2" * 40)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path, local_files_only=True),
    )
    assert index_dataset({"data_root": "owner/recorded"})[0][1] == "2" * 40
    assert files.downloaded["owner/recorded"] == "2" * 40
    files.pin({"owner/recorded": "1" * 40})
    assert index_dataset({"data_root": "owner/recorded"})[0][1] == "1" * 40
    files.pin({})
