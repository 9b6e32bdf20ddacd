"""UCF-101's folders and official folds."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from framebridge_plugin.data import UCF101_CLASSES, class_folders, index_dataset, load_ucf101
from framebridge_plugin.errors import FrameBridgeError, UsageError

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def corpus(tmp_path):
    """Three of the 101 classes with two groups of two clips each, and lists as in the archive."""
    root = tmp_path / "UCF-101"
    names = {"Archery": "Archery", "HandstandPushups": "HandStandPushups", "YoYo": "YoYo"}
    for folder, name in names.items():
        (root / folder).mkdir(parents=True)
        for group in (1, 8):
            for clip in (1, 2):
                (root / folder / f"v_{name}_g{group:02}_c{clip:02}.avi").touch()
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for fold, test_group in ((1, 1), (2, 8), (3, 1)):
        test, train = [], []
        for folder in names:
            for group in (1, 8):
                for clip in (1, 2):
                    # The lists spell one class as its folder, unlike its files.
                    line = f"{folder}/v_{folder}_g{group:02}_c{clip:02}.avi"
                    (test if group == test_group else train).append(line)
        (lists / f"testlist{fold:02}.txt").write_text("\r\n".join(test) + "\r\n")
        (lists / f"trainlist{fold:02}.txt").write_text("".join(f"{line} {n}\r\n" for n, line in enumerate(train, 1)))
    return root


def test_all_clips_with_the_labels_of_the_whole_corpus(corpus):
    rows = load_ucf101(corpus)
    assert len(rows) == 12
    assert rows.features["label"].names == list(UCF101_CLASSES)
    assert rows[0] == {"path": str(corpus / "Archery/v_Archery_g01_c01.avi"), "label": 2, "group": 1}
    assert rows[11]["label"] == 100
    assert sorted(set(rows["group"])) == [1, 8]
    assert next(iter(rows.to_iterable_dataset())) == rows[0]


@pytest.mark.parametrize(("fold", "test_group"), [(1, 1), (2, 8), (3, 1)])
def test_official_folds(corpus, fold, test_group):
    train, test = (load_ucf101(corpus, split, fold) for split in ("train", "test"))
    assert set(test["group"]) == {test_group}
    assert set(train["group"]) == {9 - test_group}
    assert sorted([*train["path"], *test["path"]]) == sorted(load_ucf101(corpus)["path"])


def test_a_fold_through_the_dataset_file(corpus, tmp_path):
    lists = (tmp_path / "ucfTrainTestlist").rename(tmp_path / "lists")
    entry = {"class_root": "UCF-101", "split": "test", "fold": 2, "splits_dir": "lists"}
    index = index_dataset(entry, tmp_path)
    assert lists.is_dir()
    assert len(index) == 6
    assert index[0] == (str(corpus / "Archery/v_Archery_g08_c01.avi"), "Archery")
    assert index.class_names == list(UCF101_CLASSES)


def test_clips_of_a_list_that_are_missing_are_bad_files(corpus, caplog):
    (corpus / "YoYo/v_YoYo_g01_c01.avi").unlink()
    shutil.rmtree(corpus / "Archery")  # a class that is not there is none of the data set
    with caplog.at_level(logging.WARNING):
        rows = load_ucf101(corpus, "test", 1)
    assert len(rows) == 4
    assert rows[3] == {"path": str(corpus / "YoYo/v_YoYo_g01_c01.avi"), "label": 100, "group": 1}
    assert (
        "3 of the 6 videos of the test split of fold 1 are missing, such as Archery/v_Archery_g01_c01" in caplog.text
    )
    assert "3 of the 6" in index_dataset({"class_root": str(corpus), "split": "test"}).description


def test_lists_with_a_byte_order_mark():
    rows = load_ucf101(DATA / "cases/ucf_bom/UCF-101", "train", 1)
    assert list(rows["label"]) == [2, 100]


def test_lists_of_other_systems(tmp_path):
    (tmp_path / "A class").mkdir()
    for name in ("a clip.avi", "b.avi", "c 1.avi"):
        (tmp_path / "A class" / name).touch()
    (tmp_path / "trainlist01.txt").write_bytes(b"A class\\a clip.avi 1\r\n./A class/b.avi\rA class/c 1.avi\t1\n\n")
    rows = load_ucf101(tmp_path, "train", splits_dir=tmp_path)
    assert [os.path.basename(path) for path in rows["path"]] == ["a clip.avi", "b.avi", "c 1.avi"]


def test_a_name_in_latin_1_is_named_and_left_out(corpus, caplog):
    Path(os.fsdecode(os.fsencode(corpus) + b"/YoYo/caf\xe9.avi")).touch()
    Path(os.fsdecode(os.fsencode(corpus) + b"/caf\xe9")).mkdir()
    for name in ("._v_YoYo_g01_c01.avi", "notes.wmv"):
        (corpus / "YoYo" / name).touch()
    (corpus / "stray.avi").touch()
    rows = load_ucf101(corpus)
    assert len(rows) == 12
    assert rows.features["label"].names == list(UCF101_CLASSES)
    assert (
        "left out: 1 files that are no videos by their extension (such as YoYo/notes.wmv), "
        "1 hidden files (such as YoYo/._v_YoYo_g01_c01.avi), 2 names not in UTF-8 (such as YoYo/caf\\xe9.avi), "
        "1 videos in no folder of a class (such as stray.avi)"
    ) in caplog.text


def test_names_in_another_normal_form(tmp_path):
    (tmp_path / "UCF-101/cafe\u0301").mkdir(parents=True)
    (tmp_path / "UCF-101/cafe\u0301/e\u0301_g01_c01.AVI").touch()
    (tmp_path / "trainlist01.txt").write_text("caf\u00e9/\u00e9_g01_c01.avi 1\n")
    rows = load_ucf101(tmp_path / "UCF-101", "train", splits_dir=tmp_path)
    assert rows.features["label"].names == ["caf\u00e9"]
    assert list(rows["path"]) == [str(tmp_path / "UCF-101/cafe\u0301/e\u0301_g01_c01.AVI")]


def test_a_file_added_later_is_seen(corpus):
    assert len(load_ucf101(corpus)) == 12
    (corpus / "YoYo/v_YoYo_g09_c01.avi").touch()
    assert len(load_ucf101(corpus)) == 13


def test_folders_of_other_classes_keep_their_own_names(tmp_path, caplog):
    for name in ("ZoomIn", "PanLeft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").touch()
    rows = load_ucf101(tmp_path)
    assert rows.features["label"].names == ["PanLeft", "ZoomIn"]
    assert list(rows["label"]) == [0, 1]
    assert list(rows["group"]) == [-1, -1]
    assert not caplog.records


@pytest.mark.parametrize(
    "stray", ["lost+found/", "__MACOSX/Archery/._v_Archery_g01_c01.avi", ".cache/a.avi", "notes/read_me.txt"]
)
def test_stray_folders_change_no_labels(corpus, stray):
    before = list(load_ucf101(corpus))
    (corpus / stray).parent.mkdir(parents=True, exist_ok=True)
    (corpus / stray).mkdir() if stray.endswith("/") else (corpus / stray).touch()
    rows = load_ucf101(corpus)
    assert rows.features["label"].names == list(UCF101_CLASSES)
    assert list(rows) == before


def test_a_class_more_than_the_101_makes_it_another_data_set(corpus, caplog):
    (corpus / "Zorbing").mkdir()
    (corpus / "Zorbing/a.avi").touch()
    assert load_ucf101(corpus).features["label"].names == ["Archery", "HandstandPushups", "YoYo", "Zorbing"]
    assert "most of its folders are classes of UCF-101, but not Zorbing: the labels are not UCF-101's" in caplog.text


def test_stray_folders_change_no_labels_of_other_classes(tmp_path):
    for name in ("PanLeft", "ZoomIn", "Empty", "Notes", "__MACOSX", "lost+found"):
        (tmp_path / name).mkdir()
    for name in ("PanLeft/a.mp4", "ZoomIn/a.mp4", "Notes/a.txt", "__MACOSX/a.mp4"):
        (tmp_path / name).touch()
    rows = load_ucf101(tmp_path)
    # A class without clips keeps its number.
    assert rows.features["label"].names == ["Empty", "PanLeft", "ZoomIn"]
    assert list(rows["label"]) == [1, 2]


def test_a_class_that_cannot_be_listed_is_an_error(corpus, monkeypatch):
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("YoYo"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(class_folders.os, "scandir", fail)
    with pytest.raises(FrameBridgeError, match="YoYo cannot be listed: Permission denied; make it readable"):
        load_ucf101(corpus)


def test_wrong_requests_are_refused(corpus, tmp_path):
    with pytest.raises(UsageError, match="split is 'val'"):
        load_ucf101(corpus, "val")
    with pytest.raises(UsageError, match="fold is 4"):
        load_ucf101(corpus, "train", 4)
    with pytest.raises(FrameBridgeError, match=r"no such file: .*testlist01\.txt; unpack UCF101TrainTestSplits"):
        load_ucf101(corpus, "test", splits_dir=tmp_path / "none")
    with pytest.raises(FrameBridgeError, match="cannot be listed"):
        load_ucf101(tmp_path / "none")
