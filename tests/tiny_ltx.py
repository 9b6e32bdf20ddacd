"""Builds complete but tiny LTX-Video 0.9 folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from transformers import T5Config, T5EncoderModel

from tests.tiny_models import LATENT_CHANNELS, make_tiny_tokenizer


def make_tiny_ltx(folder: str | Path, *, seed: int = 0, max_text_length: int = 16) -> Path:
    """Writes a diffusers folder of LTX-Video 0.9 text-to-video with random weights (about 0.1 M of them).

    Args:
        folder: Where to write.
        seed: Seed of all weights.
        max_text_length: The tokenizer's own maximum.

    Returns:
        The folder.
    """
    folder = Path(folder)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer", max_text_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    pipeline = LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=make_tiny_ltx_vae(seed),
        scheduler=make_ltx_backbone(),
        transformer=make_tiny_ltx_network(seed),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_ltx_network(seed: int = 0, **settings: Any) -> LTXVideoTransformer3DModel:
    """Returns an LTX with 2 blocks of width 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LTXVideoTransformer3DModel(
            **{
                "in_channels": LATENT_CHANNELS,
                "out_channels": LATENT_CHANNELS,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "cross_attention_dim": 16,
                "caption_channels": 16,
                "num_layers": 2,
                **settings,
            }
        )
    return network.eval()


def make_tiny_ltx_vae(seed: int = 0) -> AutoencoderKLLTXVideo:
    """Returns an LTX video autoencoder that compresses as the released one does: 8 times in time, 32 in space."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLLTXVideo(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
        vae.latents_mean.copy_(torch.randn(LATENT_CHANNELS))
        vae.latents_std.copy_(torch.rand(LATENT_CHANNELS) + 0.5)
    return vae.eval()


def make_ltx_backbone() -> FlowMatchEulerDiscreteScheduler:
    """Returns the scheduler of an LTX-Video 0.9 folder, whose noise levels are shifted by the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
