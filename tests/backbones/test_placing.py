"""Where a pipeline computes: devices, what waits in main memory, and compiled blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from framebridge_plugin.backbones.placing import check_compiler, compile_blocks, find_device, place
from framebridge_plugin.errors import UsageError
from framebridge_plugin.training.refusals import refuse_unsupported
from tests.backbones.latte_calls import latents_of, open_folder

CPU = torch.device("cpu")


def test_devices():
    assert find_device("cpu") == CPU
    assert find_device() == CPU or torch.accelerator.is_available()
    for name in ("cuda:99", "meta", "tpu", ""):
        with pytest.raises(UsageError, match=f"--device {name}: there is none here; there are: cpu"):
            find_device(name)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_what_waits_elsewhere_computes_the_same_bits(latte_folders, offload):
    """Sequential offloading does not work with a CPU as the device that is computed on."""
    pipeline = open_folder(latte_folders["bridge_neural_prior"])
    expected = latents_of(pipeline)
    place(pipeline, CPU, offload)
    assert torch.equal(latents_of(pipeline), expected)


def test_blocks_are_compiled_one_by_one(latte_folders):
    """By the backend that only traces: the default one takes a minute for this network."""
    pipeline = open_folder(latte_folders["bridge"])
    expected, graphs = latents_of(pipeline), []

    def trace(graph, inputs):
        graphs.append(graph)
        return graph

    compile_blocks(pipeline.transformer, backend=trace)
    assert torch.equal(latents_of(pipeline), expected)
    assert len(graphs) == 2  # along space, along time


def test_no_compiler(monkeypatch):
    check_compiler("--compile")
    monkeypatch.setenv("CXX", "no-such-compiler")
    from torch._inductor import config

    training = SimpleNamespace(pp_degree=1, cp_degree=1, tp_degree=1, compile_modules=["transformer"])
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(UsageError, match="--compile: needs a C\\+\\+ compiler"):
            check_compiler("--compile")
        with pytest.raises(UsageError, match="^compile_modules: needs a C\\+\\+ compiler"):
            refuse_unsupported(training)
