"""The network's time keeps its digits, whatever precision the network has."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from framebridge_plugin.models.calling import call_transformer

TIME = 965.716


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def transformer() -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
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
    transformer.patch_embed.pos_embedding = transformer.patch_embed.pos_embedding.bfloat16()
    return transformer.bfloat16()


def call(transformer: CogVideoXTransformer3DModel, times: list[torch.Tensor]) -> torch.Tensor:
    hook = transformer.time_proj.register_forward_hook(lambda module, args, output: times.append(args[0]))
    text = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    latents = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    output = call_transformer(transformer, latents, torch.tensor([TIME]), text)
    hook.remove()
    return output


def test_a_sharded_network_in_half_precision_gets_the_time_in_float32(transformer, one_process_group):
    times: list[torch.Tensor] = []
    whole = call(transformer, times)
    sharded = copy.deepcopy(transformer)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    # As finetrainers shards a network.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, None, cast_forward_inputs=True)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    for _ in range(2):
        output = call(sharded, times)
        assert output.dtype == torch.float32
        assert torch.equal(output, whole)
    assert [time.dtype for time in times] == [torch.float32] * 3
    assert [time.item() for time in times] == pytest.approx([TIME] * 3, abs=1e-4)
