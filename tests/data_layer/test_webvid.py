"""WebVid's tables and folders, as they are found in the wild, and the index that is built from them."""

from __future__ import annotations

import csv
import errno
import fcntl
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from framebridge_plugin.data import ClipSettings, ClipStream, index_dataset, load_webvid, webvid
from framebridge_plugin.errors import FrameBridgeError

HEADER = ["videoid", "contentUrl", "duration", "page_dir", "name"]
CAPTION = 'A "quoted" cat, asleep\non two lines'


@pytest.fixture
def corpus(tmp_path):
    """Four rows: a flat file, a file in its page's folder, no file, no caption."""
    rows = [
        ["0012", "https://x/0012.mp4", "PT00H00M15S", "000001_000050", CAPTION],
        ["7", "https://x/7.mp4", "PT00H00M09S", "000051_000100", "a dog"],
        ["8", "https://x/8.mp4", "PT00H00M09S", "000051_000100", "gone"],
        ["9", "https://x/9.mp4", "PT00H00M09S", "000051_000100", "  "],
    ]
    write(tmp_path / "results.csv", [HEADER, *rows])
    for name in ("0012.mp4", "000051_000100/7.mp4", "000051_000100/9.mp4", "000051_000100/notes.txt", "readme.txt"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_both_layouts_and_odd_captions(corpus, caplog):
    with caplog.at_level(logging.WARNING):
        rows = load_webvid(corpus / "results.csv", corpus / "videos")
    assert rows.column_names == [*HEADER, "path"]
    assert rows[0] == {
        **dict(zip(HEADER, ["0012", "https://x/0012.mp4", "PT00H00M15S", "000001_000050", CAPTION], strict=True)),
        "path": str(corpus / "videos/0012.mp4"),
    }
    assert rows["path"][1] == str(corpus / "videos/000051_000100/7.mp4")
    # What is listed and not there is for a run's policy of bad files to judge.
    assert rows["path"][2] == str(corpus / "videos/000051_000100/8.mp4")
    assert len(rows) == 3
    counts = "of 4 rows, 1 have no file (bad files) and 1 no caption; 3 are used"
    assert counts in caplog.text
    assert rows.info.description == counts
    assert [row["videoid"] for row in rows.to_iterable_dataset()] == ["0012", "7", "8"]


def test_many_parts_a_folder_and_a_pattern(corpus):
    parts = corpus / "parts"
    parts.mkdir()
    write(parts / "p_1.csv", [["name", "videoid"], [CAPTION, "0012"]])  # no page_dir: flat files alone
    write(parts / "p_2.csv", [["page_dir", "videoid", "name"], ["000051_000100", "7", "a dog"]])
    expected = [("0012", CAPTION), ("7", "a dog")]
    for given in (parts, str(parts / "p_*.csv"), [parts / "p_1.csv", parts / "p_2.csv"]):
        rows = load_webvid(given, corpus / "videos")
        assert [(row["videoid"], row["name"]) for row in rows] == expected
        assert [row["duration"] for row in rows] == ["", ""]


def test_the_cache_is_opened_without_a_look_at_table_and_folders(corpus):
    table = corpus / "results.csv"
    first = load_webvid(table, corpus / "videos")
    status, root_status = table.stat(), (corpus / "videos").stat()
    table.write_bytes(b"x" * status.st_size)
    os.utime(table, ns=(status.st_atime_ns, status.st_mtime_ns))
    (corpus / "videos/0012.mp4").unlink()
    os.utime(corpus / "videos", ns=(root_status.st_atime_ns, root_status.st_mtime_ns))
    assert list(load_webvid(table, corpus / "videos")) == list(first)


def test_a_changed_table_or_folder_is_indexed_again(corpus):
    table, videos = corpus / "results.csv", corpus / "videos"
    assert missing(load_webvid(table, videos)) == 1
    (videos / "8.mp4").touch()
    assert missing(load_webvid(table, videos)) == 0
    with table.open("a", newline="") as file:
        csv.writer(file).writerow(["8", "", "", "", "once more"])
    assert len(load_webvid(table, videos)) == 4
    # What lies deeper is not asked about, except on demand.
    (videos / "000051_000100/7.mp4").unlink()
    assert "0 have no file" in load_webvid(table, videos).info.description
    assert "1 have no file" in load_webvid(table, videos, refresh=True).info.description
    assert "1 have no file" in load_webvid(table, videos).info.description


def missing(rows) -> int:
    return sum(not Path(path).exists() for path in rows["path"])


def test_a_video_that_has_vanished_since_is_a_broken_file(corpus):
    entry = {"csv": str(corpus / "results.csv"), "video_root": str(corpus / "videos")}
    index = index_dataset(entry)
    (corpus / "videos/000051_000100/7.mp4").unlink()
    (corpus / "videos/0012.mp4").unlink()
    sample = next(iter(ClipStream([(index, ClipSettings(1, 8, 8))], seed=1)))
    assert [bad_file["kind"] for bad_file in sample["skipped"]] == ["missing"] * 3


def test_a_worker_gets_the_index_by_its_path(corpus):
    rows = [[str(number), "", "", "", "caption " * 20] for number in range(2000)]
    write(corpus / "big.csv", [HEADER, *rows])
    for number in range(2000):
        (corpus / "videos" / f"{number}.mp4").touch()
    index = index_dataset({"csv": str(corpus / "big.csv"), "video_root": str(corpus / "videos")})
    assert len(index) == 2000
    pickled = pickle.dumps(index)
    assert len(pickled) < 20_000
    assert pickle.loads(pickled)[1234] == (str(corpus / "videos/1234.mp4"), ("caption " * 20).strip())


@pytest.mark.parametrize(
    ("table", "videos", "message"),
    [
        ("none.csv", "videos", "no such file: "),
        ("results.csv", "none", "is not an existing folder"),
        ("no_name.csv", "videos", "has no column name; its columns are videoid, caption"),
        ("empty.csv", "videos", "has no column videoid and no name; its columns are none"),
        ("others.csv", "videos", "none of its 1 rows has both a caption and a file"),
        ("latin.csv", "videos", "latin.csv:2 .*byte 0xe9"),
        ("ragged.csv", "videos", "ragged.csv:2 .*6 cells, the first row 5"),
    ],
)
def test_wrong_sources_are_refused_in_one_line(corpus, table, videos, message):
    write(corpus / "no_name.csv", [["videoid", "caption"], ["7", "a dog"]])
    write(corpus / "others.csv", [HEADER, ["77", "", "", "", "a dog"]])
    write(corpus / "ragged.csv", [HEADER, ["77", "", "", "", "a dog", "more"]])
    (corpus / "empty.csv").touch()
    (corpus / "latin.csv").write_bytes("videoid,name\n7,\xe9t\xe9\n".encode("latin-1"))
    with pytest.raises(FrameBridgeError, match=message) as caught:
        load_webvid(corpus / table, corpus / videos)
    assert "\n" not in str(caught.value)


def failing_listdir(monkeypatch, folder: Path, number: int) -> None:
    """A disk that answers so, and permissions, cannot be had by root, as whom these tests may run."""
    scandir = os.scandir

    def fail(path):
        if Path(path) == folder:
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(webvid.os, "scandir", fail)


def test_what_is_in_the_way_is_left_out_and_counted(corpus, caplog, monkeypatch):
    table, videos = corpus / "results.csv", corpus / "videos"
    (videos / "dangling").symlink_to("nowhere")
    (videos / "circle").symlink_to("circle")
    (videos / "lost+found").mkdir()
    failing_listdir(monkeypatch, videos / "lost+found", errno.EACCES)
    for folder in (b"", b"000051_000100/", b"caf\xe9/"):
        path = os.fsencode(videos) + b"/" + folder
        os.makedirs(path, exist_ok=True)
        with open(path + b"caf\xe9.mp4", "wb"):
            pass
    with caplog.at_level(logging.WARNING):
        rows = load_webvid(table, videos)
    assert list(rows["videoid"]) == ["0012", "7", "8"]
    (record,) = caplog.records
    assert rows.info.description in record.getMessage()
    assert rows.info.description == (
        "of 4 rows, 1 have no file (bad files) and 1 no caption; 3 are used"
        "; left out: 3 links or folders that cannot be listed (such as "
        "circle: Too many levels of symbolic links)"
        ", 3 names not in UTF-8 (such as 000051_000100/caf\\xe9.mp4)"
    )
    caplog.clear()
    load_webvid(table, videos)
    assert "3 names not in UTF-8" in caplog.text  # from the cache, too


def test_what_is_left_out_is_said_although_every_row_has_its_file(corpus, caplog):
    write(corpus / "one.csv", [["videoid", "name"], ["0012", "a cat"]])
    (corpus / "videos/dangling").symlink_to("nowhere")
    with caplog.at_level(logging.WARNING):
        load_webvid(corpus / "one.csv", corpus / "videos")
    assert "1 links or folders that cannot be listed (such as dangling: No such file or directory" in caplog.text
    write(corpus / "none.csv", [["videoid", "name"], ["77", "a cat"]])
    with pytest.raises(FrameBridgeError, match=r"none of its 1 rows .*such as dangling: No such file"):
        load_webvid(corpus / "none.csv", corpus / "videos")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_failing_disk_is_not_taken_for_a_folder_without_videos(corpus, monkeypatch, number):
    failing_listdir(monkeypatch, corpus / "videos/000051_000100", number)
    with pytest.raises(FrameBridgeError, match=f"{os.strerror(number)}.*000051_000100") as caught:
        load_webvid(corpus / "results.csv", corpus / "videos")
    assert "\n" not in str(caught.value)


def test_names_in_capitals_and_other_normal_forms(tmp_path):
    table = write(tmp_path / "t.csv", [["videoid", "page_dir", "name"], ["caf\u00e9", "", "a"], ["2", "e\u0301", "b"]])
    with table.open("a") as file:
        file.write("3,p,c\n4,,d\n")
    videos = tmp_path / "videos"
    for name in ("cafe\u0301.MP4", "\u00e9/2.Mp4", "._2.mp4", "p/3.mp4", "4.MOV"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).touch()
    rows = load_webvid(table, videos)
    assert list(rows["path"]) == [
        f"{videos}/{name}" for name in ("cafe\u0301.MP4", "\u00e9/2.Mp4", "p/3.mp4", "4.MOV")
    ]
    assert rows.info.description.endswith("left out: 1 hidden files (such as ._2.mp4)")


def test_a_complete_index_opens_without_a_lock_and_writes_nothing(corpus, tmp_path):
    cache = tmp_path / "cache"
    rows = list(load_webvid(corpus / "results.csv", corpus / "videos", cache_dir=str(cache)))
    (lock,) = cache.rglob(".lock")

    def state():
        return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in [cache, *cache.rglob("*")])

    before = state()
    program = f"""if True:
        from framebridge_plugin.data import load_webvid
        rows = load_webvid({str(corpus / "results.csv")!r}, {str(corpus / "videos")!r}, cache_dir={str(cache)!r})
        print(len(rows))
    """
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.stdout == f"{len(rows)}\n", result.stderr
    assert state() == before
