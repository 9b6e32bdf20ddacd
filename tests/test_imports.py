"""Imports that cost less: deferred packages, in processes of their own, since an import happens once in each."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    (folder / "wandb").mkdir()
    (folder / "wandb/__init__.py").write_text(
        "print('loaded')\n__version__ = '1'\nfrom wandb.part import name\nfrom wandb import part\n"
    )
    (folder / "wandb/part.py").write_text("import wandb\nname = wandb.__name__\n")
    return f"import sys; sys.path.insert(0, {str(folder)!r}); import framebridge_plugin\n"


def test_it_is_loaded_when_it_is_asked_for(package):
    code = "import inspect, wandb; inspect.getmodule(inspect); print('later'); wandb.name; wandb.part"
    result = run(package + code)
    assert result.stdout.split() == ["later", "loaded"], result.stderr


@pytest.mark.parametrize("use", ["import wandb.part", "import wandb, wandb.part", "from wandb.part import name"])
def test_a_module_of_it_is_imported_as_ever(package, use):
    result = run(f"{package}{use}; import wandb; print(wandb.__version__, wandb.part.name)")
    assert result.stdout.split() == ["loaded", "1", "wandb"], result.stderr


def test_an_error_of_it_is_seen_each_time(package, tmp_path):
    (tmp_path / "kornia").mkdir()
    (tmp_path / "kornia/__init__.py").write_text("raise OSError('broken')")
    code = f"sys.path.insert(0, {str(tmp_path)!r}); import kornia\nfor _ in range(2):\n    "
    code += "try:\n        kornia.name\n    except OSError as error:\n        print(error)"
    assert run(package + code).stdout.split() == ["broken", "broken"]


def test_a_missing_package_cannot_be_imported():
    code = "import sys, framebridge_plugin; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    code += "import wandb"
    assert "ModuleNotFoundError: No module named 'wandb'" in run(code).stderr


def test_garbage_is_collected_again_after_imports():
    import gc

    from framebridge_plugin.imports import without_collection

    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
