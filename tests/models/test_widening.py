"""Wider input channels: the same network until it is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, ModelMixin, WanTransformer3DModel
from peft import LoraConfig

from framebridge_plugin.backbones.cogvideox.adapter import call_transformer, load_bridge_transformer
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.projection_adapter import add_projection, freeze_identity
from framebridge_plugin.models.widening import widen_input_channels
from tests.tiny_ltx import make_tiny_ltx_network
from tests.tiny_models import LATENT_CHANNELS, make_tiny_cogvideox
from tests.tiny_wan import make_tiny_wan_network

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
    widened = widen_input_channels(load_plain(models["2b"]).requires_grad_(False), "patch_embed.proj")
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
        assert widen_input_channels(loaded, "patch_embed.proj") is loaded


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
        (
            {"in_channels": 3 * LATENT_CHANNELS},
            "12 input and 4 output channels, 12 at patch_embed.proj; expected 4",
        ),
    ],
)
def test_another_architecture_is_refused_in_one_line(models, changed, message, tmp_path):
    config = {**load_plain(models["2b"]).config, **changed, "sample_frames": 9}
    CogVideoXTransformer3DModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(FrameBridgeError, match=message) as error:
        load_bridge_transformer(str(tmp_path))
    assert "\n" not in str(error.value)


def call_network(network: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Latents [2, C, 3, 4, 4] and their output, whatever the network's layout."""
    text, time = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(7)), torch.tensor([3.5, 965.716])
    if isinstance(network, WanTransformer3DModel):
        return network(latents, time, text).sample
    tokens, mask = latents.flatten(2).transpose(1, 2), torch.ones(2, 5)
    return network(tokens, text, time, mask, num_frames=3, height=4, width=4).sample


# A convolution over space and time, and a linear layer over channels.
OTHERS = [(make_tiny_wan_network, "patch_embedding"), (make_tiny_ltx_network, "proj_in")]


@pytest.mark.parametrize(("make", "projection"), OTHERS, ids=["wan", "ltx"])
@torch.no_grad()
def test_other_projections_are_widened_saved_and_loaded(make, projection, tmp_path):
    plain = make()
    latents, image = torch.randn(2, 2, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = call_network(plain, latents)
    widened = widen_input_channels(make(), projection)
    assert (widened.config.in_channels, widened.config.out_channels) == (2 * LATENT_CHANNELS, LATENT_CHANNELS)
    for scale in (0.0, 100.0):
        assert torch.equal(call_network(widened, torch.cat([latents, scale * image], dim=1)), expected)

    torch.nn.init.normal_(widened.get_submodule(projection).weight)
    seen = call_network(widened, torch.cat([latents, image], dim=1))
    assert not torch.equal(seen, expected)
    widened.save_pretrained(tmp_path / "widened")
    loaded = widen_input_channels(type(plain).from_pretrained(tmp_path / "widened"), projection)
    assert torch.equal(call_network(loaded, torch.cat([latents, image], dim=1)), seen)


@pytest.mark.parametrize(("make", "projection"), OTHERS, ids=["wan", "ltx"])
def test_the_adapter_of_a_projection_trains_it_as_a_whole(make, projection):
    network = widen_input_channels(make(), projection)
    whole = widen_input_channels(make(), projection)
    config = LoraConfig(r=2, target_modules=["to_q"])
    add_projection(config, network, projection)
    network.add_adapter(config)
    freeze_identity(network, projection)
    layer = network.get_submodule(projection)
    change = torch.randn(whole.get_submodule(projection).weight.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        B = layer.lora_B["default"].weight
        B.copy_(change.reshape(B.shape))
        whole.get_submodule(projection).weight.add_(change)
    latents = torch.randn(2, 2 * LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    outputs = [call_network(each, latents) for each in (network, whole)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    gradient = whole.get_submodule(projection).weight.grad
    torch.testing.assert_close(B.grad, gradient.reshape(B.shape), rtol=1e-3, atol=1e-6)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if projection in name} == {f"{projection}.lora_B.default.weight"}
