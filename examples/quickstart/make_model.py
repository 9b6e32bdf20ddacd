"""Train the quickstart's tiny CogVideoX text-to-video folder on real clips, from nothing.

The folder has everything that a real CogVideoX checkpoint has (tokenizer, T5 text encoder, causal 3D VAE, transformer,
scheduler), only smaller, and its weights are trained: the VAE on the clips' pixels, then the transformer and, jointly,
the text encoder as an ordinary text-to-video diffusion model with CogVideoX-2B's noise schedule and v-prediction. It
knows nothing of images as a condition, nor of bridges: that is what the quickstart then teaches it.

Only the training clips of `prepare_clips.py` are used; the held-out ones serve to measure.

    python examples/quickstart/make_model.py --clips quickstart-data/train --heldout quickstart-data/heldout

The stages are `vae` and `transformer`; `--stage transformer` keeps the VAE that is in the folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch

import framebridge_plugin  # noqa: F401 (repairs torchvision, which diffusers imports)

# isort: split

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from framebridge_plugin.data import ClipSettings, index_dataset, read_clip, read_frames

FRAMES, SIDE, STRIDE = 9, 64, 2  # a training example of the recipe
LATENT_CHANNELS = 6
TEXT_LENGTH = 48  # tokens of a caption; the longest has 42
TEXT_WIDTH = 32

VAE_STEPS, VAE_LEARNING_RATE = 1200, 2e-3
VAE_WHOLE_CLIPS_FROM = 0.85  # part of the VAE's training after which it sees whole clips instead of small cut-outs
TRANSFORMER_STEPS, TRANSFORMER_LEARNING_RATE, TRANSFORMER_BATCH = 1600, 1.5e-3, 8
CACHED_WINDOWS = 1000
CAPTION_DROPOUT = 0.1

COGVIDEOX_2B_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}

README = """# A tiny CogVideoX text-to-video model

Trained from nothing by `examples/quickstart/make_model.py` on the training clips of `prepare_clips.py`, for
`make quickstart`. All parts of a CogVideoX folder are there and trained, the text encoder together with the
transformer; half precision. It makes {frames} frames of {side}x{side} pixels and knows six scenes: for trying the
software, not for use.

| part | weights | size on disk |
|---|---|---|
{parts}

| stage | updates | time on two shared cores |
|---|---|---|
| VAE | {vae_steps} | {vae_seconds} s |
| transformer and text encoder | {transformer_steps} | {transformer_seconds} s |

PSNR of the VAE in dB on clips that nothing was trained on (the whole scene `carphone_pristine`, the last fifth of the
others): {vae_psnr}.

Diffusion loss (v-prediction, mean over the timesteps): {transformer_loss} on the training windows at the end,
{transformer_loss_heldout} on the held-out clips. An output of 0 scores about 1.
"""


class Clips:
    """All clips of a folder in memory, as uint8 tensors [F, 3, H, W], with their captions.

    Args:
        folder: Folder in finetrainers' `metadata.csv` layout.
    """

    def __init__(self, folder: Path) -> None:
        self.videos: list[torch.Tensor] = []
        self.captions: list[str] = []
        for path, caption in index_dataset({"data_root": str(folder)}):
            self.videos.append(read_frames(path, range))
            self.captions.append(caption)

    def window(self, draw: random.Random, frames: int, side: int, zoom: float = 2.0) -> tuple[torch.Tensor, str]:
        """Draw a random window in time and space.

        Args:
            draw: Source of every random choice.
            frames: Number of frames.
            side: Height and width in pixels.
            zoom: The cut-out's side in the clip is between `side` and `zoom * side` pixels.

        Returns:
            Video [F, 3, side, side] in [-1, 1] and its caption.
        """
        number = draw.randrange(len(self.videos))
        video = self.videos[number]
        stride = min(draw.choice((1, 2, 2, 3)), (len(video) - 1) // (frames - 1))
        start = draw.randrange(len(video) - (frames - 1) * stride)
        size = draw.choice((draw.randint(side, round(zoom * side)), round(zoom * side)))
        top, left = draw.randint(0, video.shape[2] - size), draw.randint(0, video.shape[3] - size)
        cut = video[start : start + (frames - 1) * stride + 1 : stride, :, top : top + size, left : left + size]
        cut = cut.flip(3) if draw.random() < 0.5 else cut
        pixels = cut.float() / 127.5 - 1.0
        return interpolate(pixels, size=(side, side), mode="bilinear", antialias=True), self.captions[number]


def recolour(video: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Swap, scale and shift the colour channels at random, so that six scenes teach the VAE more than six palettes."""
    if draw.random() < 0.5:
        return video
    gain = torch.tensor([draw.uniform(0.7, 1.3) for _ in range(3)]).view(1, 3, 1, 1)
    shift = torch.tensor([draw.uniform(-0.2, 0.2) for _ in range(3)]).view(1, 3, 1, 1)
    return (video[:, draw.sample(range(3), 3)] * gain + shift).clamp(-1.0, 1.0)


