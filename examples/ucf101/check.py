"""Measure what the example's three runs learned, on clips that nothing was trained on, and fail if it is little.

    python examples/ucf101/check.py --neural-prior runs/motion_neural_prior --bridge runs/motion_bridge \\
        --bridge-neural-prior runs/motion_bridge_neural_prior --heldout ucf101-data/heldout --output runs/motion_check

It prints every number, writes `check.json` and the contact sheet `check.png` into the output folder, and ends with
exit code 1 and one line for each statement that does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from framebridge_plugin import FrameBridgeLattePipeline
from framebridge_plugin.backbones.encoding import decode_frames, encode_frames
from framebridge_plugin.backbones.latte.networks import call_latte
from framebridge_plugin.data import ClipSettings, index_dataset, read_clip
from framebridge_plugin.media import contact_sheet
from framebridge_plugin.training.objective import bridge_prediction

WINDOW_FRAMES = 22  # as in the recipes
NOISES_PER_CLIP = 10
BATCH = 18  # clips at once
SEEDS = (0, 1)  # one sample of every held-out clip from each
SAMPLING_STEPS = 50
MINIMUM_FIRST_FRAME_PSNR = 20.0  # dB, against what the autoencoder makes of the image
MOTION_RANGE = (0.5, 2.0)  # mean frame difference of the samples relative to that of the real clips
SHOWN = ("PanLeft_g08_c01", "ZoomOut_g08_c03", "PanUp_g07_c01", "PanRight_g06_c02")


@dataclass(frozen=True)
class HeldOut:
    """The held-out clips.

    Attributes:
        names: File names without their ending.
        classes: Class names.
        video: Pixels [B, F, 3, H, W] in [-1, 1].
        z_0: Their latents [B, F, C, h, w].
    """

    names: list[str]
    classes: list[str]
    video: torch.Tensor
    z_0: torch.Tensor

    @property
    def still(self) -> torch.Tensor:
        """The first frame's latent, repeated over the frames."""
        return self.z_0[:, :1].expand_as(self.z_0)


def load_heldout(folder: Path, pipeline: FrameBridgeLattePipeline) -> HeldOut:
    """Read and encode the held-out clips, every one from its first frame on.

    Args:
        folder: Folder of class folders.
        pipeline: A trained model; its size of a clip and its autoencoder are used.

    Returns:
        The clips.
    """
    config = pipeline.neural_prior.config
    height, width = (size * pipeline.vae_scale_factor for size in (config.sample_height, config.sample_width))
    settings = ClipSettings(
        config.num_frames, height, width, window="start", frame_sampling="linspace", window_frames=WINDOW_FRAMES
    )
    rows = sorted(index_dataset({"class_root": str(folder)}))
    video = torch.stack([read_clip(path, settings, torch.Generator()) for path, _ in rows])
    z_0 = encode_frames(pipeline.vae, video, torch.Generator().manual_seed(0))
    return HeldOut([Path(path).stem for path, _ in rows], [name for _, name in rows], video, z_0)


