"""The layering rule: a layer imports only from rows below it, and so works without the packages of the rows above."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "framebridge_plugin"
HEAVY = ("torch", "finetrainers", "diffusers", "transformers", "datasets", "av", "numpy", "pydantic")
COMMANDS = ("framebridge_plugin.cli", "framebridge_plugin.commands")
UPPER = ("framebridge_plugin.training", "framebridge_plugin.testing", "framebridge_plugin.recipe", *COMMANDS)

# What a layer must do without, from the lowest to the highest.
FORBIDDEN = {
    "settings": (
        *("torch", "finetrainers", "diffusers", "transformers", "datasets", "av"),
        *("framebridge_plugin.data", "framebridge_plugin.backbones", *UPPER),
    ),
    "bridge": (
        *("finetrainers", "diffusers", "transformers", "accelerate", "peft", "datasets", "av", "wandb"),
        *("framebridge_plugin.schedulers", "framebridge_plugin.backbones", "framebridge_plugin.models"),
        *("framebridge_plugin.data", *UPPER),
    ),
    "schedulers": (
        *("finetrainers", "datasets", "av", "decord", "wandb"),
        *("framebridge_plugin.backbones", "framebridge_plugin.models", "framebridge_plugin.data", *UPPER),
    ),
    "models backbones": ("finetrainers", "datasets", "av", "decord", "wandb", "framebridge_plugin.data", *UPPER),
    "data": (
        *("finetrainers", "diffusers", "transformers", "accelerate", "peft", "decord", "wandb"),
        *("framebridge_plugin.backbones", "framebridge_plugin.models", "framebridge_plugin.schedulers", *UPPER),
    ),
    "recipe": (
        *("torch", "finetrainers", "diffusers", "transformers", "accelerate", "peft", "datasets", "wandb"),
        *("framebridge_plugin.training", "framebridge_plugin.testing", *COMMANDS),
    ),
    "training": ("framebridge_plugin.testing", *COMMANDS),
    "testing": COMMANDS,
}

ABOVE = ("training", "testing")
"""Layers that may import finetrainers."""
REGISTER = {True: "from framebridge_plugin import register; register()\n", False: ""}

BLOCK = """
import importlib, sys
for name in {forbidden!r}:
    sys.modules[name] = None  # an import of it now fails
"""


def run_blocked(forbidden: tuple[str, ...], program: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BLOCK.format(forbidden=forbidden) + program], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("layers", FORBIDDEN)
def test_a_layer_imports_only_from_below(layers):
    modules = []
    for layer in layers.split():
        files = sorted((PACKAGE / layer).rglob("*.py"))
        assert len(files) > 1
        paths = [file.relative_to(PACKAGE.parent).with_suffix("") for file in files]
        modules += [".".join(path.parts).removesuffix(".__init__") for path in paths]
    run_blocked(FORBIDDEN[layers], f"{REGISTER[layers in ABOVE]}for name in {modules}: importlib.import_module(name)")


def test_the_package_and_its_help_need_no_heavy_import():
    program = """
import framebridge_plugin
from framebridge_plugin import cli
assert framebridge_plugin.__version__
try:
    cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0
"""
    run_blocked(HEAVY, program)


def test_public_names():
    import framebridge_plugin
    from framebridge_plugin import bridge, training

    assert {"FrameBridgeCogVideoXPipeline", "FrameBridgeScheduler", "register"} <= set(framebridge_plugin.__all__)
    for name in framebridge_plugin.__all__:
        assert getattr(framebridge_plugin, name) is not None
    assert bridge.BridgeSchedule().a.shape == (1000,)
    assert training.CogVideoXBridgeSpecification.__name__ == "CogVideoXBridgeSpecification"
    assert training.FrameBridgeTrainer.__name__ == "FrameBridgeTrainer"