def schedule_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Warm up over 100 steps, then follow half a cosine down to nearly zero."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5


def update(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, models: Iterable[torch.nn.Module], averages: list, step: int
) -> None:
    """One clipped optimiser step, and one step of the exponential moving average of the weights."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    optimizer.zero_grad()
    loss.backward()
    # A rare overflow of bfloat16 must not end the run: such a step is left out.
    if torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
        optimizer.step()
    decay = min(0.995, (step + 1) / (step + 10))
    averaged = [parameter for model in averages for parameter in model.parameters()]
    with torch.no_grad():
        for average, parameter in zip(averaged, parameters, strict=True):
            average.lerp_(parameter, 1.0 - decay)


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1], over all their values."""
    return -10.0 * math.log10(((first - second) / 2.0).square().mean().item())


@torch.no_grad()
def encode(vae: AutoencoderKLCogVideoX, video_BFCHW: torch.Tensor) -> torch.Tensor:
    """The mode of the VAE's posterior, unscaled, as [B, F, C, H, W]."""
    return vae.encode(video_BFCHW.transpose(1, 2)).latent_dist.mode().transpose(1, 2)


@torch.no_grad()
def heldout_psnr(vae: AutoencoderKLCogVideoX, folder: Path) -> dict[str, float]:
    """PSNR of the VAE on the held-out clips, one number per source video (the mean over its clips)."""
    settings = ClipSettings(num_frames=FRAMES, height=SIDE, width=SIDE, frame_stride=STRIDE, window="start")
    values: dict[str, list[float]] = {}
    for path, _ in index_dataset({"data_root": str(folder)}):
        video = read_clip(path, settings, torch.Generator().manual_seed(0))
        decoded = vae.decode(encode(vae, video[None]).transpose(1, 2)).sample[0].transpose(0, 1).clamp(-1.0, 1.0)
        values.setdefault(Path(path).name.split("-")[0], []).append(psnr(decoded, video))
    return {name: round(sum(numbers) / len(numbers), 2) for name, numbers in values.items()}


def train_vae(clips: Clips) -> AutoencoderKLCogVideoX:
    """Train the VAE from random weights for the mean squared error, on cut-outs first and on whole clips last."""
    draw = random.Random(0)
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(16, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        temporal_compression_ratio=2,
        sample_height=SIDE,
        sample_width=SIDE,
    )
    average = copy.deepcopy(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    started, squared_error = time.monotonic(), 0.0
    for step in range(VAE_STEPS):
        schedule_learning_rate(optimizer, VAE_LEARNING_RATE, step, VAE_STEPS)
        batch, frames, side = (4, 5, 48) if step < VAE_WHOLE_CLIPS_FROM * VAE_STEPS else (2, FRAMES, SIDE)
        videos = [recolour(clips.window(draw, frames, side)[0], draw) for _ in range(batch)]
        video_BCFHW = torch.stack(videos).transpose(1, 2)
        # The posterior is drawn by hand, in float32 and with a bounded variance: under autocast it can overflow.
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encode(video_BCFHW).latent_dist.parameters
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-12.0, 2.0)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents).sample
        error = decoded.float() - video_BCFHW
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        # Brightness dominates the squared error; without an extra weight the colours come last, or never.
        colour_error = error - error.mean(dim=1, keepdim=True)
        loss = error.square().mean() + 3.0 * colour_error.square().mean() + 0.1 * error.abs().mean()
        loss = loss + 1e-6 * divergence
        update(optimizer, loss, [vae], [average], step)
        squared_error += error.square().mean().item()
        if (step + 1) % 100 == 0:
            quality = -10.0 * math.log10(squared_error / 400)
            print(f"vae step {step + 1}: {quality:.2f} dB, {time.monotonic() - started:.0f} s", flush=True)
            squared_error = 0.0
    return average.eval()


