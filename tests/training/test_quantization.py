"""Frozen weights in 8 bits, and float8 products, on the real networks."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from framebridge_plugin.training.quantization import block_layers, quantize_blocks, use_float8_products
from tests.training.bridge_runs import make_specification
from tests.training.run_results import LORA, assert_same_weights, losses, succeeded


@pytest.fixture(scope="module")
def network() -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=8, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=64,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=16,
    ).eval()  # fmt: skip


def output(network: CogVideoXTransformer3DModel, *, autocast: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 3, 8, 8, 8, generator=generator), torch.randn(1, 16, 16, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return network(latents.to(network.dtype), text.to(network.dtype), torch.tensor([500]))[0].float()


def gradient(network: CogVideoXTransformer3DModel, layers: list[str], *, autocast: bool = False) -> torch.Tensor:
    output(network, autocast=autocast).square().mean().backward()
    return torch.cat([network.get_parameter(f"{name}.weight").grad.flatten().float() for name in layers])


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("fp8", 0.05)])
def test_the_weights_of_the_blocks_take_a_byte_and_the_output_hardly_changes(network, kind, most):
    small, expected = copy.deepcopy(network).requires_grad_(False), output(network)
    quantize_blocks(small, kind)
    layers = dict(block_layers(small))
    assert len(layers) == 2 * 8
    assert all(layer.weight.qdata.element_size() == 1 for layer in layers.values())
    others = {name: parameter for name, parameter in network.named_parameters() if name[:-7] not in layers}
    assert all(torch.equal(parameter, small.get_parameter(name)) for name, parameter in others.items())
    assert torch.get_float32_matmul_precision() == "highest"
    assert 0 < (output(small) - expected).norm() / expected.norm() < most


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_products_have_nearly_the_gradients_of_others_and_the_weights_are_plain(network, recipe, autocast):
    converted = copy.deepcopy(network).to(torch.float32 if autocast else torch.bfloat16)
    names, layers = set(converted.state_dict()), [name for name, _ in block_layers(network)]
    use_float8_products(converted, recipe, emulate=True)
    changed = [name for name, module in converted.named_modules() if type(module).__name__ == "Float8Linear"]
    assert changed == layers
    expected = gradient(copy.deepcopy(network), layers)
    difference = gradient(converted, layers, autocast=autocast) - expected
    assert 0.02 < difference.norm() / expected.norm() < 0.06  # of bfloat16 alone .006
    state = converted.state_dict()
    assert set(state) == names
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_kernels_for_float8_take_any_number_of_tokens(network, recipe):
    """Those of a GPU, whose shapes are checked without data; torch takes them for sums over multiples of 16 alone."""
    converted = copy.deepcopy(network).bfloat16().to("meta")
    use_float8_products(converted, recipe)
    shapes = (1, 3, 8, 8, 6), (1, 16, 16)
    latents, text = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    converted(latents, text, torch.tensor([500], device="meta"))[0].sum().backward()


@pytest.mark.filterwarnings("error:.*merge")  # nothing for peft to warn of
def test_a_lora_on_a_base_in_8_bits_resumes_bit_for_bit_and_is_for_the_plain_base(train, tmp_path):
    lora = (*LORA, "training.gradient_checkpointing=true", "precision.text_encoder_quantization=int8")
    small = (*lora, "precision.transformer_quantization=int8")
    assert succeeded(train(*lora, output="plain"))
    assert succeeded(train(*small, output="whole"))
    assert succeeded(train(*small, "optimization.train_steps=2", output="parts"))
    anew = train(*lora, output="parts")
    assert anew.returncode == 1
    assert "it was trained with transformer_quantization 'int8'; resume with" in anew.stderr
    assert succeeded(train(*small, output="parts"))
    whole, plain = tmp_path / "whole", tmp_path / "plain"
    assert losses(tmp_path / "parts") == losses(whole)
    assert_same_weights(whole / "lora", tmp_path / "parts/lora")
    assert losses(whole) != losses(plain)
    assert losses(whole) == pytest.approx(losses(plain), rel=2e-3)
    (file,) = (whole / "lora").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    facts = [next(Path(run, "lora").glob("*framebridge*.json")) for run in (whole, plain)]
    assert json.loads(facts[0].read_text()) == json.loads(facts[1].read_text())


def test_float8_without_such_a_gpu_and_stores_of_another_text_encoder_are_refused(train, model_folder):
    if not torch.cuda.is_available():
        result = train("precision.float8_training=tensorwise", "precision.transformer_dtype=bf16")
        assert result.returncode == 2
        assert "needs a CUDA GPU of compute capability 8.9 or higher" in result.stderr
    plain, small = (make_specification(model_folder, text_encoder_quantization=kind) for kind in (None, "int8"))
    assert plain.precomputation_facts() | {"text_encoder_quantization": "int8"} == small.precomputation_facts()
