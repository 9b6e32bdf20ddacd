"""Builds what the tests train on: complete but tiny CogVideoX and Latte folders, and folders of real clips."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from framebridge_plugin.backbones.latte.pipeline import FrameBridgeLattePipeline
from framebridge_plugin.backbones.latte.rules import scratch_config
from framebridge_plugin.models import LatteTransformer
from framebridge_plugin.schedulers import FrameBridgeScheduler

CAPTIONS = (
    "a red square moves to the right over a grey floor",
    "a blue square moves to the left under a dark sky",
    "a green square falls down in front of a bright wall",
    "a white square climbs up and fades away at dusk",
)
CLASS_NAMES = ("left", "right", "up", "down")
LATTE_KINDS = ("bridge", "neural_prior", "bridge_neural_prior", "diffusion")
LATENT_CHANNELS = 4
VAE_SPATIAL_COMPRESSION = 8
VAE_TEMPORAL_COMPRESSION = 4


def make_tiny_cogvideox(
    folder: str | Path,
    *,
    rotary: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    in_channels: int = LATENT_CHANNELS,
    max_text_length: int = 16,
    sample_size: int = 64,
    sample_frames: int = 9,
) -> Path:
    """Writes a diffusers folder of CogVideoX text-to-video with random weights (about 0.1 M of them).

    Args:
        folder: Where to write; created if absent.
        rotary: Rotary positions and the 5B model's scheduler, instead of sine positions and the 2B model's.
        seed: Seed of all weights.
        dtype: Type in which the weights are stored.
        in_channels: Input channels of the transformer; twice `LATENT_CHANNELS` makes a widened checkpoint.
        max_text_length: Tokens of a caption. Sine positions fit exactly this length; finetrainers' own
            specification always passes 226.
        sample_size: Native height and width in pixels.
        sample_frames: Native number of frames.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer", max_text_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=LATENT_CHANNELS,
            temporal_compression_ratio=VAE_TEMPORAL_COMPRESSION,
            sample_height=sample_size,
            sample_width=sample_size,
        )
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=LATENT_CHANNELS,
            time_embed_dim=16,
            text_embed_dim=16,
            num_layers=2,
            sample_width=sample_size // VAE_SPATIAL_COMPRESSION,
            sample_height=sample_size // VAE_SPATIAL_COMPRESSION,
            sample_frames=sample_frames,
            patch_size=2,
            temporal_compression_ratio=VAE_TEMPORAL_COMPRESSION,
            max_text_seq_length=max_text_length,
            use_rotary_positional_embeddings=rotary,
        )
    # The values of the released models (2B: snr_shift_scale 3, 5B: 1).
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0 if rotary else 3.0,
        timestep_spacing="trailing",
    )
    for name, module in {"text_encoder": text_encoder, "vae": vae, "transformer": transformer}.items():
        module.to(dtype).save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "CogVideoXPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def make_tiny_latte(
    folder: str | Path,
    kind: str = "bridge",
    *,
    class_names: Sequence[str] | None = CLASS_NAMES,
    num_classes: int | None = None,
    num_frames: int = 4,
    size: int | tuple[int, int] = 64,
    compression: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a complete Latte folder, about 15,000 random weights a network, as training from scratch would leave it.

    Args:
        folder: Where to write; created if absent.
        kind: One of `LATTE_KINDS`: `bridge`, `neural_prior` (no transformer and no scheduler), `bridge_neural_prior`
            (a bridge that takes the neural prior's video, and the neural prior), `diffusion` (the matched baseline).
        class_names: Names of the classes, or None for a model that knows only their number.
        num_classes: Number of classes; by default that of the names.
        num_frames: Frames of the video.
        size: Height and width in pixels, or one number for both.
        compression: Pixels per latent row and column: 4 (three blocks in the autoencoder) or 8 (four).
        seed: Seed of the networks' weights. Folders of different kinds with one seed share the neural prior, and all
            share the autoencoder.
        dtype: Type in which the weights are stored.

    Returns:
        The folder.
    """
    height, width = (size, size) if isinstance(size, int) else size
    shape = {
        "sample_height": height // compression,
        "sample_width": width // compression,
        "num_frames": num_frames,
        "class_names": None if class_names is None else list(class_names),
        "num_classes": len(class_names or ()) if num_classes is None else num_classes,
    }
    transformer = neural_prior = scheduler = None
    if kind != "neural_prior":
        transformer = make_tiny_latte_network(seed, takes_neural_prior=kind == "bridge_neural_prior", **shape)
        scheduler = make_latte_backbone() if kind == "diffusion" else FrameBridgeScheduler(target="eps_psi")
    if "neural_prior" in kind:
        neural_prior = make_tiny_latte_network(1000 + seed, stage="neural_prior", **shape)
    pipeline = FrameBridgeLattePipeline(make_tiny_image_vae(compression), transformer, scheduler, neural_prior)
    if dtype != torch.float32:
        pipeline.to(dtype)
    pipeline.save_pretrained(folder)
    return Path(folder)


def make_tiny_latte_network(
    seed: int = 0, *, takes_neural_prior: bool = False, stage: str = "bridge", **shape: Any
) -> LatteTransformer:
    """Returns a Latte with 2 blocks of width 16, whose output is not zero as it is before training."""
    network = LatteTransformer(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS * (2 if takes_neural_prior else 1),
        out_channels=LATENT_CHANNELS,
        stage=stage,
        **shape,
    )
    network.initialize_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network.eval()


def latte_config(
    size: str,
    *,
    num_frames: int = 16,
    sample_height: int = 32,
    sample_width: int = 32,
    class_names: Sequence[str] | None = None,
    num_classes: int = 101,
    takes_neural_prior: bool = False,
    stage: str = "bridge",
) -> dict[str, Any]:
    """Returns the config of a Latte of a named size, for latents of 4 channels."""
    parts = frozenset({"neural_prior"} if takes_neural_prior else ())
    names = None if class_names is None else list(class_names)
    config = scratch_config(size, {"latent_channels": 4}, (num_frames, sample_height, sample_width), names, parts)
    return {"num_classes": num_classes, **config, "stage": stage}


def make_tiny_image_vae(compression: int = 4, **settings: Any) -> AutoencoderKL:
    """Returns an image autoencoder with random weights that compresses 4 or 8 times, as sd-vae-ft-ema does."""
    blocks = {4: 3, 8: 4}[compression]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(8,) * blocks,
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=LATENT_CHANNELS,
            **settings,
        )
    return vae.eval()


def make_latte_backbone() -> CogVideoXDDIMScheduler:
    """Returns the noise schedule that Latte is trained with as a diffusion model: DDPM's linear betas."""
    return CogVideoXDDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="epsilon",
        rescale_betas_zero_snr=False,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def make_tiny_tokenizer(folder: str | Path, max_text_length: int = 16) -> T5Tokenizer:
    """Trains a T5 tokenizer on `CAPTIONS` and writes `spiece.model` and its settings to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_prefix=str(folder / "spiece"),
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": max_text_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return T5Tokenizer.from_pretrained(folder)


def make_clips(
    folder: str | Path,
    count: int = 4,
    frames: int = 9,
    size: int | tuple[int, int] = 64,
    layout: str = "metadata",
    captions: Sequence[str] = CAPTIONS,
) -> Path:
    """Writes `count` mp4 clips of a moving square, with captions in one of finetrainers' dataset layouts.

    Args:
        folder: Where to write; created if absent.
        count: Number of clips.
        frames: Frames of each clip, at 12 per second.
        size: Height and width in pixels, or one number for both; even.
        layout: `metadata` (metadata.csv), `pairs` (0.mp4 and 0.txt) or `lists` (prompts.txt and videos.txt).
        captions: Captions, repeated as needed.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    height, width = (size, size) if isinstance(size, int) else size
    names = [f"{index}.mp4" for index in range(count)]
    texts = [captions[index % len(captions)] for index in range(count)]
    for index, name in enumerate(names):
        write_video(folder / name, moving_square(index, frames, height, width), fps=12)
    if layout == "metadata":
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "caption"), *zip(names, texts, strict=True)])
    elif layout == "pairs":
        for name, text in zip(names, texts, strict=True):
            (folder / name).with_suffix(".txt").write_text(text + "\n")
    elif layout == "lists":
        (folder / "prompts.txt").write_text("\n".join(texts) + "\n")
        (folder / "videos.txt").write_text("\n".join(names) + "\n")
    else:
        raise ValueError(f"unknown layout {layout!r}")
    return folder


def moving_square(index: int, frames: int, height: int, width: int) -> np.ndarray:
    """Returns uint8 frames [F, H, W, 3]; colour, direction and background depend on `index`."""
    generator = np.random.default_rng(index)
    colour, background = generator.integers(0, 256, (2, 3))
    side = max(2, min(height, width) // 4)
    step = generator.integers(-3, 4, 2)
    corner = np.array([height - side, width - side]) // 2
    video_FHWC = np.broadcast_to(background, (frames, height, width, 3)).astype(np.uint8).copy()
    for frame in range(frames):
        top, left = (corner + frame * step) % (height - side + 1, width - side + 1)
        video_FHWC[frame, top : top + side, left : left + side] = colour
    return video_FHWC


def write_video(path: str | Path, video_FHWC: np.ndarray, fps: int = 8) -> Path:
    """Writes uint8 frames [F, H, W, 3] as lossless H.264: what x264 leaves out differs from one time to the next."""
    import av

    path = Path(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"qp": "0"})
        stream.height, stream.width = video_FHWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in video_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
