"""The exact versions that CI installs: whole, within the ranges of the package, hashed, and none a pre-release."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, Version]:
    """The versions in a file, each of which has a hash."""
    lines = (REPOSITORY / "requirements" / f"{name}.txt").read_text().replace("\\\n", "").splitlines()
    found = {}
    for line in lines:
        if not line.startswith("#"):
            pin, *hashes = line.split()
            assert hashes, line
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", text) for text in hashes), line
            package, _, version = pin.partition("==")
            found[canonicalize_name(package)] = Version(version)
    return found


RUNTIME, TEST = pins("runtime"), pins("test")


@pytest.mark.parametrize(
    "requirements, pinned",
    [(PROJECT["dependencies"], RUNTIME), (PROJECT["optional-dependencies"]["test"], {**RUNTIME, **TEST})],
    ids=["runtime", "test"],
)
def test_what_the_package_asks_for_is_pinned_within_its_ranges(requirements, pinned):
    in_makefile = re.findall(r"torch==(\S+)", (REPOSITORY / "Makefile").read_text())
    versions = pinned | {"torch": Version(*in_makefile)}
    for requirement in map(Requirement, requirements):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_no_pin_is_a_pre_release_and_tools_stand_apart():
    assert [name for name, version in {**RUNTIME, **TEST}.items() if version.is_prerelease] == []
    assert RUNTIME.keys().isdisjoint(TEST)
    assert {"pytest", "mypy", "hatchling"} <= TEST.keys()
