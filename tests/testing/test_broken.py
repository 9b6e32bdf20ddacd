"""Every check of the suite can fail, and says in one line what is wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from framebridge_plugin.testing import CHECKS, Check, KnownFault, Subject, run_check
from tests.testing.broken import CASES, NoSpecification, Whole, WithoutForward
from tests.tiny_models import make_tiny_latte

RUNS = "run-{lora,full}-{accelerate,ptd}[-precomputed]"
OF_ANOTHER_KIND = KnownFault("it is older than finetrainers", "is no subclass")


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> None:
    Whole.folder = make_tiny_latte(tmp_path_factory.mktemp("model") / "tiny", size=32)


@pytest.mark.parametrize(("check", "message", "broken"), CASES, ids=[f"{c}-{cls.__name__}" for c, _, cls in CASES])
def test_a_broken_specification_fails(tmp_path, check, message, broken):
    result = run_check(CHECKS[check], Subject(broken, tmp_path), {})
    assert result.status == "FAILED"
    assert result.message.startswith(f"{check}: {broken.__name__}: ")
    assert "\n" not in result.message
    assert re.search(message, result.message), result.message


def test_a_check_leaves_its_process_as_it_was(tmp_path, monkeypatch, capsys):
    seen = []

    def look(subject: Subject) -> None:
        seen.append(os.environ.get("WORLD_SIZE"))
        print("noise")
        torch.rand(1)
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)

    monkeypatch.setenv("WORLD_SIZE", "2")  # finetrainers would wait for the other process
    state = torch.get_rng_state()
    assert run_check(Check("look", look), Subject(Whole, tmp_path), {}).status == "ok"
    assert seen == [None]
    assert os.environ["WORLD_SIZE"] == "2"
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.distributed.is_initialized()
    assert capsys.readouterr() == ("", "")


def test_every_check_has_a_specification_that_fails_it():
    assert {check for check, _, _ in CASES} == set(CHECKS)


def test_the_documentation_lists_every_check():
    text = (Path(__file__).parents[2] / "docs/conformance.md").read_text()
    listed = re.findall(r"^\| `(\S+)` \|", text, flags=re.MULTILINE)
    assert listed == [*(name for name in CHECKS if not name.startswith("run-")), RUNS]


def test_a_known_fault_is_reported_with_its_reason(tmp_path):
    result = run_check(CHECKS["interface"], Subject(NoSpecification, tmp_path), {"interface": OF_ANOTHER_KIND})
    assert (result.status, result.message) == ("known", "known: it is older than finetrainers")


def test_another_failure_is_not_the_known_fault(tmp_path):
    result = run_check(CHECKS["interface"], Subject(WithoutForward, tmp_path), {"interface": OF_ANOTHER_KIND})
    assert result.status == "FAILED"


def test_a_known_fault_that_is_gone_is_reported(tmp_path):
    result = run_check(CHECKS["interface"], Subject(Whole, tmp_path), {"interface": OF_ANOTHER_KIND})
    assert result.status == "repaired"
    assert result.message == "interface: Whole: passes, although this fault is known: it is older than finetrainers"
