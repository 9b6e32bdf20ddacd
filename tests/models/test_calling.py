"""The network's time keeps its digits, whatever precision the network has."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel
from peft import LoraConfig

from framebridge_plugin.backbones.cogvideox.adapter import call_transformer
from framebridge_plugin.backbones.latte.networks import call_latte
from framebridge_plugin.backbones.ltx.adapter import call_ltx
from framebridge_plugin.backbones.wan.adapter import call_wan
from framebridge_plugin.models import LatteTransformer
from framebridge_plugin.training.finetrainers.registration import register
from tests.reference_vectors import load_vectors
from tests.tiny_ltx import make_tiny_ltx_network
from tests.tiny_wan import make_tiny_wan_network

TIME = 965.716
Network = CogVideoXTransformer3DModel | LatteTransformer | WanTransformer3DModel | LTXVideoTransformer3DModel


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make_cogvideox(**settings: Any) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        **settings,
        num_attention_heads=1,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=1,
        max_text_seq_length=4,
    )
    if not settings:
        transformer.patch_embed.pos_embedding = transformer.patch_embed.pos_embedding.bfloat16()
    return transformer


def make_rotary_cogvideox() -> CogVideoXTransformer3DModel:
    return make_cogvideox(use_rotary_positional_embeddings=True)


def make_latte(**changes: Any) -> LatteTransformer:
    torch.manual_seed(0)
    settings = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 8, "num_classes": 3}
    return LatteTransformer(**{**settings, "sample_height": 4, "sample_width": 4, "num_frames": 4, **changes})


def make_wan() -> WanTransformer3DModel:
    return make_tiny_wan_network(text_dim=8).train()


def make_ltx() -> LTXVideoTransformer3DModel:
    return make_tiny_ltx_network(caption_channels=8).train()


def time_embedding(transformer: Network) -> torch.nn.Module:
    if isinstance(transformer, WanTransformer3DModel):
        return transformer.condition_embedder.timesteps_proj
    is_ltx = isinstance(transformer, LTXVideoTransformer3DModel)
    return transformer.time_embed.emb.time_proj if is_ltx else transformer.time_proj


def call(transformer: Network, times: list[torch.Tensor], time: float = TIME) -> torch.Tensor:
    hook = time_embedding(transformer).register_forward_hook(lambda module, args, output: times.append(args[0]))
    latents = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    time = torch.tensor([time])
    if isinstance(transformer, LatteTransformer):
        output = call_latte(transformer, latents, time, torch.tensor([2]), latents.flip(-1))
    else:
        text = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2)).to(transformer.dtype)
        if isinstance(transformer, LTXVideoTransformer3DModel):
            output = call_ltx(transformer, latents, time, text, torch.ones(1, 4), (1.0, 32.0, 32.0))
        else:
            run = call_wan if isinstance(transformer, WanTransformer3DModel) else call_transformer
            rotary = ()
            if transformer.config.get("use_rotary_positional_embeddings"):
                angles = torch.linspace(0.1, 3.0, 4 * 16).reshape(4, 16)
                rotary = ((angles.cos(), angles.sin()),)
            output = run(transformer, latents, time, text, *rotary)
    hook.remove()
    return output


@pytest.mark.parametrize("make", [make_cogvideox, make_rotary_cogvideox, make_latte, make_wan, make_ltx])
def test_a_sharded_network_in_half_precision_gets_time_and_positions_in_float32(make, one_process_group):
    register()
    from framebridge_plugin.training.finetrainers.preparation import shard

    transformer = make().bfloat16()
    times: list[torch.Tensor] = []
    whole = call(transformer, times)
    sharded = copy.deepcopy(transformer)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    shard(None, sharded, mesh, torch.bfloat16, torch.float32, None)
    hooks = len(sharded._forward_pre_hooks)
    for _ in range(2):
        output = call(sharded, times)
        assert output.dtype == torch.float32
        assert torch.equal(output, whole)
    assert len(sharded._forward_pre_hooks) == hooks
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in sharded.parameters())
    assert [time.dtype for time in times] == [torch.float32] * 3
    assert [time.item() for time in times] == pytest.approx([TIME] * 3, abs=1e-4)
    rounded = call(transformer, [], torch.tensor(TIME).bfloat16().item())
    assert (rounded - whole).abs().mean() > 2 * (output - whole).abs().mean()


@pytest.mark.parametrize("make", [make_cogvideox, make_latte, make_wan, make_ltx])
def test_autocast_rounds_neither_time_nor_positions(make):
    """They are those of the network in float32, bit for bit, whose linear layers compute in bfloat16."""
    network = make()
    known: list[list[torch.Tensor]] = []
    time_embedding(network).register_forward_hook(lambda module, args, output: known[-1].append(output))
    if hasattr(network, "rope"):
        network.rope.register_forward_hook(lambda module, args, output: known[-1].extend(output))
    computed = []
    blocks = network.blocks if make is make_wan else network.transformer_blocks
    linear = next(module for module in blocks[0].modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    outputs = []
    for enabled in (False, True):
        known.append([])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(call(network, []))
    assert computed == [torch.float32, torch.bfloat16]
    assert len(known[0]) == (3 if hasattr(network, "rope") else 1)
    assert all(torch.equal(*pair) and pair[1].dtype == torch.float32 for pair in zip(*known, strict=True))
    assert not torch.equal(*outputs)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0.02)


@pytest.fixture
def seen() -> list[tuple[torch.Tensor, ...]]:
    return []


def spy(transformer: LatteTransformer, seen: list[tuple[torch.Tensor, ...]]) -> LatteTransformer:
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, kwargs["timestep"], kwargs["class_labels"])), with_kwargs=True
    )
    return transformer


@pytest.mark.parametrize(("mode", "in_channels"), [("None", 4), ("prior", 8)])
@torch.no_grad()
def test_latte_is_shown_what_the_reference_shows_it(mode, in_channels, seen):
    vectors, _ = load_vectors("latte_diffusion")
    expected, indices = (vectors[f"loss.align0.{mode}.tmix.{name}"] for name in ("model_x", "model_t"))
    image, prior = vectors["condition_frame"], vectors["coarse_video"] if mode == "prior" else None
    network = spy(make_latte(in_channels=in_channels), seen)
    latents = expected[:, 1:, :4]
    output = call_latte(network, latents, indices, torch.tensor([0, 3]), image, prior)
    ((inputs, times, labels),) = seen
    assert torch.equal(inputs, expected)
    assert torch.equal(times, indices)
    assert labels.tolist() == [0, 3]
    assert torch.equal(output, network(inputs, timestep=times, class_labels=labels).sample[:, 1:])
    assert output.shape == latents.shape


@torch.no_grad()
def test_a_neural_prior_is_shown_the_repeated_image_alone(seen):
    network = spy(make_latte(stage="neural_prior"), seen).bfloat16()
    image = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).expand(-1, 4, -1, -1, -1)
    output = call_latte(network, image, None, torch.tensor([1]))
    ((inputs, times, _),) = seen
    assert torch.equal(inputs, image.bfloat16())
    assert times is None
    assert output.dtype == torch.float32
    assert output.shape == image.shape


@torch.no_grad()
def test_a_latte_network_with_lora_layers_gets_its_own_precision(seen):
    network = spy(make_latte().bfloat16(), seen)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for name, parameter in network.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    call(network, [])
    assert seen[0][0].dtype == torch.bfloat16
    assert seen[0][1].dtype == torch.float32
