"""Wider input channels: the same network until it is trained."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.widening import load_bridge_transformer, train_input_projection, widen_input_channels
from tests.tiny_models import LATENT_CHANNELS, make_tiny_cogvideox

KINDS = ["2b", "5b"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("widening")
    return {kind: make_tiny_cogvideox(folder / kind, rotary=kind == "5b") for kind in KINDS}


def load(model: Path) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")


@torch.no_grad()
def outputs(transformer: CogVideoXTransformer3DModel, channels: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 16, 16, generator=generator)
    # 3 x 4 x 4 tokens of 16 features in a head.
    rotary = tuple(torch.randn(48, 16, generator=generator) for _ in range(2))
    return transformer(
        channels,
        text,
        torch.tensor([3.5, 965.716]),
        image_rotary_emb=rotary if transformer.config.use_rotary_positional_embeddings else None,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_widened_network_computes_what_the_plain_one_does(models, kind, dtype):
    plain = load(models[kind]).to(dtype)
    widened = load_bridge_transformer(str(models[kind]), subfolder="transformer", torch_dtype=dtype)
    if kind == "2b":
        # The positional table is not stored in the file: `.to` rounds it, from_pretrained does not.
        widened = widened.to(dtype)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, LATENT_CHANNELS, 8, 8, generator=generator).to(dtype)
    if dtype == torch.bfloat16 and kind == "5b":
        pytest.skip("the rotary tables of this test are float32")
    expected = outputs(plain, latents)
    for scale in (0.0, 1.0, 100.0):
        image = scale * torch.randn(latents.shape, generator=generator).to(dtype)
        assert torch.equal(outputs(widened, torch.cat([latents, image], dim=2)), expected)
