"""Wider input channels: the same network until it is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.calling import call_transformer
from framebridge_plugin.models.widening import load_bridge_transformer, widen_input_channels
from tests.tiny_models import LATENT_CHANNELS, make_tiny_cogvideox

KINDS = ["2b", "5b"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("widening")
    return {kind: make_tiny_cogvideox(folder / kind, rotary=kind == "5b") for kind in KINDS}


def load_plain(model: Path, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer", dtype=dtype)


def load_widened(model: Path, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    return load_bridge_transformer(str(model), subfolder="transformer", dtype=dtype)


def random_latents(seed: int, channels: int = LATENT_CHANNELS) -> torch.Tensor:
    return torch.randn(2, 3, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def output(transformer: CogVideoXTransformer3DModel, latents: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = transformer.patch_embed.text_proj.weight.dtype
    text = torch.randn(2, 16, 16, generator=generator).to(dtype)
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        # 3 x 4 x 4 tokens, 16 features in a head.
        rotary = (torch.randn(48, 16, generator=generator), torch.randn(48, 16, generator=generator))
    return call_transformer(transformer, latents, torch.tensor([3.5, 965.716]), text, rotary)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_widened_network_computes_what_the_plain_one_does(models, kind, dtype):
    latents = random_latents(1)
    expected = output(load_plain(models[kind], dtype), latents)
    widened = load_widened(models[kind], dtype)
    assert widened.config.in_channels == 2 * LATENT_CHANNELS
    assert widened.patch_embed.proj.weight.dtype == dtype
    for scale in (0.0, 1.0, 100.0):
        image = scale * random_latents(2)
        assert torch.equal(output(widened, torch.cat([latents, image], dim=2)), expected)


def test_a_frozen_network_stays_frozen(models):
    widened = widen_input_channels(load_plain(models["2b"]).requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in widened.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_trained_in_a_full_fine_tune_and_reaches_the_new_channels(models, kind):
    widened = load_widened(models[kind])
    assert all(parameter.requires_grad for parameter in widened.parameters())
    with torch.enable_grad():
        latents = torch.cat([random_latents(1), random_latents(2)], dim=2)
        rotary = (torch.ones(48, 16), torch.zeros(48, 16)) if kind == "5b" else None
        call_transformer(widened, latents, torch.tensor([1.0, 500.0]), torch.zeros(2, 16, 16), rotary).sum().backward()
    assert widened.patch_embed.proj.weight.grad[:, LATENT_CHANNELS:].abs().sum() > 0


def test_a_widened_checkpoint_is_loaded_as_it_is(models, tmp_path):
    trained = load_widened(models["2b"])
    torch.nn.init.normal_(trained.patch_embed.proj.weight, generator=torch.Generator().manual_seed(4))
    trained.save_pretrained(tmp_path / "transformer")
    assert json.loads((tmp_path / "transformer/config.json").read_text())["in_channels"] == 2 * LATENT_CHANNELS

    latents = random_latents(1, 2 * LATENT_CHANNELS)
    expected = output(trained, latents)
    # As part of a model, and as the folder alone that a fine-tune leaves.
    for loaded in (load_widened(tmp_path), load_bridge_transformer(str(tmp_path / "transformer"))):
        assert torch.equal(loaded.patch_embed.proj.weight, trained.patch_embed.proj.weight)
        assert torch.equal(output(loaded, latents), expected)
        assert widen_input_channels(loaded) is loaded


def test_a_plain_transformer_folder_alone_is_widened(models, tmp_path):
    shutil.copytree(models["2b"] / "transformer", tmp_path / "alone")
    latents = random_latents(1)
    widened = load_bridge_transformer(str(tmp_path / "alone"))
    expected = output(load_plain(models["2b"]), latents)
    assert torch.equal(output(widened, torch.cat([latents, random_latents(2)], dim=2)), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch_size_t": 2}, "CogVideoX 1.5"),
        ({"in_channels": 3 * LATENT_CHANNELS}, "has 12 input and 4 output channels; expected 4 inputs"),
    ],
)
def test_another_architecture_is_refused_in_one_line(models, changed, message):
    config = {**load_plain(models["2b"]).config, **changed, "sample_frames": 9}
    with pytest.raises(FrameBridgeError, match=message) as error:
        widen_input_channels(CogVideoXTransformer3DModel.from_config(config))
    assert "\n" not in str(error.value)
