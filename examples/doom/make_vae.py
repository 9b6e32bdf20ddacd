"""Make the autoencoder of the rendered clips: a linear code of 4x4 pixels, and a trained network that decodes it.

A diffusers `AutoencoderKL` of 16 channels at a quarter of the side. The encoder is not trained: its weights are set so
that it is exactly the projection of each patch of 4x4 pixels on the 16 principal components of the training frames,
which keeps what motion is made of; a trained one of this size loses more. The decoder is trained for the squared
error. The folder that ships in `examples/doom/vae` was made by

    python examples/doom/make_vae.py --data doom-data

The clips of the held-out levels only serve to measure; the numbers go into the folder's README.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch

import framebridge_plugin  # noqa: F401 (repairs torchvision, which diffusers imports)

# isort: split

from diffusers import AutoencoderKL
from torch import nn

from framebridge_plugin.data import read_frames

STEPS, LEARNING_RATE, BATCH, SIDE = 4000, 2e-3, 16, 32  # SIDE: of the pieces that the decoder is trained on
PATCH, CHANNELS, GROUPS = 4, 16, 8
CONSTANT = 1000.0
"""What the last normalisation's groups hold besides the code, so that it divides each by the same number."""
LOG_VARIANCE = -8.0
FRAME_STEP = 5  # neighbouring frames are nearly the same picture

README = """# The autoencoder of the rendered clips

A diffusers `AutoencoderKL` made by `examples/doom/make_vae.py` from the training clips of `render.py`: {channels}
channels, one latent for each 4x4 pixels of each frame. The encoder is a linear code, set and not trained; the decoder
was trained for {steps} updates. {parameters:,} weights in half precision, {size:.1f} MB.

On {count} clips of the {levels} held-out levels, all pixels together: {psnr:.2f} dB; what changes from frame to
frame comes back to {motion:.1%} (of its squared size). The scaling factor, {scaling_factor}, is 1 / (standard
deviation of the training clips' latents); channel by channel, scaled, the deviations are {deviations}.

The clips show levels of Freedoom (BSD 3-clause, copyright the contributors to the Freedoom project).
"""


def read_clips(data: Path, list_name: str, step: int = 1, every: int = 1) -> tuple[list[str], torch.Tensor]:
    """Read clips of one of the split's lists.

    Args:
        data: What `render.py` wrote.
        list_name: trainlist01 or testlist01.
        step: Each step-th frame is read.
        every: Each every-th clip is read.

    Returns:
        Names, and bytes [N, F, 3, H, W].
    """
    names = (data / "ucfTrainTestlist" / f"{list_name}.txt").read_text().split()[::every]
    clips = [read_frames(str(data / "clips" / name), lambda length: range(0, length, step)) for name in names]
    return names, torch.stack(clips)


def pixels(frames: torch.Tensor) -> torch.Tensor:
    """Bytes as values in [-1, 1]."""
    return frames.float() / 127.5 - 1


