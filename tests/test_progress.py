"""How far something has come, in a terminal and without one."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import termios

import pytest
from tqdm.auto import tqdm

from framebridge_plugin import progress
from framebridge_plugin.progress import Progress, alone


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def test_without_a_terminal_there_is_a_line_every_30_seconds_and_one_at_the_end(clock, capsys):
    with Progress(100, "Training", unit="update", initial=10) as bar:
        for second in range(1, 76):
            clock[0] = second
            bar.set_postfix(loss=f"{second:.4f}")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" [")[0] for line in lines] == [
        "Training: 40 %, 40 of 100",
        "Training: 70 %, 70 of 100",
        "Training: 85 %, 85 of 100",
    ]
    assert lines[0].endswith(",  1.00update/s, loss=30.0000]")


def test_one_inside_another_says_only_what_takes_long(clock, capsys):
    with Progress(2, "Training") as training:
        for _ in range(2):
            with Progress(40, "Validation") as validation:
                for _ in range(40):
                    clock[0] += 1
                    validation.update()
            training.update()
    starts = [line.partition(" [")[0] for line in capsys.readouterr().err.splitlines()]
    assert starts == [
        "Validation: 75 %, 30 of 40",
        "Training: 50 %, 1 of 2",
        "Validation: 75 %, 30 of 40",
        "Training: 100 %, 2 of 2",
    ]


def test_what_comes_before_the_first_step_does_not_count(clock, capsys):
    with Progress(3, "Training", unit="update") as training:
        with Progress(600, "Encoding") as encoding:
            clock[0] = 300
            encoding.update(300)
            with Progress(1, "Reading"):
                clock[0] = 500
            clock[0] = 600
            encoding.update(300)
        for _ in range(2):
            clock[0] += 40
            training.update()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "Training: 67 %, 2 of 3 [01:20<00:40, 40.00s/update]"


def test_libraries_draw_no_bars_without_a_terminal(capsys):
    with alone():
        for _ in tqdm(range(3), desc="Loading weights"):
            pass
    assert capsys.readouterr().err == ""
    for _ in tqdm(range(3), desc="Loading weights"):
        pass
    assert "Loading weights" in capsys.readouterr().err


NESTED = """
from tqdm.auto import tqdm
from framebridge_plugin.progress import Progress, alone
with alone():
    for _ in tqdm(range(2), desc="Before"):
        pass
    with Progress(3, "Training") as training:
        for _ in tqdm(range(2), desc="Loading weights"):
            pass
        with Progress(2, "Validation", leave=False) as validation:
            validation.update(2)
        training.update(3)
"""


def test_in_a_terminal_one_bar_is_shown_at_a_time():
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (40, 120))
    subprocess.run([sys.executable, "-c", NESTED], stderr=writer, check=True)
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # which is how its end reads
        while part := os.read(reader, 4096):
            shown += part
    os.close(reader)
    text = shown.decode()
    assert "Before: 100%" in text
    assert "Validation:" in text
    assert "Training: 100%" in text
    assert "Loading weights" not in text
    assert "\x1b[A" not in text  # no line above another
    assert text.count("\n") == 2  # what stays: Before and Training
