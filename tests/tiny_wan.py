"""Builds complete but tiny Wan text-to-video folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny_models import LATENT_CHANNELS, make_tiny_tokenizer

WIDTH = 24
"""Of the network; two heads of 12, the smallest that rotary positions in three axes divide."""


def make_tiny_wan(folder: str | Path, *, unipc: bool = False, seed: int = 0, max_text_length: int = 16) -> Path:
    """Writes a diffusers folder of Wan 2.1 text-to-video with random weights (about 0.1 M of them).

    Args:
        folder: Where to write.
        unipc: The scheduler of the released folders (UniPC with flow sigmas), instead of the Euler scheduler.
        seed: Seed of all weights.
        max_text_length: The tokenizer's own maximum.

    Returns:
        The folder.
    """
    folder = Path(folder)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer", max_text_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=make_tiny_wan_vae(seed),
        scheduler=make_wan_backbone(unipc),
        transformer=make_tiny_wan_network(seed),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_wan_network(seed: int = 0, **settings: Any) -> WanTransformer3DModel:
    """Returns a Wan with 2 blocks of width 24."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WanTransformer3DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": WIDTH // 2,
                "in_channels": LATENT_CHANNELS,
                "out_channels": LATENT_CHANNELS,
                "text_dim": 16,
                "freq_dim": 32,
                "ffn_dim": 32,
                "num_layers": 2,
                "rope_max_seq_len": 32,
                **settings,
            }
        )
    return network.eval()


def make_tiny_wan_vae(seed: int = 0) -> AutoencoderKLWan:
    """Returns a Wan video autoencoder that compresses as the released one does: 4 times in time, 8 in space."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[-0.7, 0.1, 0.9, 0.4],
            latents_std=[2.8, 1.4, 0.5, 1.9],
        )
    return vae.eval()


def make_wan_backbone(unipc: bool = False) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    """Returns the scheduler of a Wan 2.1 folder for 480p, whose noise levels are shifted by 3."""
    if unipc:
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return FlowMatchEulerDiscreteScheduler(shift=3.0)
