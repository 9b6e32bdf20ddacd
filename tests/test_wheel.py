"""What is released: the wheel that `make wheel` builds, looked into, and the workflow that would publish it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import yaml

from framebridge_plugin import __version__

REPOSITORY = Path(__file__).parents[1]


def test_the_wheel_holds_package_recipes_and_command(tmp_path):
    (tmp_path / "installed").touch()  # this environment is the one to build in
    variables = (f"STAMP={tmp_path / 'installed'}", f"BIN={Path(sys.executable).parent}", f"DIST={tmp_path / 'dist'}")
    subprocess.run(["make", "wheel", *variables], cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"framebridge_plugin-{__version__}-py3-none-any.whl"
    assert f"pip install dist/{wheel.name}" in (REPOSITORY / "README.md").read_text()
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    recipes = {path.name for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert {path.name for path in (site / "framebridge_plugin/recipes").glob("*.yaml")} == recipes
    page = ("report.html", "report.css", "report.js")
    assert all((site / "framebridge_plugin/commands" / name).is_file() for name in page)
    entry_points = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "finetrainers = framebridge_plugin.__main__:main" in entry_points
    listed = subprocess.run(
        [sys.executable, "-m", "framebridge_plugin", "recipes"], cwd=site, capture_output=True, text=True, check=True
    )
    assert all(name.removesuffix(".yaml") in listed.stdout for name in recipes)


def test_the_workflow_builds_tests_and_publishes_a_tag_alone():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    triggers = workflow[True]  # YAML's reading of "on"
    assert triggers["push"]["tags"] == ["v*"]
    goals = set(re.findall(r"^(\w[\w-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    jobs, steps = workflow["jobs"], [step for job in workflow["jobs"].values() for step in job["steps"]]
    made = [step["run"].removeprefix("make ") for step in steps if step.get("run", "").startswith("make ")]
    assert made == ["test", "wheel"]
    assert goals >= set(made)
    actions = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", action) for action in actions)
    publish = jobs["publish"]
    assert publish["needs"] == "test"
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert not any("token" in str(step.get("with", "")) or "password" in str(step.get("with", "")) for step in steps)
