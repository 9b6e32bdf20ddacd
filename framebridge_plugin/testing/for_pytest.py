"""The suite as a class of pytest tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from framebridge_plugin.errors import print_lines
from framebridge_plugin.testing.known_faults import known_faults_of
from framebridge_plugin.testing.outcome import Check, KnownFault, run_check
from framebridge_plugin.testing.subject import Subject
from framebridge_plugin.testing.suite import CHECKS


class SpecificationConformance:
    """Puts a finetrainers ModelSpecification through the conformance suite, one test for each check.

    Subclass it as `Test...` and set `specification_class`, and `model_folder` if the class does not know the folder
    of its model itself; or override `make_specification`. A folder that a fixture makes can be set by a fixture:
    `@pytest.fixture(scope="class", autouse=True)` that assigns `request.cls.model_folder`.

    A known fault is an expected failure, with its reason. One that does not show any more fails: take it out.
    """

    specification_class: type | None = None
    """The class under test."""

    model_folder: str | Path | None = None
    """What it is given as `pretrained_model_name_or_path`; if None, it is made without arguments."""

    model_name: str | None = None
    """The name under which finetrainers knows the model, if it has one."""

    clip_shape: tuple[int, int, int] | None = None
    """(frames, height, width) of the clips; see `Subject`."""

    captions: Sequence[str] | None = None
    """Captions of the clips; see `Subject`."""

    target_modules: Sequence[str] | None = None
    """Names of the layers that LoRA adapts; see `Subject`."""

    known_faults: Mapping[str, KnownFault] | None = None
    """Expected failures by name of the check; None takes those of `KNOWN_FAULTS`."""

    def make_specification(self) -> Any:
        """Makes the specification, anew at every call and always alike."""
        assert self.specification_class is not None, "set specification_class, or override make_specification"
        if self.model_folder is None:
            return self.specification_class()
        return self.specification_class(pretrained_model_name_or_path=str(self.model_folder))

    @pytest.fixture(scope="class")
    def subject(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
        """The specification and the clips that all checks share."""
        return Subject(
            self.make_specification,
            tmp_path_factory.mktemp("conformance"),
            name=request.node.name,
            model_name=self.model_name,
            clip_shape=self.clip_shape,
            captions=self.captions,
            target_modules=self.target_modules,
        )

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_conformance(self, check: Check, subject: Subject) -> None:
        """One check of the suite."""
        faults = self.known_faults
        result = run_check(check, subject, known_faults_of(subject.specification_class) if faults is None else faults)
        if result.status == "known":
            pytest.xfail(result.message)
        if result.status != "ok":
            print_lines(result.traceback)
            pytest.fail(result.message, pytrace=False)
