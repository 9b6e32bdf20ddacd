"""Train the example's tiny per-frame autoencoder, a diffusers `AutoencoderKL`, on the frames of the training clips.

It stands in for `stabilityai/sd-vae-ft-ema`, which the recipes of the full runs name: four latent channels, one latent
for each 4x4 pixels of each frame. The folder that ships in `examples/ucf101/vae` was made by

    python examples/ucf101/make_vae.py --clips ucf101-data/train --heldout ucf101-data/heldout

The held-out clips only serve to measure; the numbers go into the folder's README.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from pathlib import Path

import torch

import framebridge_plugin  # noqa: F401 (repairs torchvision, which diffusers imports)

# isort: split

from diffusers import AutoencoderKL
from torch.nn.functional import affine_grid, grid_sample

from framebridge_plugin.data import read_frames
from framebridge_plugin.resizing import resize_and_crop

STEPS, LEARNING_RATE, BATCH = 2500, 2e-3, 32
SIDE = 32  # pixels of a picture, as the recipes read it
KL_WEIGHT = 1e-4
RECOLOUR = ((0.7, 1.3), (-0.2, 0.2))  # ranges of each channel's factor and of what is added to it
FRAME_STEP = 3  # neighbouring frames are nearly the same picture

README = """# A tiny autoencoder for single frames

A diffusers `AutoencoderKL`, trained from nothing by `examples/ucf101/make_vae.py` on the frames of the training clips
of `prepare_motion.py`, for `make ucf101-example`. {parameters:,} weights in half precision, {size:.1f} MB; four latent
channels, one latent for each 4x4 pixels; {steps} updates. For trying the software, not for use.

PSNR in dB on held-out clips of {side}x{side} pixels, by group (a group is a shot; the last one is a scene of which
nothing at all was trained on): {psnr}. The scaling factor, {scaling_factor}, is 1 / (standard deviation of the latents
of the training clips).
"""


def load_frames(folder: Path) -> dict[str, torch.Tensor]:
    """Read a class folder's clips.

    Args:
        folder: Folder of class folders.

    Returns:
        Every FRAME_STEP-th frame as bytes [F, 3, H, W], by file name.
    """
    paths = sorted(path for path in folder.glob("*/*") if path.suffix in {".avi", ".mp4"})
    return {path.stem: read_frames(str(path), lambda count: range(0, count, FRAME_STEP)) for path in paths}


def draw_pictures(frames_BCHW: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Draw square cut-outs, half of them mirrored and half of them recoloured: five shots have few palettes.

    Args:
        frames_BCHW: Bytes.
        draw: Source of every random choice.

    Returns:
        Pixels [BATCH, 3, SIDE, SIDE] in [-1, 1].
    """
    pictures = []
    for _ in range(BATCH):
        frame = frames_BCHW[draw.randrange(len(frames_BCHW))]
        size = draw.randint(SIDE, frame.shape[1])
        top, left = draw.randint(0, frame.shape[1] - size), draw.randint(0, frame.shape[2] - size)
        picture = resize_and_crop(frame[None, :, top : top + size, left : left + size], SIDE, SIDE)[0] * 2.0 - 1.0
        if draw.random() < 0.5:
            picture = picture.flip(2)
        if draw.random() < 0.5:
            gain, shift = (torch.tensor([[draw.uniform(*range_)] for _ in range(3)])[..., None] for range_ in RECOLOUR)
            picture = (picture[draw.sample(range(3), 3)] * gain + shift).clamp(-1.0, 1.0)
        pictures.append(picture)
    return torch.stack(pictures)


