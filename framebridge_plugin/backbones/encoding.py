"""From pixels to the latents that a bridge runs between, and back: the same code for training and for sampling.

Layouts: B batch, F video frames, T latent frames, C channels, H and W height and width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils.torch_utils import randn_tensor

from framebridge_plugin.errors import FrameBridgeError

FRAMES_AT_ONCE = 16
"""Frames that an image autoencoder is given in one call, which bounds its memory; fewer where they are larger than
256 x 256."""
_USUAL_FRAME = 256 * 256


def latent_scale(vae: Any) -> float:
    """The factor from the autoencoder's latents to the network's: `scaling_factor`, or its inverse where the config
    says `invert_scale_latents`; 1 where it has none.
    """
    factor = vae.config.get("scaling_factor") or 1.0
    return 1.0 / factor if vae.config.get("invert_scale_latents") else factor


def latent_shift(vae: AutoencoderKL) -> float:
    """What is taken from an image autoencoder's latents before they are scaled."""
    return vae.config.get("shift_factor") or 0.0


def spatial_compression(vae: Any) -> int:
    """Pixels of a frame's side for one of its latents'."""
    return getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)


def _statistics(vae: Any, like_BCTHW: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and standard deviation by which a video autoencoder's latents are normalised, for each channel."""
    numbers: list[torch.Tensor | float] = []
    buffers = dict(vae.named_buffers(recurse=False))
    for name, default in (("latents_mean", 0.0), ("latents_std", 1.0)):
        found = vae.config.get(name)  # Wan keeps them in its config, LTX beside its weights
        found = buffers.get(name) if found is None else found
        if found is not None:
            found = torch.as_tensor(found, dtype=torch.float32, device=like_BCTHW.device).view(1, -1, 1, 1, 1)
        numbers.append(default if found is None else found)
    return numbers[0], numbers[1]


@torch.no_grad()
def encode_video(vae: Any, video_BFCHW: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Encodes videos [B, F, 3, H, W] in [-1, 1] to normalised float32 latents [B, T, C, h, w], in the autoencoder's
    precision: the mode of the posterior, nothing is drawn. Computed where the autoencoder is, or on `device`
    (offloading hooks move it only when it runs).
    """
    video_BCFHW = video_BFCHW.to(device=device or vae.device, dtype=vae.dtype).transpose(1, 2).contiguous()
    _let_tiles_meet(vae)
    latents_BCTHW = vae.encode(video_BCFHW).latent_dist.mode().float()
    _check_size(vae, latents_BCTHW, video_BCFHW, "latents")
    mean, std = _statistics(vae, latents_BCTHW)
    return ((latents_BCTHW - mean) / std * latent_scale(vae)).transpose(1, 2)


@contextlib.contextmanager
def tiles(vae: Any, switched_on: bool) -> Iterator[None]:
    """Inside it an autoencoder encodes and decodes by tiles, or does not."""
    before = vae.use_tiling
    (vae.enable_tiling if switched_on else vae.disable_tiling)()
    try:
        yield
    finally:
        (vae.enable_tiling if before else vae.disable_tiling)()


def meeting_tiles(vae: Any) -> dict[str, Any]:
    """Arguments of a video autoencoder's `enable_tiling` that are nearest to its tiles and their overlap, in whole
    latents: diffusers rounds pixels and latents apart, and other tiles overlap by more than they are blended over, or
    leave gaps, in a video of another size. Those of the published models stay as they are.
    """
    scale, found = spatial_compression(vae), dict[str, Any]()
    for side in ("height", "width"):
        if (tile := getattr(vae, f"tile_sample_min_{side}", None)) is None:  # an image autoencoder
            continue
        if (stride := getattr(vae, f"tile_sample_stride_{side}", None)) is not None:
            overlap = max(0, math.ceil((tile - stride) / scale))
            latents = max(tile // scale, overlap + 1)
            found[f"tile_sample_stride_{side}"] = (latents - overlap) * scale
        else:
            wanted, latents = getattr(vae, f"tile_overlap_factor_{side}"), max(2, tile // scale)
            while True:  # a factor that is off by one rounding moves a tile by a latent; with two latents it is 1/2
                overlap = min(max(1, round(latents * wanted)), latents - 1)
                factor = overlap / latents
                if int(latents * factor) == overlap and int(latents * (1 - factor)) == latents - overlap:
                    break
                latents -= 1
            found[f"tile_overlap_factor_{side}"] = factor
        found[f"tile_sample_min_{side}"] = latents * scale
    return found


def _let_tiles_meet(vae: Any) -> None:
    if getattr(vae, "use_tiling", False):
        vae.enable_tiling(**meeting_tiles(vae))


def _check_size(vae: Any, latents: torch.Tensor, pixels: torch.Tensor, result: str) -> None:
    """Refuses latents and pixels whose sizes do not belong together, `result` being what tiles gave."""
    if not getattr(vae, "use_tiling", False):
        return
    scale, (h, w), (height, width) = spatial_compression(vae), latents.shape[-2:], pixels.shape[-2:]
    if (h * scale, w * scale) != (height, width):
        raise FrameBridgeError(
            f"the autoencoder's tiles do not meet: frames of {height} x {width} and latents of {h} x {w}, at {scale} "
            f"pixels each, do not belong together (the {result} are wrong); do without tiles (sampling: --tiling off; "
            "training: enable_tiling: false)"
        )


@torch.no_grad()
def decode_video(vae: Any, latents_BTCHW: torch.Tensor) -> torch.Tensor:
    """Decodes normalised latents [B, T, C, h, w] to pixels in about [-1, 1], [B, 3, F, H, W], a video at a time."""
    return torch.cat([_decode_one(vae, latents) for latents in latents_BTCHW.split(1)])


def _decode_one(vae: Any, latents_BTCHW: torch.Tensor) -> torch.Tensor:
    latents_BCTHW = latents_BTCHW.transpose(1, 2).float() / latent_scale(vae)
    mean, std = _statistics(vae, latents_BCTHW)
    latents_BCTHW = (latents_BCTHW * std + mean).to(vae.dtype)
    # LTX 0.9.1 and later denoise in their last step, which they are told the time of: 0, there is no noise left.
    time = {"temb": latents_BCTHW.new_zeros(len(latents_BCTHW))} if vae.config.get("timestep_conditioning") else {}
    _let_tiles_meet(vae)
    pixels_BCFHW = vae.decode(latents_BCTHW, **time).sample
    _check_size(vae, latents_BCTHW, pixels_BCFHW, "frames")
    return pixels_BCFHW


@torch.no_grad()
def encode_frames(
    vae: AutoencoderKL,
    video_BFCHW: torch.Tensor,
    generator: torch.Generator | list[torch.Generator],
    device: torch.device | None = None,
) -> torch.Tensor:
    """Encodes each frame of [B, F, 3, H, W] in [-1, 1] by itself to float32 latents [B, F, C, h, w], one draw of the
    posterior for each, scaled; whoever needs the first frame's more than once takes the same. A list of generators
    gives one to each video; `device` is as for `encode_video`.
    """
    device = device or vae.device
    frames = video_BFCHW.flatten(0, 1)
    means, deviations = [], []
    for some in frames.split(_frames_at_once(video_BFCHW.shape[-2] * video_BFCHW.shape[-1])):
        posterior = vae.encode(some.to(device=device, dtype=vae.dtype)).latent_dist
        _check_size(vae, posterior.mean, some, "latents")
        means.append(posterior.mean.float())
        deviations.append(posterior.std.float())
    mean_BFCHW, std_BFCHW = (torch.cat(parts).unflatten(0, video_BFCHW.shape[:2]) for parts in (means, deviations))
    # Drawn for the whole batch, so that the latents do not depend on how the frames were split.
    noise_BFCHW = randn_tensor(mean_BFCHW.shape, generator=generator, device=device, dtype=torch.float32)
    return (mean_BFCHW + std_BFCHW * noise_BFCHW - latent_shift(vae)) * latent_scale(vae)


@torch.no_grad()
def decode_frames(vae: AutoencoderKL, latents_BFCHW: torch.Tensor) -> torch.Tensor:
    """Decodes latents as `encode_frames` returns them to float32 pixels in about [-1, 1], [B, F, 3, H, W]."""
    latents = (latents_BFCHW.flatten(0, 1) / latent_scale(vae) + latent_shift(vae)).to(vae.dtype)
    at_once = _frames_at_once(latents.shape[-2] * latents.shape[-1] * spatial_compression(vae) ** 2)
    pixels = torch.cat([vae.decode(some).sample.float() for some in latents.split(at_once)])
    _check_size(vae, latents, pixels, "frames")
    return pixels.unflatten(0, latents_BFCHW.shape[:2])


def _frames_at_once(pixels: int) -> int:
    return max(1, min(FRAMES_AT_ONCE, FRAMES_AT_ONCE * _USUAL_FRAME // pixels))


def add_pixel_noise(
    pixels: torch.Tensor, log_mean: float, log_std: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Adds to images [B, 3, H, W] or videos [B, F, 3, H, W] in [-1, 1] Gaussian noise whose standard deviation is
    log-normal, exp(N(log_mean, log_std^2)), one draw a sample (-3 and .5 in the reference, about .05); every pixel of
    every frame gets its own. Drawn on the generator's device; shape, dtype and device as given.
    """
    device = generator.device if generator is not None else pixels.device
    log_sigma = torch.randn(pixels.shape[0], generator=generator, device=device) * log_std + log_mean
    noise = torch.randn(pixels.shape, generator=generator, device=device)
    noise.mul_(log_sigma.exp().view(-1, *[1] * (pixels.ndim - 1)))
    return noise.to(device=pixels.device, dtype=pixels.dtype).add_(pixels)


def noisy_pixels(
    image_BCHW: torch.Tensor, num_frames: int, settings: Any, draw: Callable[[str], torch.Generator | None]
) -> dict[str, torch.Tensor]:
    """What pixel noise makes of first frames in [-1, 1], by an objective's settings: "image" [B, 3, H, W], the
    condition, and "prior" [B, F, 3, H, W], each where it has noise. `draw` gives the generator of each.
    """
    noise, noisy = (settings.noise_log_mean, settings.noise_log_std), {}
    if settings.image_noise:
        noisy["image"] = add_pixel_noise(image_BCHW, *noise, draw("image noise"))
    if settings.prior_noise and settings.objective == "bridge":
        prior_BFCHW = image_BCHW.unsqueeze(1).expand(-1, num_frames, -1, -1, -1)
        noisy["prior"] = add_pixel_noise(prior_BFCHW, *noise, draw("prior noise"))
    return noisy