@torch.no_grad()
def predict_coarse(pipeline: FrameBridgeLattePipeline, clips: HeldOut) -> torch.Tensor:
    """The neural prior's videos of the clips' first frames, [B, F, C, h, w]."""
    labels = torch.tensor([pipeline.neural_prior.label_of(name) for name in clips.classes])
    batches = zip(clips.still.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([call_latte(pipeline.neural_prior, still, None, label) for still, label in batches])


@torch.no_grad()
def bridge_losses(pipeline: FrameBridgeLattePipeline, clips: HeldOut, coarse: torch.Tensor | None) -> dict[str, float]:
    """The bridge loss on a fixed set of (clip, index, eps), for the network and for two answers that need none.

    Args:
        pipeline: The trained model.
        clips: The held-out clips.
        coarse: The neural prior's videos, where the bridge starts from them.

    Returns:
        The loss of the network, of the output 0, and of the output that says z_0 = the still image.
    """
    generator = torch.Generator().manual_seed(0)
    scheduler = pipeline.scheduler
    labels = torch.tensor([pipeline.transformer.label_of(name) for name in clips.classes])
    prior = clips.still if coarse is None else coarse
    sums = {"network": 0.0, "output 0": 0.0, "still image": 0.0}
    for number in range(NOISES_PER_CLIP):
        # One index per tenth of the schedule, drawn anew for every clip.
        share = (number + torch.rand(len(clips.names), generator=generator)) / NOISES_PER_CLIP
        index = (share * scheduler.config.num_train_timesteps).floor()
        noise = torch.randn(clips.z_0.shape, generator=generator)
        for some in torch.arange(len(clips.names)).split(BATCH):

            def network(latents: torch.Tensor, time: torch.Tensor, some: torch.Tensor = some) -> torch.Tensor:
                prior_channels = None if coarse is None else coarse[some]
                image = clips.z_0[some, :1]
                return call_latte(pipeline.transformer, latents, time, labels[some], image, prior_channels)

            z_0 = clips.z_0[some]
            prediction, target = bridge_prediction(network, scheduler, z_0, prior[some], noise[some], index[some])
            # The target is (z_t - z_0) / sigma, so an error in z_0 counts 1 / sigma of itself.
            sigma = scheduler.schedule.coefficients(index[some]).sigma.float().view(-1, 1, 1, 1, 1)
            errors = (prediction - target, target, (z_0 - clips.still[some]) / sigma)
            for name, error in zip(sums, errors, strict=True):
                sums[name] += error.square().mean().item() * len(some)
    return {name: total / (NOISES_PER_CLIP * len(clips.names)) for name, total in sums.items()}


def sample(pipeline: FrameBridgeLattePipeline, clips: HeldOut, seed: int) -> torch.Tensor:
    """Videos from the clips' first frames and classes, pixels [B, F, 3, H, W] in [-1, 1]."""
    videos = []
    for some in torch.arange(len(clips.names)).split(BATCH):
        frames = pipeline(
            image=clips.video[some, 0] / 2.0 + 0.5,
            class_label=[clips.classes[i] for i in some],
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(1000 * seed + int(i)) for i in some],
            output_type="pt",
        ).frames
        videos.append(frames * 2.0 - 1.0)
    return torch.cat(videos)


def error_of(video: torch.Tensor, clips: HeldOut) -> torch.Tensor:
    """Mean squared error to the true clip after the first frame, one number per clip, pixels in [-1, 1]."""
    return (video.clamp(-1, 1) - clips.video)[:, 1:].square().mean(dim=(1, 2, 3, 4))