def draw_moves(draw: random.Random) -> torch.Tensor:
    """Draw small motions of the camera, none at all for half of the pictures.

    Args:
        draw: Source of every random choice.

    Returns:
        Affine maps [BATCH, 2, 3] as `affine_grid` takes them.
    """
    maps = torch.eye(2, 3).repeat(BATCH, 1, 1)
    for affine in maps[: BATCH // 2]:
        affine[:, :2] *= draw.uniform(0.8, 1.0)
        affine[:, 2] = torch.tensor([draw.uniform(-0.1, 0.1) for _ in range(2)])
    return maps


def move(images_BCHW: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Move images, of pixels or of latents, as the maps say."""
    grid = affine_grid(maps, list(images_BCHW.shape), align_corners=False)
    return grid_sample(images_BCHW, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def train(frames_BCHW: torch.Tensor) -> AutoencoderKL:
    """Train the autoencoder from random weights for the squared error.

    Args:
        frames_BCHW: Bytes.

    Returns:
        The exponential average of the weights over the updates.
    """
    draw = random.Random(0)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )
    average = copy.deepcopy(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    started, squared_error = time.monotonic(), 0.0
    for step in range(STEPS):
        rate = LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS)) + 1e-5
        optimizer.param_groups[0]["lr"] = rate
        pictures = draw_pictures(frames_BCHW, draw)
        # The posterior is drawn by hand, in float32: under autocast its variance can overflow.
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encode(pictures).latent_dist.parameters
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-12.0, 2.0)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        maps = draw_moves(draw)
        latents, pictures = move(latents, maps), move(pictures, maps)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents).sample
        error = decoded.float() - pictures
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        # Brightness dominates the squared error; without an extra weight the colours come last.
        colour_error = error - error.mean(dim=1, keepdim=True)
        loss = error.square().mean() + 3.0 * colour_error.square().mean() + 0.1 * error.abs().mean()
        optimizer.zero_grad()
        (loss + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(average.parameters(), vae.parameters(), strict=True):
                averaged.lerp_(parameter, 1.0 - min(0.995, (step + 1) / (step + 10)))
        squared_error += error.square().mean().item()
        if (step + 1) % 100 == 0:
            quality = -10.0 * math.log10(squared_error / 400)
            print(f"update {step + 1}: {quality:.2f} dB, {time.monotonic() - started:.0f} s", flush=True)
            squared_error = 0.0
    return average.eval()


def as_read(frames_BCHW: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as the recipes read them: resized, and the central square."""
    return resize_and_crop(frames_BCHW, SIDE, SIDE) * 2.0 - 1.0


@torch.no_grad()
def heldout_psnr(vae: AutoencoderKL, clips: dict[str, torch.Tensor]) -> dict[str, float]:
    """PSNR in dB of the reconstruction from the posterior's mean, by group: the mean over the group's clips."""
    values: dict[str, list[float]] = {}
    for name, frames in clips.items():
        pixels = as_read(frames)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1.0, 1.0)
        group = name.split("_")[2]
        values.setdefault(group, []).append(-10.0 * math.log10(((decoded - pixels) / 2.0).square().mean().item()))
    return {group: round(sum(numbers) / len(numbers), 2) for group, numbers in sorted(values.items())}


def main() -> None:
    """Train, set the scaling factor, measure, and write the folder."""
    parser = argparse.ArgumentParser(description="Train the tiny autoencoder of the UCF-101 example.")
    parser.add_argument("--clips", type=Path, default=Path("ucf101-data/train"), help="class folders to train on")
    parser.add_argument(
        "--heldout", type=Path, default=Path("ucf101-data/heldout"), help="class folders to measure on"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "vae", help="folder to write")
    arguments = parser.parse_args()
    frames_BCHW = torch.cat(list(load_frames(arguments.clips).values()))
    vae = train(frames_BCHW)
    with torch.no_grad():
        latents = vae.encode(as_read(frames_BCHW[::10])).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 4))
    vae.half().save_pretrained(arguments.output)

    vae = AutoencoderKL.from_pretrained(arguments.output, dtype=torch.float32)
    numbers = {
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "size": (arguments.output / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6,
        "steps": STEPS,
        "side": SIDE,
        "psnr": ", ".join(f"{k} {v}" for k, v in heldout_psnr(vae, load_frames(arguments.heldout)).items()),
        "scaling_factor": vae.config.scaling_factor,
    }
    (arguments.output / "README.md").write_text(README.format(**numbers))
    print((arguments.output / "README.md").read_text())


if __name__ == "__main__":
    main()
