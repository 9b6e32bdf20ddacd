"""`finetrainers data check` reads everything, says what is broken, and goes on after Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from framebridge_plugin.cli import main
from framebridge_plugin.commands.data_check import check_data
from framebridge_plugin.errors import FrameBridgeError
from tests.data_layer.broken_files import CLIP, KINDS, write_corpus
from tests.data_layer.numbered_videos import HEIGHT, WIDTH


def write_data(folder: Path, kinds: Iterable[str] = KINDS) -> dict[str, Path]:
    paths = write_corpus(folder, kinds)
    write_table(folder, paths)
    return paths


def write_table(folder: Path, paths: dict[str, Path]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = [[path.name, name] for name, path in paths.items()]
        csv.writer(file).writerows([["file_name", "caption"], *rows])


def content(folder: Path, **clip) -> dict:
    entry = {"data_root": str(folder), "video_resolution_buckets": [[CLIP.num_frames, HEIGHT, WIDTH]]}
    return {"datasets": [entry | {"frame_stride": CLIP.frame_stride, "window": "start", **clip}]}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe whose model is not there."""
    data = {"data_root": str(tmp_path / "clips"), "num_frames": 9, "height": 64, "width": 64, "frame_stride": 2}
    sections = {
        "model": {"pretrained_model_name_or_path": str(tmp_path / "no model")},
        "training": {"training_type": "full-finetune"},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
        "framebridge": {"data": data},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_the_table_and_the_list(recipe, tmp_path, capsys):
    paths = write_data(tmp_path / "clips")
    # The list is in the order of the data, whatever the number of processes.
    short = {"just enough frames": "too_short"}
    expected = {str(path): fault for name, path in paths.items() if (fault := KINDS[name].fault or short.get(name))}
    for nproc in ("1", "2"):
        assert main(["data", "check", f"--recipe={recipe}", "--nproc", nproc]) == 1
        found = lines(tmp_path / "run/data_check.jsonl")
        assert {entry["path"]: entry["kind"] for entry in found} == expected
        assert [entry["path"] for entry in found] == list(expected)
        assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["data_check.jsonl"]
        note, first, *table, last = capsys.readouterr().out.splitlines()
        total, bad = len(KINDS), len(expected)
        missing = paths["missing"].name
        assert note == f"{tmp_path / 'clips'}: 1 of {total} listed clips are missing, first {missing!r}: bad files"
        assert first == f"{total} clips: {total - bad} can be read, {bad} cannot"
        counts = {line.split()[0]: int(line.split()[1]) for line in table}
        faults = list(expected.values())
        assert counts == {kind: faults.count(kind) for kind in faults}
        assert sum(line.endswith(f"such as {paths['empty']}: the file is empty") for line in table) == 1
        assert last == f"all of them: {tmp_path / 'run/data_check.jsonl'}"


def test_a_sound_corpus(recipe, tmp_path, capsys):
    write_data(tmp_path / "clips", ["whole", "rotated", "odd size"])
    output = tmp_path / "somewhere/list.jsonl"
    overrides = ("framebridge.data.frame_stride=1", "--nproc=2", "framebridge.data.num_frames=17")
    assert main(["data", "check", f"--recipe={recipe}", f"--output={output}", *overrides]) == 0
    assert capsys.readouterr().out == "3 clips: 3 can be read, 0 cannot\n"
    assert output.read_text() == ""


def test_data_that_is_not_there_is_refused_in_one_line(recipe, capsys):
    assert main(["data", "check", f"--recipe={recipe}"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "framebridge.data.data_root: no such folder" in error


def test_what_a_clip_does_not_touch_is_found_by_a_full_check(tmp_path, capsys):
    paths = write_data(tmp_path / "clips", ["whole", "flipped bytes at the end"])
    data, output = content(tmp_path / "clips", strict=True), tmp_path / "list.jsonl"
    assert check_data(data, output, nproc=1) == 0
    assert check_data(data, output, nproc=1, full=True) == 1
    assert [entry["path"] for entry in lines(output)] == [str(paths["flipped bytes at the end"])]
    # A random window may reach the end: the last one does.
    assert check_data(content(tmp_path / "clips", strict=True, window="random"), output, nproc=1) == 1


def test_a_decoder_that_crashes_is_a_finding(tmp_path, monkeypatch, capsys):
    (tmp_path / "decord.py").write_text("import os\ndef VideoReader(*arguments, **options): os.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    # Imported afresh here, and the true one again after the test.
    monkeypatch.setitem(sys.modules, "decord", None)
    del sys.modules["decord"]
    paths = write_data(tmp_path / "clips", ["whole", "empty", "variable frame rate"])
    assert check_data(content(tmp_path / "clips", decoder="decord"), tmp_path / "list.jsonl", nproc=2) == 1
    found = {entry["path"]: entry["kind"] for entry in lines(tmp_path / "list.jsonl")}
    assert found == {
        str(paths["whole"]): "crashed",
        str(paths["empty"]): "empty",
        str(paths["variable frame rate"]): "crashed",
    }


def test_a_result_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    write_data(tmp_path / "clips", ["whole"])
    (tmp_path / "file").touch()
    with pytest.raises(FrameBridgeError, match=f"^cannot write {tmp_path / 'file'}"):
        check_data(content(tmp_path / "clips"), tmp_path / "file/list.jsonl", nproc=1)


def test_ctrl_c_and_a_second_run_that_goes_on(recipe, tmp_path, capsys):
    # Many names for a few files.
    folder = tmp_path / "clips"
    files = write_corpus(folder, ["whole", "text", "rotated"])
    paths = {}
    for number in range(300):
        name = ("whole", "rotated", "whole", "text", "whole")[number % 5]
        paths[str(number)] = folder / f"{number:04}.mp4"
        os.link(files[name], paths[str(number)])
    write_table(folder, paths)
    bad = [str(path) for number, path in enumerate(paths.values()) if number % 5 == 3]
    arguments = ["data", "check", f"--recipe={recipe}", "--nproc=2"]
    output, progress = tmp_path / "run/data_check.jsonl", tmp_path / "run/data_check.jsonl.progress"

    # A terminal sends Ctrl-C to the whole group.
    command = [sys.executable, "-m", "framebridge_plugin", *arguments]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background hands on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not progress.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    done = json.loads(progress.read_text())["done"]
    assert 0 < done < 300
    assert errors.splitlines()[-2:] == [
        f"{done} of 300 clips are checked; the same command goes on",
        "interrupted",
    ]
    assert "Traceback" not in errors
    assert [entry["path"] for entry in lines(output)] == bad[: (done + 1) // 5]

    # What a kill leaves after the last note of the progress is done again.
    with output.open("a") as file:
        file.write('{"path": "/half a li')
    kept = {path: path.read_bytes() for path in (output, progress)}
    assert main(arguments) == 1
    assert f"going on after {done} of 300 clips" in capsys.readouterr().err
    assert [entry["path"] for entry in lines(output)] == bad
    assert not progress.exists()

    # Another question is not answered by what is there.
    for path, former in kept.items():
        path.write_bytes(former)
    os.truncate(folder / "metadata.csv", (folder / "metadata.csv").read_bytes().index(b"0020.mp4"))
    assert main(arguments) == 1
    assert "going on" not in capsys.readouterr().err
    assert [entry["path"] for entry in lines(output)] == bad[:4]
