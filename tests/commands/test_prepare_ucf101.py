"""`finetrainers prepare ucf101` unpacks with what is there, and says what is missing."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from framebridge_plugin.cli import main
from framebridge_plugin.commands import prepare_ucf101
from framebridge_plugin.commands.prepare_ucf101 import UCF101_CLIPS
from framebridge_plugin.data import UCF101_CLASSES, load_ucf101

GROUPS = 25
# Five clips of every scene, six of the first so many scenes.
SCENES_OF_SIX = UCF101_CLIPS - len(UCF101_CLASSES) * GROUPS * 5

CLIPS = [
    f"{name}/v_{name}_g{group:02}_c{clip:02}.avi"
    for number, name in enumerate(UCF101_CLASSES)
    for group in range(1, GROUPS + 1)
    for clip in range(1, 6 + (number * GROUPS + group <= SCENES_OF_SIX))
]

# The tools that a user may have, for an archive that is a zip: python plays the part of unar and bsdtar.
UNZIP = """#!{python}
import sys, zipfile
archive, folder = sys.argv[{archive}], sys.argv[{folder}]
zipfile.ZipFile(archive).extractall(folder)
"""
UNAR = UNZIP.format(python=sys.executable, archive=-1, folder=-2)
BSDTAR = UNZIP.format(python=sys.executable, archive=3, folder=5)
FAILING = """#!/bin/sh
echo "Cannot open the file as archive"
exit 2
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """UCF101.rar and its splits, with a letter in the place of each video."""
    folder = tmp_path_factory.mktemp("archives")
    with zipfile.ZipFile(folder / "UCF101.rar", "w") as archive:
        for clip in CLIPS:
            archive.writestr(f"UCF-101/{clip}", "x")
    with zipfile.ZipFile(folder / "splits.zip", "w") as archive:
        lists = {"classInd.txt": UCF101_CLASSES}
        for fold in (1, 2, 3):
            lists[f"testlist0{fold}.txt"] = CLIPS[::3]
            lists[f"trainlist0{fold}.txt"] = [f"{clip} 1" for clip in [*CLIPS[1::3], *CLIPS[2::3]]]
        for name, lines in lists.items():
            archive.writestr(f"ucfTrainTestlist/{name}", "".join(f"{line}\r\n" for line in lines))
    return folder / "UCF101.rar", folder / "splits.zip"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Makes these programs the only ones that can be found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(**programs: str) -> None:
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    return install


def prepare(archives, folder: Path, *options: str) -> int:
    return main(["prepare", "ucf101", f"--archive={archives[0]}", f"--to={folder}", *options])


@pytest.fixture(scope="module")
def whole(archives, tmp_path_factory) -> Path:
    """A folder that is prepared."""
    folder = tmp_path_factory.mktemp("ucf101")
    with zipfile.ZipFile(archives[0]) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize(
    "programs",
    [{"unar": UNAR}, {"unrar": FAILING, "7z": FAILING, "bsdtar": BSDTAR}],
    ids=["unar", "the third that is tried"],
)
def test_whichever_tool_is_there_unpacks(archives, tools, tmp_path, capsys, programs):
    tools(**programs)
    folder = tmp_path / "data"
    assert prepare(archives, folder, f"--splits={archives[1]}") == 0
    assert capsys.readouterr().out.endswith(f"{folder / 'UCF-101'}: 101 classes, 13320 clips\n")
    assert sorted(path.name for path in folder.iterdir()) == ["UCF-101", "ucfTrainTestlist"]
    assert len(load_ucf101(folder / "UCF-101", split="test", fold=3)) == len(CLIPS[::3])
    # Nothing is unpacked twice.
    tools(**dict.fromkeys(programs, FAILING))
    assert prepare(archives, folder) == 0


def test_a_zip_needs_no_tool(archives, tools, tmp_path, capsys):
    archive = tmp_path / "UCF101.zip"
    shutil.copy(archives[0], archive)
    with zipfile.ZipFile(archive, "a") as content:
        content.writestr("__MACOSX/UCF-101/YoYo/._a.avi", "x")
    assert prepare((archive, None), tmp_path / "data") == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["UCF-101"]


