"""A tiny CogView4 of finetrainers' own: a model that trains on images, with flow matching."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import GlmConfig, GlmModel

from tests.tiny_models import make_tiny_tokenizer


def make_tiny_cogview4(folder: Path) -> Path:
    """Writes a complete CogView4 folder with random weights; returns the folder."""
    tokenizer = make_tiny_tokenizer(folder / "tokenizer", max_text_length=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = GlmModel(
            GlmConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=8,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=4,
                pad_token_id=0,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        )
        transformer = CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=4,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
        )
    scheduler = FlowMatchEulerDiscreteScheduler()
    CogView4Pipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder
