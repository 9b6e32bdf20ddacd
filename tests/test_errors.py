"""Names that others chose reach a terminal as text: they neither steer it nor forge a line."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import yaml

from framebridge_plugin.cli import main
from framebridge_plugin.data import BadFilePolicy, BadFileTracker
from framebridge_plugin.data.decoding.errors import ClipError
from framebridge_plugin.errors import FrameBridgeError, UsageError, escaped

NAME = "a\x1b[2J\x9b\u202e\r\nerror: forged.mp4"
SHOWN = r"a\x1b[2J\x9b\u202e\r\nerror: forged.mp4"


def test_what_is_escaped():
    assert escaped(NAME) == escaped(SHOWN) == SHOWN
    assert escaped("\udce9\ud800\u2028\x7f\t") == r"\xe9\ud800\u2028\x7f\t"
    assert escaped("é 日本語\u3000\U0001f469\u200d\U0001f52c \\x") == "é 日本語\u3000\U0001f469\u200d\U0001f52c \\x"


def test_lines_of_an_error_are_its_arguments():
    assert str(UsageError(f"{NAME}: wrong", "two")) == f"{SHOWN}: wrong\ntwo"
    for error in (FrameBridgeError(NAME, 2), ClipError(NAME, "is\nbad", "corrupt")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert SHOWN in str(error)


def test_a_command_line(capsys, tmp_path):
    assert main(["sample", "--model", str(tmp_path), "--prompt=x", "--image", NAME, f"--output={tmp_path}/x.mp4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"error: --image {SHOWN}: no such file" in lines


def test_what_libraries_say_in_the_command_is_escaped_and_holds_no_token():
    code = (
        "import logging, sys, warnings\nfrom framebridge_plugin.cli import main\nassert main(['recipes']) == 0\n"
        "name = sys.argv[1]\nwarnings.warn(name)\nlogging.getLogger('library').warning('%s', name)\n"
        "logging.getLogger('finetrainers').error('Error during training: %s', name)\n"  # the command says it itself
        "logging.getLogger('library').warning('https://me:pass@example.org hf_secretsecret ' + '%d', 3)\n"
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