def make_tokenizer(captions: list[str], folder: Path) -> T5Tokenizer:
    """Train a sentencepiece model on the captions and write it as a T5 tokenizer.

    Args:
        captions: Sentences to train on.
        folder: The tokenizer's folder; `spiece.model` and its configuration are written.

    Returns:
        The tokenizer as `from_pretrained` loads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=file,
            vocab_size=160,  # an upper limit: so few sentences hold fewer pieces
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
            normalization_rule_name="identity",  # the default rule's table alone takes 240 kB
        )
    configuration = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": TEXT_LENGTH,
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n")
    return T5Tokenizer.from_pretrained(folder)


def tokenize(tokenizer: T5Tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids [B, TEXT_LENGTH], padded as CogVideoX's pipelines pad them."""
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return tokens.input_ids


def train_transformer(
    clips: Clips, vae: AutoencoderKLCogVideoX, tokenizer: T5Tokenizer, scheduler: CogVideoXDDIMScheduler
) -> tuple[CogVideoXTransformer3DModel, T5EncoderModel, float]:
    """Train the transformer and the text encoder together as a text-to-video diffusion model (v-prediction).

    Args:
        clips: Training clips.
        vae: Trained VAE; its scaling factor is set here to 1 / (standard deviation of the latents).
        tokenizer: Tokenizer of the captions.
        scheduler: The noise schedule.

    Returns:
        Transformer and text encoder, averaged over the steps, and the training loss of the last tenth of them.
    """
    draw = random.Random(1)
    torch.manual_seed(1)
    windows = [clips.window(draw, FRAMES, SIDE) for _ in range(CACHED_WINDOWS)]
    encoded = [encode(vae, torch.stack([video for video, _ in windows[i : i + 8]])) for i in range(0, len(windows), 8)]
    latents = torch.cat(encoded)
    scaling_factor = round(1.0 / latents.std().item(), 4)
    vae.register_to_config(scaling_factor=scaling_factor)
    latents = latents * scaling_factor
    captions = sorted(set(clips.captions))
    caption_of_window = torch.tensor([captions.index(caption) for _, caption in windows])
    token_ids = tokenize(tokenizer, [*captions, ""])
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=44,  # width 176: a token's 96 values and, after widening, the image's have to fit in
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=32,
        text_embed_dim=TEXT_WIDTH,
        num_layers=3,
        sample_width=latents.shape[4],
        sample_height=latents.shape[3],
        sample_frames=FRAMES,
        patch_size=4,
        temporal_compression_ratio=2,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
    )
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    models = [transformer, text_encoder]
    averages = copy.deepcopy(models)
    parameters = [parameter for model in models for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TRANSFORMER_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    started = time.monotonic()
    losses: list[float] = []
    for step in range(TRANSFORMER_STEPS):
        schedule_learning_rate(optimizer, TRANSFORMER_LEARNING_RATE, step, TRANSFORMER_STEPS)
        chosen = torch.randint(len(latents), (TRANSFORMER_BATCH,))
        caption = caption_of_window[chosen]
        caption = torch.where(torch.rand(TRANSFORMER_BATCH) < CAPTION_DROPOUT, len(captions), caption)
        z_0, noise = latents[chosen], torch.randn_like(latents[chosen])
        timestep = torch.randint(scheduler.config.num_train_timesteps, (TRANSFORMER_BATCH,))
        noisy, target = scheduler.add_noise(z_0, noise, timestep), scheduler.get_velocity(z_0, noise, timestep)
        with torch.autocast("cpu", torch.bfloat16):
            text = text_encoder(token_ids)[0][caption]
            output = transformer(noisy, text, timestep, return_dict=False)[0]
        loss = (output.float() - target).square().mean()
        update(optimizer, loss, models, averages, step)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = sum(losses[-100:]) / 100
            print(f"transformer step {step + 1}: {recent:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    last = losses[-(TRANSFORMER_STEPS // 10) :]
    return averages[0].eval(), averages[1].eval(), sum(last) / len(last)


@torch.no_grad()
def heldout_loss(output: Path, heldout: Path) -> float:
    """Diffusion loss of the written folder on the held-out clips, on a fixed set of timesteps and noises."""
    pipeline = CogVideoXPipeline.from_pretrained(output, dtype=torch.float32)
    settings = ClipSettings(num_frames=FRAMES, height=SIDE, width=SIDE, frame_stride=STRIDE, window="start")
    generator = torch.Generator().manual_seed(0)
    losses = []
    for path, caption in index_dataset({"data_root": str(heldout)}):
        video = read_clip(path, settings, generator)
        z_0 = encode(pipeline.vae, video[None]) * pipeline.vae.config.scaling_factor
        text = pipeline.text_encoder(tokenize(pipeline.tokenizer, [caption]))[0]
        for timestep in torch.arange(25, 1000, 50):
            noise = torch.randn(z_0.shape, generator=generator)
            noisy = pipeline.scheduler.add_noise(z_0, noise, timestep[None])
            prediction = pipeline.transformer(noisy, text, timestep[None], return_dict=False)[0]
            target = pipeline.scheduler.get_velocity(z_0, noise, timestep[None])
            losses.append((prediction - target).square().mean().item())
    return sum(losses) / len(losses)


def write_readme(output: Path, numbers: dict) -> None:
    """Write what the folder is, how large, and what was measured."""
    rows = []
    for name in ("vae", "transformer", "text_encoder"):
        weights = next((output / name).glob("*.safetensors"))
        count = sum(tensor.numel() for tensor in load_file(weights).values())
        rows.append(f"| {name} | {count:,} | {weights.stat().st_size / 1e6:.2f} MB |")
    quality = ", ".join(f"{name} {value:.2f}" for name, value in numbers["vae_psnr"].items())
    text = README.format(**{**numbers, "vae_psnr": quality, "parts": "\n".join(rows), "frames": FRAMES, "side": SIDE})
    (output / "README.md").write_text(text)


def main() -> None:
    """Run the stages and write the folder."""
    parser = argparse.ArgumentParser(description="Train the quickstart's tiny CogVideoX folder from nothing.")
    parser.add_argument("--clips", type=Path, default=Path("quickstart-data/train"), help="folder to train on")
    parser.add_argument("--heldout", type=Path, default=Path("quickstart-data/heldout"), help="folder to measure on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model", help="folder to write")
    parser.add_argument("--stage", choices=("all", "transformer"), default="all", help="transformer keeps the VAE")
    arguments = parser.parse_args()
    output: Path = arguments.output
    clips = Clips(arguments.clips)
    # What the VAE's stage measured stays beside the VAE, for a later run of the second stage alone.
    vae_numbers_path = output / "vae" / "training.json"

    if arguments.stage == "all":
        started = time.monotonic()
        vae = train_vae(clips)
        numbers = {"vae_steps": VAE_STEPS, "vae_seconds": round(time.monotonic() - started)}
        vae.half().save_pretrained(output / "vae")
        vae_numbers_path.write_text(json.dumps(numbers) + "\n")
    numbers = json.loads(vae_numbers_path.read_text())
    vae = AutoencoderKLCogVideoX.from_pretrained(output / "vae", dtype=torch.float32)
    numbers["vae_psnr"] = heldout_psnr(vae, arguments.heldout)
    print(f"PSNR of the VAE on the held-out clips: {numbers['vae_psnr']}", flush=True)

    started = time.monotonic()
    tokenizer = make_tokenizer(sorted(set(clips.captions)), output / "tokenizer")
    scheduler = CogVideoXDDIMScheduler(**COGVIDEOX_2B_SCHEDULE)
    transformer, text_encoder, loss = train_transformer(clips, vae, tokenizer, scheduler)
    numbers["transformer_steps"], numbers["transformer_loss"] = TRANSFORMER_STEPS, f"{loss:.3f}"
    numbers["transformer_seconds"] = round(time.monotonic() - started)
    # The VAE's weights are in half precision already; only its scaling factor is new.
    CogVideoXPipeline(tokenizer, text_encoder.half(), vae.half(), transformer.half(), scheduler).save_pretrained(
        output
    )
    numbers["transformer_loss_heldout"] = f"{heldout_loss(output, arguments.heldout):.3f}"
    write_readme(output, numbers)
    print((output / "README.md").read_text())


if __name__ == "__main__":
    main()