def frame_difference(video: torch.Tensor) -> float:
    """Mean absolute difference of successive frames, pixels in [-1, 1]."""
    return (video[:, 1:] - video[:, :-1]).abs().mean().item()


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """PSNR in dB of pixels in [-1, 1], over the whole tensor."""
    return -10.0 * math.log10(((first.clamp(-1, 1) - second.clamp(-1, 1)) / 2.0).square().mean().item())


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure everything and draw the contact sheet.

    Args:
        arguments: The command line.

    Returns:
        The numbers by name.
    """
    folders = {
        "neural prior": arguments.neural_prior,
        "bridge": arguments.bridge,
        "bridge + neural prior": arguments.bridge_neural_prior,
    }
    pipelines = {
        name: FrameBridgeLattePipeline.from_pretrained(folder / "model", dtype=torch.float32)
        for name, folder in folders.items()
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    vae = pipelines["neural prior"].vae
    clips = load_heldout(arguments.heldout, pipelines["neural prior"])
    coarse = predict_coarse(pipelines["neural prior"], clips)

    numbers = {
        "loss | neural prior | network": (coarse - clips.z_0).square().mean().item(),
        "loss | neural prior | output 0": clips.z_0.square().mean().item(),
        "loss | neural prior | still image": (clips.still - clips.z_0).square().mean().item(),
    }
    for name in ("bridge", "bridge + neural prior"):
        losses = bridge_losses(pipelines[name], clips, None if name == "bridge" else coarse)
        numbers |= {f"loss | {name} | {answer}": loss for answer, loss in losses.items()}

    reconstruction = decode_frames(vae, clips.z_0)
    shown = {"real": clips.video, "autoencoder": reconstruction, "neural prior": decode_frames(vae, coarse)}
    videos = {name: [sample(pipelines[name], clips, seed) for seed in SEEDS] for name in list(pipelines)[1:]}
    shown |= {name: samples[0] for name, samples in videos.items()}
    errors = {name: torch.stack([error_of(video, clips) for video in samples]) for name, samples in videos.items()}
    # Clips differ more than the two models do: the difference is taken clip by clip.
    gain = (errors["bridge"] - errors["bridge + neural prior"]).mean(dim=0)
    still = reconstruction[:, :1].expand_as(reconstruction)
    numbers |= {
        "error | autoencoder": error_of(reconstruction, clips).mean().item(),
        "error | still image": error_of(still, clips).mean().item(),
        "error | neural prior": error_of(shown["neural prior"], clips).mean().item(),
        **{f"error | {name}": error.mean().item() for name, error in errors.items()},
        "error | gain by the neural prior": gain.mean().item(),
        "error | standard error of the gain": (gain.std() / len(gain) ** 0.5).item(),
        "frame difference | real": frame_difference(clips.video),
        "frame difference | autoencoder": frame_difference(reconstruction),
        "frame difference | neural prior": frame_difference(shown["neural prior"]),
    }
    for name, samples in videos.items():
        numbers[f"frame difference | {name}"] = sum(map(frame_difference, samples)) / len(samples)
        numbers[f"first frame PSNR | {name}"] = psnr(
            torch.cat(samples)[:, 0], still[:, 0].repeat(len(samples), 1, 1, 1)
        )

    rows, labels = [], []
    for name in SHOWN:
        i = clips.names.index(f"v_{name}")
        for label, video in shown.items():
            enlarged = video[i].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            rows.append((enlarged / 2.0 + 0.5).clamp(0.0, 1.0))
            labels.append(f"{name}: {label}")
    contact_sheet(rows, arguments.output / "check.png", columns=clips.video.shape[1], labels=labels)
    return numbers


def failures(numbers: dict[str, float]) -> list[str]:
    """Say what does not hold, one line each (a number that is not finite never holds)."""
    statements = []
    for name in ("neural prior", "bridge", "bridge + neural prior"):
        for answer in ("output 0", "still image"):
            holds = numbers[f"loss | {name} | network"] < numbers[f"loss | {name} | {answer}"]
            statements.append((holds, f"the loss of the {name} is below that of the {answer}"))
    low, high = (bound * numbers["frame difference | real"] for bound in MOTION_RANGE)
    for name in ("bridge", "bridge + neural prior"):
        starts = numbers[f"first frame PSNR | {name}"] >= MINIMUM_FIRST_FRAME_PSNR
        statements.append((starts, f"the samples of the {name} start at the image ({MINIMUM_FIRST_FRAME_PSNR} dB)"))
        moves = low <= numbers[f"frame difference | {name}"] <= high
        statements.append((moves, f"the samples of the {name} move {MOTION_RANGE} times as the real clips"))
    gains = numbers["error | bridge + neural prior"] < numbers["error | bridge"]
    statements.append((gains, "the samples with the neural prior are nearer to the true clips than those without"))
    return [statement for holds, statement in statements if not holds]


def main() -> None:
    """Measure, print, write, and fail where a statement does not hold."""
    parser = argparse.ArgumentParser(description="Measure the results of the UCF-101 example on held-out clips.")
    parser.add_argument("--neural-prior", type=Path, required=True, help="folder of the neural prior's run")
    parser.add_argument("--bridge", type=Path, required=True, help="folder of the bridge's run")
    parser.add_argument("--bridge-neural-prior", type=Path, required=True, help="folder of the third run")
    parser.add_argument("--heldout", type=Path, required=True, help="class folders of held-out clips")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    numbers = measure(arguments)
    for name, value in numbers.items():
        print(f"{name:50} {value:9.4f}")
    failed = failures(numbers)
    (arguments.output / "check.json").write_text(json.dumps({"numbers": numbers, "failed": failed}, indent=2) + "\n")
    for statement in failed:
        print(f"does not hold: {statement}")
    if failed:
        raise SystemExit(1)
    print(f"all statements hold; look at {arguments.output / 'check.png'}")


if __name__ == "__main__":
    main()
