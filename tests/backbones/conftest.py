"""A plain tiny CogVideoX, and what training makes of it: a bridge model and its diffusion baseline; tiny Lattes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from framebridge_plugin.backbones.cogvideox.adapter import load_bridge_transformer
from framebridge_plugin.backbones.saving import save_model_folder
from framebridge_plugin.schedulers import FrameBridgeScheduler
from tests.tiny_models import LATTE_KINDS, make_tiny_cogvideox, make_tiny_latte

LINKED = {
    "tokenizer": ("transformers", "T5Tokenizer"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLCogVideoX"),
}


def make_trained_folder(folder: Path, base: Path, objective: str = "bridge", num_frames: int = 9) -> Path:
    """Saves a model as a run would, with input channels for the image that are not zero any more."""
    transformer = load_bridge_transformer(str(base), subfolder="transformer")
    torch.nn.init.normal_(transformer.patch_embed.proj.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    backbone = CogVideoXDDIMScheduler.from_pretrained(base, subfolder="scheduler")
    bridge = FrameBridgeScheduler.from_backbone(backbone, beta_max=40.0, target="v")
    save_model_folder(
        folder,
        pipeline_class="FrameBridgeCogVideoXPipeline",
        network_name="transformer",
        network_class=CogVideoXTransformer3DModel,
        network_config=transformer.config,
        network_state_dict=transformer.state_dict(),
        scheduler=bridge if objective == "bridge" else backbone,
        components={name: (*source, base / name) for name, source in LINKED.items()},
        settings={"num_frames": num_frames, "height": 64, "width": 64},
    )
    return folder


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cogvideox(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="session")
def bridge_folder(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_folder(tmp_path_factory.mktemp("bridge") / "model", plain_folder)


@pytest.fixture(scope="session")
def baseline_folder(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_folder(tmp_path_factory.mktemp("baseline") / "model", plain_folder, objective="diffusion")


@pytest.fixture(scope="session")
def rotary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotary")
    return make_trained_folder(folder / "model", make_tiny_cogvideox(folder / "plain", rotary=True))


@pytest.fixture(scope="session")
def latte_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Latte model of every kind."""
    folder = tmp_path_factory.mktemp("latte")
    return {kind: make_tiny_latte(folder / kind, kind) for kind in LATTE_KINDS}
