"""Several processes of one command."""

from __future__ import annotations

import pytest

from framebridge_plugin.commands.launching import launch
from framebridge_plugin.errors import FrameBridgeError


def test_they_end_well(capfd):
    assert launch(["recipes"], 2) == 0
    output = capfd.readouterr().out  # lines of the two may run into each other
    assert output.count("quickstart ") == 2


def test_the_exit_code_is_that_of_the_first_failure(capfd):
    assert launch(["train", "--nonsense"], 2) == 2
    assert "error:" in capfd.readouterr().err


def test_a_killed_process_is_told_from_one_that_failed(monkeypatch, tmp_path):
    # Python runs this file before anything else.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FrameBridgeError, match="process 1 of 2 was killed by signal 9"):
        launch(["recipes"], 2)
