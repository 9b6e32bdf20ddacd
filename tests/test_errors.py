"""Names that others chose reach a terminal as text: they neither steer it nor forge a line."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import framebridge_plugin
from framebridge_plugin.cli import main
from framebridge_plugin.data import BadFilePolicy, BadFileTracker
from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.errors import FrameBridgeError, UsageError, escaped, masked

NAME = "a\x1b[2J\x9b\u202e\r\nerror: forged.mp4"
TOKEN = "hf_" + "secret" * 6
SHOWN = r"a\x1b[2J\x9b\u202e\r\nerror: forged.mp4"


def test_what_is_escaped():
    assert escaped(NAME) == escaped(SHOWN) == SHOWN
    assert escaped("\udce9\ud800\u2028\x7f\t") == r"\xe9\ud800\u2028\x7f\t"
    assert escaped("é 日本語\u3000\U0001f469\u200d\U0001f52c \\x") == "é 日本語\u3000\U0001f469\u200d\U0001f52c \\x"


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"{TOKEN}: no", "***: no"),
        ("/x/hf_experiment1/hf_datasets_of_a_name_that_is_very_long", None),
        ("http://me:pa55@host/x.png", "http://***@host/x.png"),
        ("http:/me:p@55@host/x.png", "http:/***@host/x.png"),  # as a path has it
        ("https://host/x?a=b@c&size=3&Expires=4&Key-Pair-Id=5", None),
        ("https://host/x?token=s3cr3t&n=1", "https://host/x?token=***&n=1"),
        ("https://host/x?n=1&X-Amz-Signature=ab12", "https://host/x?n=1&X-Amz-Signature=***"),
        (
            "https://host/x?X-Amz-Credential=a/b&api_key=c&sig=d e",
            "https://host/x?X-Amz-Credential=***&api_key=***&sig=*** e",
        ),
        ("me@host: monkey=2", None),
    ],
)
def test_what_is_masked(text, shown):
    assert masked(text) == (shown or text)


def test_lines_of_an_error_are_its_arguments():
    assert str(UsageError(f"{NAME}: wrong", "two")) == f"{SHOWN}: wrong\ntwo"
    for error in (FrameBridgeError(NAME, 2), ClipError(NAME, "is\nbad", "corrupt")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert SHOWN in str(error)


def test_a_command_line(capsys, tmp_path):
    assert main(["sample", "--model", str(tmp_path), "--prompt=x", "--image", NAME, f"--output={tmp_path}/x.mp4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"error: --image {SHOWN}: no such file" in lines
    address = "https://me:pa55word@host/x.png"
    assert (
        main(["sample", "--model", str(tmp_path), "--prompt=x", "--image", address, f"--output={tmp_path}/x.mp4"]) == 2
    )
    assert main(["train", "--recipe=latte_bridge", "--token=pa55word"]) == 2
    said = capsys.readouterr().err
    assert "unknown argument --token; see" in said
    assert "pa55word" not in said


def test_what_a_command_prints_is_escaped(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "a\x1b[2J.yaml"
    recipe.write_text("# \u202ea run\n")
    monkeypatch.setattr("framebridge_plugin.recipe.shipped_recipes", lambda: {recipe.stem: recipe})
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == "a\\x1b[2J  \\u202ea run\n"
    assert main(["convert", "--from=reference", NAME, "--to=x", "--debug"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert not [line for line in said.splitlines() if escaped(line) != line or line.startswith("error: forged")]


def test_one_module_alone_prints():
    package = Path(framebridge_plugin.__file__).parent
    found = [path.name for path in package.rglob("*.py") if re.search(r"(?<![\w.])print\(", path.read_text())]
    assert found == ["errors.py"]


def test_what_libraries_say_in_the_command_is_escaped_and_holds_no_token():
    code = (
        "import logging, sys, warnings\nfrom framebridge_plugin.cli import main\nassert main(['recipes']) == 0\n"
        "name = sys.argv[1]\nwarnings.warn(name)\nlogging.getLogger('library').warning('%s', name)\n"
        "logging.getLogger('finetrainers').error('Error during training: %s', name)\n"  # the command says it itself
        f"logging.getLogger('library').warning('https://me:pass@example.org {TOKEN} ' + '%d', 3)\n"
    )
    said = subprocess.run([sys.executable, "-c", code, NAME], capture_output=True, text=True, check=True).stderr
    warning, *logged = said.splitlines()
    assert warning.endswith(f": UserWarning: {SHOWN}")
    shown = SHOWN.replace("\\n", "\n").splitlines()  # what is logged keeps its lines
    assert logged == [*shown, "https://***@example.org *** 3"]


@pytest.mark.parametrize("layout", ["pairs", "classes"])
def test_a_check_of_data(tmp_path, capsys, caplog, layout):
    folder = tmp_path / "clips" / ("" if layout == "pairs" else NAME)
    folder.mkdir(parents=True)
    (folder / NAME).write_text("no video")
    (folder / NAME.replace("mp4", "txt")).write_text("\x1b[31ma caption")
    (folder / f".{NAME}").touch()
    key = "data_root" if layout == "pairs" else "class_root"
    sections = {
        "model": {"pretrained_model_name_or_path": str(tmp_path / "none")},
        "training": {"training_type": "full-finetune"},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
        "framebridge": {"data": {key: str(tmp_path / "clips"), "num_frames": 9, "height": 64, "width": 64}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    assert main(["data", "check", f"--recipe={tmp_path}/recipe.yaml", "--nproc=1"]) == 1
    printed = capsys.readouterr()
    shown = printed.out.splitlines() + printed.err.splitlines() + [record.getMessage() for record in caplog.records]
    assert any(f"such as {tmp_path}/clips" in line and SHOWN in line for line in shown)
    assert any("left out:" in line and f".{SHOWN}" in line for line in shown)
    assert not [line for line in shown if escaped(line) != line or line.startswith("error: forged")]
    assert json.loads((tmp_path / "run/data_check.jsonl").read_text())["path"] == str(folder / NAME)


def test_the_account_of_a_run(tmp_path, caplog):
    tracker = BadFileTracker(BadFilePolicy(policy="raise"), tmp_path)
    bad_file = {"path": f"/{NAME}", "kind": "corrupt", "reason": "\x1b[0mbad"}
    with pytest.raises(FrameBridgeError) as caught:
        list(tracker.watch([{"skipped": [bad_file]}]))
    assert rf"  /{SHOWN}: corrupt: \x1b[0mbad" in str(caught.value).splitlines()
    assert [record.getMessage() for record in caplog.records] == [
        rf"cannot read the clip /{SHOWN}: corrupt: \x1b[0mbad"
    ]
