"""The repair in processes of their own, since an import happens once in each."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_the_package_imports_neither_torch_nor_finetrainers():
    heavy = "{'torch', 'diffusers', 'transformers', 'finetrainers', 'numpy'}"
    result = run(f"import sys, framebridge_plugin; print(sorted({heavy} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


def test_repair_is_active_exactly_where_the_import_fails():
    """And pipelines and text encoders import after it."""
    fails = run("import torchvision").returncode != 0
    repair = "from framebridge_plugin.torchvision_repair import ensure_torchvision_operators as ensure\n"
    imports = "from diffusers import CogVideoXPipeline; from transformers import T5EncoderModel; import torchvision"
    result = run(f"{repair}first = ensure(); assert ensure() == first; print(first)\n{imports}")
    assert (result.returncode, result.stdout.strip()) == (0, str(fails)), result.stderr


@pytest.mark.parametrize(
    "preparation",
    [
        "import sys; sys.modules['torchvision'] = None",
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')",
    ],
    ids=["absent", "healthy"],
)
def test_nothing_is_declared_where_nothing_is_missing(preparation):
    code = f"""
import torch
{preparation}
from framebridge_plugin.torchvision_repair import ensure_torchvision_operators
assert ensure_torchvision_operators() is False
assert not hasattr(torch.ops.torchvision, "qnms")
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
