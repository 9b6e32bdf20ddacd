"""The layering rule: a layer imports only from rows below it, and so works without the packages of the rows above.

And one folder alone changes what finetrainers is.
"""

from __future__ import annotations

import ast
import re
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
        *("framebridge_plugin.bridge", "framebridge_plugin.schedulers", "framebridge_plugin.models"),
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
    "models": (
        *("finetrainers", "datasets", "av", "decord", "wandb"),
        *("framebridge_plugin.backbones", "framebridge_plugin.data", *UPPER),
    ),
    "backbones": ("finetrainers", "datasets", "av", "decord", "wandb", "framebridge_plugin.data", *UPPER),
    "data": (
        *("finetrainers", "diffusers", "transformers", "accelerate", "peft", "decord", "wandb"),
        *("framebridge_plugin.backbones", "framebridge_plugin.models", "framebridge_plugin.schedulers", *UPPER),
    ),
    "evaluation": ("finetrainers", *UPPER),
    "recipe": (
        *("torch", "finetrainers", "diffusers", "transformers", "accelerate", "peft", "datasets", "wandb"),
        *("framebridge_plugin.training", "framebridge_plugin.testing", *COMMANDS),
    ),
    "training": ("framebridge_plugin.testing", *COMMANDS),
    "testing": COMMANDS,
}

ABOVE = ("training", "testing")
"""Layers that may import finetrainers."""
CHAINS = (
    ("settings", "bridge", "schedulers", "models", "backbones", "evaluation"),
    ("data", "training", "testing"),
    ("recipe",),
)
"""Layers that one process imports, in this order: what a later one must do without, no earlier one may have either."""

BLOCK = """
import importlib, sys
for name in {forbidden!r}:
    sys.modules[name] = None  # an import of it now fails
"""
CHAIN = """
import importlib, sys
blocked = ()
for layers, forbidden, modules in {chain!r}:
    for name in blocked:
        del sys.modules[name]
    for name in (blocked := forbidden):
        assert name not in sys.modules, f"{{name}} was imported below {{layers}}"
        sys.modules[name] = None  # an import of it now fails
    if layers in {above!r}:
        from framebridge_plugin import register
        register()
    for name in modules:
        importlib.import_module(name)
"""


def run(program: str) -> None:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def run_blocked(forbidden: tuple[str, ...], program: str) -> None:
    run(BLOCK.format(forbidden=forbidden) + program)


def modules_of(layers: str) -> list[str]:
    modules = []
    for layer in layers.split():
        files = sorted((PACKAGE / layer).rglob("*.py"))
        assert len(files) > 1
        paths = [file.relative_to(PACKAGE.parent).with_suffix("") for file in files]
        modules += [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return modules


@pytest.mark.parametrize("chain", CHAINS, ids=" ".join)
def test_a_layer_imports_only_from_below(chain):
    run(CHAIN.format(chain=[(layers, FORBIDDEN[layers], modules_of(layers)) for layers in chain], above=ABOVE))


def test_every_layer_is_in_a_chain():
    assert sorted(layers for chain in CHAINS for layers in chain) == sorted(FORBIDDEN)


def test_the_facts_of_backbones_need_the_standard_library_alone():
    files = [PACKAGE / "backbones/facts.py", *(PACKAGE / "backbones").glob("*/facts.py")]
    assert len(files) > 3
    modules = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    run_blocked((*HEAVY, "yaml", "PIL"), f"import importlib\nfor name in {modules}: importlib.import_module(name)")


def test_the_small_modules_need_no_layer():
    modules = [
        f"framebridge_plugin.{file.stem}" for file in PACKAGE.glob("*.py") if file.stem not in ("__main__", "cli")
    ]
    layers = [f"framebridge_plugin.{file.parent.name}" for file in PACKAGE.glob("*/__init__.py")]
    assert len(modules) > 5
    assert "framebridge_plugin.settings" in layers
    run_blocked(("finetrainers", *layers), f"import importlib\nfor name in {modules}: importlib.import_module(name)")


def patched(source: str) -> list[str]:
    """Where a program changes a module or a class of finetrainers that it has imported."""
    nodes = list(ast.walk(ast.parse(source)))
    theirs = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = str(node.module if isinstance(node, ast.ImportFrom) else alias.name)
                if module.partition(".")[0] == "finetrainers":
                    theirs.add((alias.asname or alias.name).partition(".")[0])
    changed = []
    for node in nodes:
        targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
        changed += [target for target in targets if isinstance(target, ast.Attribute | ast.Subscript)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            changed.append(node.args[0])
    return [text for node in changed if re.split(r"\W", text := ast.unparse(node))[0] in theirs]


def test_one_folder_alone_patches_finetrainers():
    programs = (
        "import finetrainers\nfinetrainers.utils.f = None",
        "from finetrainers.config import TABLE as table\ntable['x'] = 1",
        "def f():\n    from finetrainers import SFTTrainer\n    setattr(SFTTrainer, 'run', None)",
    )
    assert all(len(patched(program)) == 1 for program in programs)
    folder = PACKAGE / "training/finetrainers"
    files = [file for file in PACKAGE.rglob("*.py") if folder not in file.parents]
    found = {str(file.relative_to(PACKAGE)): lines for file in files if (lines := patched(file.read_text()))}
    assert not found


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
    assert {"CogVideoXBridgeSpecification", "FrameBridgeTrainer"} <= set(training.__all__)
    for name in training.__all__:
        assert getattr(training, name).__name__ == name
