"""The report of `finetrainers doctor`, and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from framebridge_plugin.commands.doctor import run_doctor

CODE = "from framebridge_plugin.commands.doctor import run_doctor; raise SystemExit(run_doctor())"


def test_a_healthy_installation_is_reported_whole(capsys):
    assert run_doctor() == 0
    report = capsys.readouterr().out
    for title in ("Versions", "Devices", "Decoders", "Repairs of finetrainers"):
        assert title in report
    for line in ("finetrainers 0.2.0", "cpu with", "av ", "decord "):
        assert f"\n  {line}" in report
    assert "active      missing modules: supplies" in report
    assert "prevent training" not in report


@pytest.mark.parametrize("packages", [("torch",), ("decord", "finetrainers")])
def test_a_broken_package_is_named_with_a_remedy(packages: tuple[str, ...], tmp_path: Path):
    for package in packages:
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('lib{package}.so:\\ncannot open')\n")
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    problems = result.stdout.split("Problems that prevent training\n")[1].splitlines()
    for package in packages:
        assert any(package in line and ("install" in line or "doctor" in line) for line in problems), problems
        assert f"lib{package}.so: cannot open" in result.stdout
