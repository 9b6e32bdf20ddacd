"""Our specifications, and two of finetrainers' own, go through the conformance suite."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from framebridge_plugin import register
from framebridge_plugin.testing import SpecificationConformance
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


class TinyModel(SpecificationConformance):
    """The suite with a model that is made for it."""

    make_model: Any  # a partial, which is no method

    @pytest.fixture(scope="class", autouse=True)
    def tiny_model(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls = request.cls
        cls.model_folder = cls.make_model(tmp_path_factory.mktemp("model") / "tiny")


class TestCogVideoXBridge(TinyModel):
    specification_class = CogVideoXBridgeSpecification
    model_name = "cogvideox_bridge"
    make_model = partial(make_tiny_cogvideox, sample_size=SIZE)


class TestWanBridge(TinyModel):
    specification_class = WanBridgeSpecification
    model_name = "wan_bridge"
    make_model = partial(make_tiny_wan)
    clip_shape = (5, SIZE, SIZE)


class TestLTXBridge(TinyModel):
    """By its name alone: a folder and a line are enough."""

    specification_class = specification_of("ltx_bridge")
    model_name = "ltx_bridge"
    make_model = partial(make_tiny_ltx)
    clip_shape = (9, 64, 64)


class TestStockCogVideoX(TinyModel):
    specification_class = CogVideoXModelSpecification
    model_name = "cogvideox"
    # finetrainers' CogVideoX specification always pads captions to 226 tokens.
    make_model = partial(make_tiny_cogvideox, sample_size=SIZE, max_text_length=226)


class TestStockCogView4(TinyModel):
    """A model of images: the suite is not for videos alone."""

    specification_class = CogView4ModelSpecification
    model_name = "cogview4"
    make_model = partial(make_tiny_cogview4)
    clip_shape = (1, SIZE, SIZE)


class TestLatteBridge(TinyModel):
    specification_class = LatteBridgeSpecification
    model_name = "latte_bridge"
    make_model = partial(make_tiny_latte, size=SIZE)


class TestLatteBridgeOnNeuralPrior(TinyModel):
    specification_class = LatteBridgeSpecification
    model_name = "latte_bridge"
    make_model = partial(make_tiny_latte, size=SIZE, kind="bridge_neural_prior")


class FixedNeuralPrior(NeuralPriorSpecification):
    """Made without arguments, as finetrainers' own trainer tests make specifications."""

    folder: Path

    def __init__(self) -> None:
        super().__init__(str(self.folder))


class TestNeuralPrior(SpecificationConformance):
    specification_class = FixedNeuralPrior

    @pytest.fixture(scope="class", autouse=True)
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("model") / "tiny"
        FixedNeuralPrior.folder = make_tiny_latte(folder, "neural_prior", size=SIZE)