@pytest.mark.parametrize("name", ["../UCF-101/a.avi", "/tmp/UCF-101/a.avi", "UCF-101/../../a.avi", "C:\\\\a.avi"])
def test_a_zip_that_names_places_outside_is_refused(tmp_path, capsys, name):
    archive = tmp_path / "UCF101.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr(name, "x")
    assert prepare((archive, None), tmp_path / "data") == 1
    assert "it names a place outside of itself" in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == []
    archive.write_bytes(b"PK")
    assert prepare((archive, None), tmp_path / "data") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "File is not a zip file" in error


LINKING = """#!/bin/sh
mkdir "$5/UCF-101"
ln -s /etc/passwd "$5/UCF-101/v_YoYo_g01_c01.avi"
"""
ENDLESS = """#!/bin/sh
mkdir "$5/UCF-101"
exec cat /dev/zero > "$5/UCF-101/a.avi"
"""


def test_what_no_archive_of_videos_holds(archives, tools, tmp_path, capsys, monkeypatch):
    linking, large = tmp_path / "links.zip", tmp_path / "large.zip"
    with zipfile.ZipFile(linking, "w") as content:
        link = zipfile.ZipInfo("UCF-101/YoYo/a.avi")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        content.writestr(link, "/etc/passwd")
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("UCF-101/YoYo/a.avi", bytes(2**20))
    monkeypatch.setattr(prepare_ucf101, "MAX_UNPACKED_BYTES", 2**20 - 1)
    monkeypatch.setattr(prepare_ucf101, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.defpath}")
    for archive, program, reason in (
        (linking, FAILING, "it holds a link, a pipe or a device, UCF-101/YoYo/a.avi"),
        (large, FAILING, "it unpacks to more than"),
        (archives[0], LINKING, "it holds a link, a pipe or a device, UCF-101/v_YoYo_g01_c01.avi"),
        (archives[0], ENDLESS, "it unpacks to more than"),
    ):
        tools(bsdtar=program)
        assert prepare((archive, None), tmp_path / "data") == 1
        assert reason in capsys.readouterr().err
        assert list((tmp_path / "data").iterdir()) == []
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "data/UCF-101").mkdir()
    assert prepare((archives[0], None), tmp_path / "data", f"--splits={tmp_path}/pipe.zip") == 1
    assert "it is no regular file" in capsys.readouterr().err


def test_no_tool_at_all(archives, tools, tmp_path, capsys):
    assert prepare(archives, tmp_path / "data") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "install one of unar, unrar, 7zz, 7z, bsdtar" in error
    assert not (tmp_path / "data").exists()


def test_no_tool_that_can(archives, tools, tmp_path, capsys):
    tools(unrar=FAILING, bsdtar=BSDTAR.replace("sys.argv[3]", "'/nowhere'"))
    assert prepare(archives, tmp_path / "data") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "(unrar: Cannot open the file as archive; bsdtar: FileNotFoundError" in error
    assert "install one of unar, 7zz, 7z" in error
    assert list((tmp_path / "data").iterdir()) == []


def test_missing_archives(archives, tmp_path, whole, capsys):
    assert prepare((tmp_path / "UCF101.rar", None), tmp_path / "data") == 1
    assert f"{tmp_path / 'UCF101.rar'} is not an existing file" in capsys.readouterr().err
    for file, reason in (
        (tmp_path / "none.zip", "No such file"),
        (archives[0], "lacks classInd.txt, trainlist01.txt"),
    ):
        assert prepare(archives, whole, f"--splits={file}") == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert reason in error


def test_what_is_missing_is_said(archives, whole, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "UCF-101/Archery")
    for clip in (folder / "UCF-101/YoYo").glob("*_g25_*"):
        clip.unlink()
    assert prepare(archives, folder) == 1
    (error,) = capsys.readouterr().err.splitlines()
    clips = UCF101_CLIPS - sum(clip.startswith("Archery/") or "YoYo_g25" in clip for clip in CLIPS)
    assert "1 of 101 classes are missing or empty (Archery)" in error
    assert "YoYo has 24 of 25 scenes" in error
    assert f"{clips} of 13320 clips are there" in error
    # The lists know the names.
    assert prepare(archives, folder, f"--splits={archives[1]}") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{UCF101_CLIPS - clips} of 13320 clips are missing (Archery/v_Archery_g01_c01.avi" in error
