"""Our specifications, and two of finetrainers' own, go through the conformance suite."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from framebridge_plugin import register
from framebridge_plugin.testing import CHECKS, Check, SpecificationConformance, Subject
from framebridge_plugin.training import (
    CogVideoXBridgeSpecification,
    LatteBridgeSpecification,
    NeuralPriorSpecification,
    WanBridgeSpecification,
)
from framebridge_plugin.training.specifications import specification_of
from tests.testing.tiny_cogview4 import make_tiny_cogview4
from tests.tiny_ltx import make_tiny_ltx
from tests.tiny_models import make_tiny_cogvideox, make_tiny_latte
from tests.tiny_wan import make_tiny_wan

register()

from finetrainers.models.cogvideox import CogVideoXModelSpecification  # noqa: E402
from finetrainers.models.cogview4 import CogView4ModelSpecification  # noqa: E402

SIZE = 32
# Of the eight kinds of runs most specifications make four, in which every two of their three choices meet, and the
# next one makes the others.
RUNS = (
    ("run-lora-accelerate", "run-lora-ptd-precomputed", "run-full-accelerate-precomputed", "run-full-ptd"),
    ("run-lora-accelerate-precomputed", "run-lora-ptd", "run-full-accelerate", "run-full-ptd-precomputed"),
)


def some(runs: tuple[str, ...]) -> Any:
    """The suite with these runs alone."""
    checks = {name: check for name, check in CHECKS.items() if name in runs or not name.startswith("run-")}

    class SomeRuns(SpecificationConformance):
        @pytest.mark.parametrize("check", checks.values(), ids=checks)
        def test_conformance(self, check: Check, subject: Subject) -> None:
            super().test_conformance(check, subject)

    return SomeRuns


def test_all_runs_are_made():
    assert sorted(itertools.chain(*RUNS)) == sorted(name for name in CHECKS if name.startswith("run-"))


class TinyModel:
    """A model that is made for the suite."""

    make_model: Any  # a partial, which is no method

    @pytest.fixture(scope="class", autouse=True)
    def tiny_model(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls = request.cls
        cls.model_folder = cls.make_model(tmp_path_factory.mktemp("model") / "tiny")


class TestCogVideoXBridge(TinyModel, some(RUNS[0])):
    specification_class = CogVideoXBridgeSpecification
    model_name = "cogvideox_bridge"
    make_model = partial(make_tiny_cogvideox, sample_size=SIZE)


class TestWanBridge(TinyModel, some(RUNS[1])):
    specification_class = WanBridgeSpecification
    model_name = "wan_bridge"
    make_model = partial(make_tiny_wan)
    clip_shape = (5, SIZE, SIZE)


class TestLTXBridge(TinyModel, some(RUNS[0])):
    """By its name alone: a folder and a line are enough."""

    specification_class = specification_of("ltx_bridge")
    model_name = "ltx_bridge"
    make_model = partial(make_tiny_ltx)
    clip_shape = (9, 64, 64)


class TestStockCogVideoX(TinyModel, some(RUNS[1])):
    specification_class = CogVideoXModelSpecification
    model_name = "cogvideox"
    # finetrainers' CogVideoX specification always pads captions to 226 tokens.
    make_model = partial(make_tiny_cogvideox, sample_size=SIZE, max_text_length=226)


class TestStockCogView4(TinyModel, some(RUNS[0])):
    """A model of images: the suite is not for videos alone."""

    specification_class = CogView4ModelSpecification
    model_name = "cogview4"
    make_model = partial(make_tiny_cogview4)
    clip_shape = (1, SIZE, SIZE)


class TestLatteBridge(TinyModel, some(RUNS[1])):
    specification_class = LatteBridgeSpecification
    model_name = "latte_bridge"
    make_model = partial(make_tiny_latte, size=SIZE)


class TestLatteBridgeOnNeuralPrior(TinyModel, some(RUNS[0])):
    specification_class = LatteBridgeSpecification
    model_name = "latte_bridge"
    make_model = partial(make_tiny_latte, size=SIZE, kind="bridge_neural_prior")


class FixedNeuralPrior(NeuralPriorSpecification):
    """Made without arguments, as finetrainers' own trainer tests make specifications."""

    folder: Path

    def __init__(self) -> None:
        super().__init__(str(self.folder))


class TestNeuralPrior(SpecificationConformance):
    """As somebody else would write it: all checks."""

    specification_class = FixedNeuralPrior

    @pytest.fixture(scope="class", autouse=True)
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("model") / "tiny"
        FixedNeuralPrior.folder = make_tiny_latte(folder, "neural_prior", size=SIZE)
