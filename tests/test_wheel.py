"""What `pip install framebridge-plugin` brings: the wheel, built and looked into."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_wheel_holds_package_recipes_and_command(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, REPOSITORY], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("framebridge_plugin-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    recipes = {path.name for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert {path.name for path in (site / "framebridge_plugin/recipes").glob("*.yaml")} == recipes
    entry_points = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "finetrainers = framebridge_plugin.cli:main" in entry_points
    listed = subprocess.run(
        [sys.executable, "-m", "framebridge_plugin", "recipes"], cwd=site, capture_output=True, text=True, check=True
    )
    assert all(name.removesuffix(".yaml") in listed.stdout for name in recipes)
