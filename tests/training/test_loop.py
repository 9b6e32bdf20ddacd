"""What an update computes in, and what it keeps."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.models import LatteTransformer
from framebridge_plugin.training import FrameBridgeTrainer
from framebridge_plugin.training.finetrainers.registration import register
from tests.training.bridge_runs import make_inputs, make_trainer, run_trainer
from tests.training.run_results import losses, weights


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_every_nth_block_is_computed_again():
    """Of a Latte; what is in the way of too large a number is said."""
    register()
    from finetrainers import utils

    from framebridge_plugin.training.finetrainers.preparation import prepared_as_said

    network, forwards = LatteTransformer(num_layers=4, num_attention_heads=2, attention_head_dim=8), [0] * 4
    plain = copy.deepcopy(network)
    for number, block in enumerate(network.transformer_blocks):

        def count(*_: object, number: int = number) -> None:
            forwards[number] += 1

        block.register_forward_pre_hook(count)
    args = SimpleNamespace(autocast=None, gradient_checkpointing_every=3)
    with prepared_as_said(args):
        utils.apply_activation_checkpointing(network, checkpointing_type="full")
    latents = torch.randn(2, 5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for model in (network, plain):
        model(latents, torch.tensor([3.0, 700.0]), torch.tensor([0, 1])).sample.square().mean().backward()
    assert forwards == [2, 1, 1, 2]
    for found, expected in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    args.gradient_checkpointing_every = 5
    with prepared_as_said(args), pytest.raises(UsageError, match=r"_every=5: the network has 4 blocks; give at most"):
        utils.apply_activation_checkpointing(plain, checkpointing_type="full")


class Autocast(FrameBridgeTrainer):
    """Notes what the first linear layer of a block returns, in training and in validation."""

    def __init__(self, args, specification):
        args.autocast, args.gradient_checkpointing_every = "bf16", 2
        self.computed: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
        super().__init__(args, specification)

    def _prepare_models(self):
        super()._prepare_models()
        self.transformer.transformer_blocks[1].ff.net[2].register_forward_hook(
            lambda module, args, output: self.computed[module.training].add(output.dtype)
        )


@pytest.fixture
def compiled_graphs(monkeypatch):
    """Graphs that torch.compile has made; it ends before the C++ compiler, which would take a minute."""
    graphs = []

    def compile_fx(graph, inputs, **options):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_mixed_precision_computes_in_bfloat16_and_trains_float32(inputs, tmp_path, kind, compiled_graphs):
    validation = ("--validation_steps=1", f"--validation_dataset_file={inputs / 'validation.csv'}")
    options = ("--parallel_backend=ptd", "--gradient_checkpointing", "--train_steps=2")
    run_trainer(FrameBridgeTrainer, inputs, tmp_path / "float32", kind, *options)
    trainer = run_trainer(Autocast, inputs, tmp_path / "mixed", kind, *options, *validation)
    assert trainer.computed == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert [isinstance(block, CheckpointWrapper) for block in trainer.transformer.transformer_blocks] == [True, False]
    found, expected = losses(tmp_path / "mixed"), losses(tmp_path / "float32")
    assert found[0] != expected[0]
    assert found == pytest.approx(expected, rel=1e-2)
    moments = load_file(tmp_path / "mixed/checkpoints/step_000002/trainer/optimizer.safetensors")
    assert {tensor.dtype for tensor in (*trainer.transformer.parameters(), *moments.values())} == {torch.float32}
    with pytest.raises(FrameBridgeError, match="trained with autocast 'bf16'.*--allow precision"):
        make_trainer(FrameBridgeTrainer, inputs, tmp_path / "mixed", kind, *options, "--train_steps=3").run()
    if kind == "lora":  # peft finds the layers that it saves by their names
        compiled = ("--compile_modules=transformer", "--compile_scopes=regional")
        run_trainer(FrameBridgeTrainer, inputs, tmp_path / "compiled", kind, *options, *compiled)
        assert compiled_graphs
        assert losses(tmp_path / "compiled") == pytest.approx(expected, rel=1e-5)
        saved, layers = weights(tmp_path / "compiled/lora"), weights(tmp_path / "float32/lora")
        assert saved.keys() == layers.keys()
        assert all(torch.allclose(saved[name], layer, rtol=1e-3, atol=1e-5) for name, layer in layers.items())
        with pytest.raises(UsageError, match="compile_modules=vae: only the transformer is compiled"):
            make_trainer(FrameBridgeTrainer, inputs, tmp_path, kind, "--compile_modules=vae", "--compile_scopes=full")
    other = "bf16" if kind == "full" else "fp16"
    with pytest.raises(UsageError, match=r"autocast=bf16 needs transformer_dtype=fp32 .*, not torch\..*float16: "):
        make_trainer(Autocast, inputs, tmp_path / "half", kind, transformer_dtype=other)