def patches(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Patches of 4x4 pixels: [B, h, w, 3 * 4 * 4]."""
    cut = pixels_BCHW.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3)


def principal_components(frames_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [48] of the patches of frames, and the [16, 48] projection on their principal components."""
    count, total, products = 0, torch.zeros(48).double(), torch.zeros(48, 48).double()
    for part in frames_BCHW.split(256):
        values = patches(pixels(part)).flatten(0, 2).double()
        count, total, products = count + len(values), total + values.sum(0), products + values.T @ values
    mean = total / count
    _, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    projection = vectors.flip(1)[:, :CHANNELS].T
    return mean.float(), projection.float()


def empty_autoencoder() -> AutoencoderKL:
    """An autoencoder whose residual blocks add nothing yet."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
        sample_size=64,
    )
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    return vae


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, mean: torch.Tensor, projection: torch.Tensor) -> None:
    """Make the encoder the projection of patches less their mean.

    The two convolutions of stride 2 gather a patch. Each component comes with its negative: their group keeps a mean
    of 0, and silu(x) - silu(-x) is x again. Constants so large that nothing else counts fix each group's deviation.

    Args:
        vae: Its encoder is changed.
        mean: [48].
        projection: [16, 48].
    """
    encoder = vae.encoder
    first, second = (encoder.down_blocks[block].downsamplers[0].conv for block in (0, 1))
    for layer in (encoder.conv_in, first, second, encoder.conv_out, vae.quant_conv):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for module in encoder.modules():
        if getattr(module, "conv_shortcut", None) is not None:
            nn.init.dirac_(module.conv_shortcut.weight)
            nn.init.zeros_(module.conv_shortcut.bias)
    nn.init.dirac_(encoder.conv_in.weight[:3])
    for colour in range(3):
        for place in range(4):
            first.weight[4 * colour + place, colour, place // 2, place % 2] = 1
    width = second.out_channels // GROUPS
    kernels = projection.view(CHANNELS, 3, PATCH, PATCH)
    for component in range(CHANNELS):
        target = component // 2 * width + component % 2 * 2
        for sign, channel in ((1, target), (-1, target + 1)):
            for row in range(PATCH):
                for column in range(PATCH):
                    sources = 4 * torch.arange(3) + 2 * (row % 2) + column % 2
                    second.weight[channel, sources, row // 2, column // 2] = sign * kernels[component, :, row, column]
            second.bias[channel] = -sign * float(projection[component] @ mean)
            encoder.conv_out.weight[component, channel, 1, 1] = sign
        vae.quant_conv.weight[component, component] = 1
    for group in range(GROUPS):
        second.bias[group * width + 4] = CONSTANT
        second.bias[group * width + 5] = -CONSTANT
    nn.init.constant_(encoder.conv_norm_out.weight, CONSTANT * math.sqrt(2 / width))
    nn.init.zeros_(encoder.conv_norm_out.bias)
    vae.quant_conv.bias[CHANNELS:] = LOG_VARIANCE


def train_decoder(vae: AutoencoderKL, frames_BCHW: torch.Tensor) -> AutoencoderKL:
    """Train the decoder on what the encoder gives; returns the exponential average of the weights."""
    average = copy.deepcopy(vae)
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    draw, started, errors = torch.Generator().manual_seed(0), time.monotonic(), 0.0
    for step in range(STEPS):
        rate = LEARNING_RATE * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS)) + 1e-5
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(frames_BCHW), (BATCH,), generator=draw)
        top, left = torch.randint(frames_BCHW.shape[-1] - SIDE + 1, (2,), generator=draw).tolist()
        pieces = pixels(frames_BCHW[chosen, :, top : top + SIDE, left : left + SIDE])
        with torch.no_grad():
            latents = vae.encode(pieces).latent_dist.mode()
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents).sample
        loss = (decoded.float() - pieces).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            share = 1 - min(0.995, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), share)
        errors += loss.item() / 4
        if (step + 1) % 200 == 0:
            quality = -10 * math.log10(errors / 200)
            print(f"update {step + 1}: {quality:.2f} dB, {time.monotonic() - started:.0f} s", flush=True)
            errors = 0.0
    return average


@torch.no_grad()
def measure(vae: AutoencoderKL, clips_BFCHW: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB over all pixels, and the share of the squared change from frame to frame that comes back."""
    error = change = missed = 0.0
    for clip in clips_BFCHW:
        true = pixels(clip)
        decoded = vae.decode(vae.encode(true).latent_dist.mode()).sample.clamp(-1, 1)
        error += (decoded - true).square().mean().item() / 4
        change += true.diff(dim=0).square().sum().item()
        missed += (decoded - true).diff(dim=0).square().sum().item()
    return -10 * math.log10(error / len(clips_BFCHW)), 1 - missed / change


def main() -> None:
    """Set, train, find the scaling factor, measure, and write the folder."""
    parser = argparse.ArgumentParser(description="Make the autoencoder of the rendered clips.")
    parser.add_argument("--data", type=Path, default=Path("doom-data"), help="what render.py wrote")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "vae", help="folder to write")
    arguments = parser.parse_args()
    _, clips = read_clips(arguments.data, "trainlist01", FRAME_STEP)
    frames_BCHW = clips.flatten(0, 1)
    vae = empty_autoencoder()
    set_encoder(vae, *principal_components(frames_BCHW))
    vae = train_decoder(vae, frames_BCHW).eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(pixels(part)).latent_dist.mode() for part in frames_BCHW[::10].split(256)])
    scaling_factor = round(1 / latents.std().item(), 4)
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.half().save_pretrained(arguments.output)

    vae = AutoencoderKL.from_pretrained(arguments.output, dtype=torch.float32)
    names, heldout = read_clips(arguments.data, "testlist01", every=8)
    psnr, motion = measure(vae, heldout)
    numbers = {
        "channels": CHANNELS,
        "steps": STEPS,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "size": (arguments.output / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6,
        "count": len(names),
        "levels": len({name.split("_")[2] for name in names}),
        "psnr": psnr,
        "motion": motion,
        "scaling_factor": scaling_factor,
        "deviations": ", ".join(f"{value:.2f}" for value in (latents * scaling_factor).std((0, 2, 3))),
    }
    (arguments.output / "README.md").write_text(README.format(**numbers))
    print((arguments.output / "README.md").read_text())


if __name__ == "__main__":
    main()
