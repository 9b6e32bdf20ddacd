"""Latte as a diffusers model: sizes, weights from a seed, precision, saving, LoRA, what finetrainers does to it."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from framebridge_plugin.backbones.latte.rules import LATTE_SIZES
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models import LatteTransformer
from tests.tiny_models import latte_config

TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "sample_height": 8,
    "sample_width": 4,
    "num_frames": 3,
    "num_classes": 3,
    "class_names": ["Archery", "Biking", "7"],
}
LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


def make(seed: int = 0, **changes: Any) -> LatteTransformer:
    """A tiny network with all weights random, those that start at zero too."""
    network = LatteTransformer(**{**TINY, **changes})
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def arguments(dtype: torch.dtype = torch.float32, channels: int = 4) -> tuple[torch.Tensor, ...]:
    latents = torch.randn(2, 4, channels, 8, 4, generator=torch.Generator().manual_seed(1))
    return latents.to(dtype), torch.tensor([965.7, 3.0]), torch.tensor([1, 3])


def gradients(network: LatteTransformer) -> dict[str, torch.Tensor]:
    network.zero_grad()
    network(*arguments()).sample.square().mean().backward()
    return {name.replace("_checkpoint_wrapped_module.", ""): p.grad.clone() for name, p in network.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def build(size: str, **changes: Any) -> LatteTransformer:
    seed = changes.pop("seed", 0)
    return LatteTransformer.from_scratch(latte_config(size, **changes), seed)


# Sizes and the weights to start from


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_the_table_of_sizes(patch_size):
    counts = {}
    for name, (num_layers, width, heads) in LATTE_SIZES.items():
        with torch.device("meta"):
            network = LatteTransformer(
                num_layers=num_layers,
                num_attention_heads=heads,
                attention_head_dim=width // heads,
                patch_size=patch_size,
            )
            output = network(torch.empty(1, 17, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.int64)).sample
        assert output.shape == (1, 17, 4, 32, 32)
        assert network.patch_embed.proj.weight.shape == (width, 4, patch_size, patch_size)
        assert [block.is_temporal for block in network.transformer_blocks] == [False, True] * (num_layers // 2)
        if name == "S":
            built = build(f"S/{patch_size}").config
            assert {key: built[key] for key in built if key[0] != "_"} == {
                key: network.config[key] for key in network.config if key[0] != "_"
            }
        counts[name] = sum(parameter.numel() for parameter in network.parameters())
    assert all(smaller < larger for smaller, larger in pairwise(counts.values()))
    if patch_size == 2:
        assert counts["S"] == 32_513_680


@pytest.mark.parametrize("size", ["S", "S/3", "M/2", "S/2/2", "", "s/2"])
def test_an_unknown_size_is_refused(size):
    with pytest.raises(
        FrameBridgeError, match=re.escape(f"unknown Latte size {size!r}; choose one of Ti, S, B, L, XL")
    ):
        build(size)


@pytest.mark.parametrize("kind", [{}, {"takes_neural_prior": True}, {"stage": "neural_prior"}])
def test_weights_come_from_the_seed_alone(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build("S/8", seed=1, **kind).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(build("S/8", seed=1, **kind).state_dict(), first)
    assert not equal(build("S/8", seed=2, **kind).state_dict(), first)


def test_initial_weights():
    network = build("S/8", takes_neural_prior=True)
    inputs = torch.randn(1, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    output = network(inputs, torch.tensor([500.0]), torch.tensor([4])).sample
    assert output.shape == (1, 3, 4, 16, 16)
    assert torch.count_nonzero(output) == 0
    for name, parameter in network.named_parameters():
        if name.endswith(".bias") or "norm" in name or name.startswith("proj_out"):
            assert torch.count_nonzero(parameter) == 0, name
            continue
        fan_out, fan_in = parameter.flatten(1).shape
        if "embedding" in name:
            expected = 0.02
        elif "to_out" not in name and ".to_" in name:
            expected = (2 / (4 * fan_in)) ** 0.5  # one matrix of width x 3 width
        else:
            expected = (2 / (fan_in + fan_out)) ** 0.5
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_initialising_again_forgets_the_old_weights():
    network = make()
    network.initialize_weights(3)
    other = make(seed=8)
    other.initialize_weights(3)
    assert equal(network.state_dict(), other.state_dict())


# The config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "prior"}, "stage is 'prior'; it should be 'bridge' or 'neural_prior'"),
        ({"num_layers": 2.0}, "num_layers is 2.0; it should be a whole number, at least 1"),
        ({"num_layers": 3}, "num_layers=3 must be even"),
        ({"attention_head_dim": 9}, "the width 18 (heads x head width) must be a multiple of 4"),
        ({"sample_width": 5}, "latents of 8 x 5 cannot be cut into patches of 2 x 2"),
        ({"class_names": ["a"]}, "1 class_names for num_classes=3"),
        ({"in_channels": 6}, "in_channels=6 must be out_channels=4, or twice that"),
        ({"in_channels": 8, "stage": "neural_prior"}, "a neural prior cannot take a neural prior's video"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(FrameBridgeError, match=re.escape(f"LatteTransformer: {message}")):
        LatteTransformer(**{**TINY, **changes})


def test_numbers_of_numpy_are_saved_as_pythons_own(tmp_path):
    LatteTransformer(**TINY | {"num_layers": np.int64(2), "num_classes": np.int32(3)}).save_config(tmp_path)
    assert LatteTransformer.load_config(tmp_path)["num_layers"] == 2


def test_labels():
    network = LatteTransformer(**TINY)
    assert network.null_label == 3
    names = ("Archery", "Biking", "7", "0", "2", "3", "-1", "archery", "²", "", "1.0")
    assert [network.label_of(name) for name in names] == [0, 1, 2, 0, 2, *[None] * 6]
    unnamed = LatteTransformer(**{**TINY, "class_names": None})
    assert [unnamed.label_of(name) for name in ("Archery", "1", "3")] == [None, 1, None]


def test_a_network_says_whether_it_takes_a_neural_prior():
    assert LatteTransformer(**TINY, in_channels=8).takes_neural_prior
    assert not LatteTransformer(**TINY).takes_neural_prior
    assert not LatteTransformer(**TINY, stage="neural_prior").takes_neural_prior


def test_time_belongs_to_the_bridge_alone():
    latents, times, labels = arguments()
    with pytest.raises(FrameBridgeError, match="stage 'bridge' needs a timestep"):
        make()(latents, None, labels)
    with pytest.raises(FrameBridgeError, match="stage 'neural_prior' takes no timestep"):
        make(stage="neural_prior")(latents, times, labels)


# What the network computes


def test_any_clip_size_and_length():
    network = make()
    _, times, labels = arguments()
    for shape in [(1, 2, 2), (4, 8, 4), (7, 4, 12)]:
        num_frames, height, width = shape
        assert network(torch.ones(2, num_frames, 4, height, width), times, labels).sample.shape == (
            *(2, num_frames, 4, height, width),
        )


@torch.no_grad()
def test_the_network_sees_class_time_place_and_frame():
    network = make()
    latents, times, labels = arguments()
    output = network(latents, times, labels, return_dict=False)[0]
    assert not torch.allclose(network(latents, times + 1, labels).sample, output)
    assert not torch.allclose(network(latents, times, labels.flip(0)).sample, output)
    alike = torch.ones(2, 4, 4, 8, 4)
    output = network(alike, times, labels).sample
    patches = output.unflatten(4, (2, 2)).unflatten(3, (4, 2)).permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3).flatten(2)
    distances = torch.cdist(patches, patches) + torch.eye(patches.shape[1]) * 100
    assert distances.min() > 1e-3, "two places of the video are the same to the network"


@torch.no_grad()
def test_half_precision():
    network = make()
    exact = network(*arguments()).sample
    network.to(torch.bfloat16)
    output = network(*arguments(torch.bfloat16)).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_half_precision_leaves_fractional_times_alone():
    network = make().to(torch.bfloat16)
    embedded = []
    network.time_proj.register_forward_hook(lambda module, args, output: embedded.append(output[0]))
    latents, times, labels = arguments(torch.bfloat16)
    outputs = [network(latents, torch.tensor([time, 3.0]), labels).sample for time in (965.7, 964.0)]
    assert times[0].bfloat16() == 964
    angle = 965.7 * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angle.cos(), angle.sin()]).float()
    assert torch.allclose(embedded[0], expected, atol=1e-3)
    assert not torch.equal(*outputs)


# Training


def test_gradient_checkpointing_gives_the_same_gradients():
    network = make()
    expected = gradients(network)
    network.enable_gradient_checkpointing()
    network.train()
    runs = []
    network.transformer_blocks[0].attn.register_forward_hook(lambda *_: runs.append(1))
    assert equal(gradients(network), expected)
    assert len(runs) == 2, "the block was not run again"


def test_finetrainers_finds_the_blocks_to_checkpoint():
    from framebridge_plugin.training.finetrainers.registration import register

    register()
    from finetrainers.utils.activation_checkpoint import apply_activation_checkpointing

    network = make()
    expected = gradients(network)
    apply_activation_checkpointing(network, "full")
    assert all("Checkpoint" in type(block).__name__ for block in network.transformer_blocks)
    assert equal(gradients(network), expected)


@torch.no_grad()
def test_layerwise_casting_keeps_the_sensitive_layers():
    network = make()
    exact = network(*arguments()).sample
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert network.dtype == torch.float32
    precision = {name: parameter.dtype for name, parameter in network.named_parameters()}
    small = {name for name, dtype in precision.items() if dtype == torch.float8_e4m3fn}
    assert small
    assert all(re.match(r"transformer_blocks\.\d\.(attn|ff)\.", name) for name in small)
    output = network(*arguments()).sample
    assert 0 < (output - exact).abs().max() < 0.3 * exact.abs().max()


# Files


@pytest.mark.parametrize("changes", [{}, {"in_channels": 8}, {"stage": "neural_prior"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_bit_for_bit(tmp_path, changes, dtype):
    network = make(**changes).to(dtype)
    network.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded, problems = LatteTransformer.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(problems.values())
    assert equal(loaded.state_dict(), network.state_dict())
    assert loaded.config.class_names == TINY["class_names"]
    latents, times, labels = arguments(dtype, channels=network.config.in_channels)
    times = None if network.config.stage == "neural_prior" else times
    with torch.no_grad():
        assert torch.equal(loaded(latents, times, labels).sample, network.eval()(latents, times, labels).sample)


def test_lora_round_trip(tmp_path: Path):
    base = make()
    plain = base(*arguments()).sample
    trained = copy.deepcopy(base)
    trained.add_adapter(LORA)
    assert sum("lora_A" in name for name, _ in trained.named_parameters()) == 4 * len(base.transformer_blocks)
    assert all(p.requires_grad == ("lora" in name) for name, p in trained.named_parameters())
    expected = trained(*arguments()).sample
    assert not torch.allclose(expected, plain)
    assert trained.dtype == torch.float32
    trained.save_lora_adapter(tmp_path)

    base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(base(*arguments()).sample, expected)
    base.unload_lora()
    assert torch.equal(base(*arguments()).sample, plain)
