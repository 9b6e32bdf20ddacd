"""Measure what the quickstart's training run learned, on clips that nothing was trained on, and fail if it is little.

    python examples/quickstart/check.py --model-before examples/quickstart/model --run runs/quickstart \\
        --heldout quickstart-data/heldout --sample runs/quickstart/sample.mp4 \\
        --image quickstart-data/images/bikes-200-centre.png

It prints every number, writes `check.json` and the contact sheet `check.png` (real clip, the VAE's reconstruction of
it, the bridge's sample from its first frame) into the run's folder, and ends with exit code 1 and one line for each
statement that does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from framebridge_plugin import FrameBridgeCogVideoXPipeline
from framebridge_plugin.backbones.cogvideox.adapter import load_bridge_transformer
from framebridge_plugin.backbones.encoding import encode_video
from framebridge_plugin.backbones.sampling_loop import images_to_pixels
from framebridge_plugin.bridge import BridgeSchedule
from framebridge_plugin.data import ClipSettings, index_dataset, read_clip, read_frames
from framebridge_plugin.media import contact_sheet
from framebridge_plugin.progress import alone
from framebridge_plugin.training.objective import bridge_prediction

HELDOUT_SCENE = "carphone_pristine"  # the scene of which nothing at all was trained on
FRAME_STRIDE = 2  # as in recipes/quickstart.yaml
NOISES_PER_CLIP = 10
SAMPLING_STEPS = 25
MINIMUM_VAE_PSNR = 24.0
MINIMUM_PSNR = 20.0  # dB, first frame of a sample against what the VAE makes of the image
MINIMUM_FOLLOWING_PSNR = 16.0  # dB, all frames of the samples against the real clips, which go on as they like
MOTION_RANGE = (0.5, 2.0)  # motion of the samples relative to that of the real clips


@dataclass(frozen=True)
class HeldOut:
    """The held-out clips and what the model makes of them.

    Attributes:
        names: File names without their ending.
        video: Pixels [B, F, 3, H, W] in [-1, 1].
        z_0: Their latents [B, T, C, h, w].
        z_image: The latent of the first frame, repeated over time, of the same shape.
        text: Caption embeddings [B, L, D].
    """

    names: list[str]
    video: torch.Tensor
    z_0: torch.Tensor
    z_image: torch.Tensor
    text: torch.Tensor


@torch.no_grad()
def load_heldout(folder: Path, pipeline: FrameBridgeCogVideoXPipeline) -> HeldOut:
    """Read and encode the held-out clips, every one from its first frame on.

    Args:
        folder: Folder with a `metadata.csv`.
        pipeline: The trained model; its size of a clip is used.

    Returns:
        The clips.
    """
    config = pipeline.config
    settings = ClipSettings(config.num_frames, config.height, config.width, frame_stride=FRAME_STRIDE, window="start")
    rows = list(index_dataset({"data_root": str(folder)}))
    video = torch.stack([read_clip(path, settings, torch.Generator()) for path, _ in rows])
    z_0 = encode_video(pipeline.vae, video)
    text, _ = pipeline.encode_prompt(
        [caption for _, caption in rows],
        do_classifier_free_guidance=False,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
    )
    z_image = encode_video(pipeline.vae, (video[:, 0]).unsqueeze(1)).expand_as(z_0)
    return HeldOut([Path(path).stem for path, _ in rows], video, z_0, z_image, text)


@torch.no_grad()
def bridge_losses(
    transformer: torch.nn.Module, pipeline: FrameBridgeCogVideoXPipeline, clips: HeldOut
) -> dict[str, list[float]]:
    """The bridge loss on a fixed set of (clip, index, noise), for a network and for two answers that need none.

    Args:
        transformer: The network, before or after the run.
        pipeline: The trained model; its scheduler has the bridge's settings.
        clips: The held-out clips.

    Returns:
        For "network", for "zero" (the output 0) and for "still" (the output that says z_0 = the still image): the loss
        at each of NOISES_PER_CLIP indices from the data to the prior, averaged over the clips.
    """
    generator = torch.Generator().manual_seed(0)
    schedule: BridgeSchedule = pipeline.scheduler.schedule
    losses: dict[str, list[float]] = {"network": [], "zero": [], "still": []}
    for number in range(NOISES_PER_CLIP):
        # One index per tenth of the schedule, drawn anew for every clip.
        share = (number + torch.rand(len(clips.names), generator=generator)) / NOISES_PER_CLIP
        index = (share * schedule.num_train_timesteps).floor()
        noise = torch.randn(clips.z_0.shape, generator=generator)
        prediction, target = bridge_prediction(
            lambda latents, time: transformer(
                torch.cat([latents, clips.z_image], dim=2), clips.text, time, return_dict=False
            )[0],
            pipeline.scheduler,
            clips.z_0,
            clips.z_image,
            noise,
            index,
        )
        # An error in z_0 is c / sqrt(a^2 + c^2) times the error in v.
        k = schedule.coefficients(index)
        still_error = (clips.z_0 - clips.z_image) * (k.norm / k.c).float().view(-1, 1, 1, 1, 1)
        losses["network"].append((prediction - target).square().mean().item())
        losses["zero"].append(target.square().mean().item())
        losses["still"].append(still_error.square().mean().item())
    return losses


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """PSNR in dB of pixels in [-1, 1], over the whole tensor."""
    return -10.0 * math.log10(((first.clamp(-1, 1) - second.clamp(-1, 1)) / 2.0).square().mean().item())


def motion(video_BFCHW: torch.Tensor) -> float:
    """Mean |frame t - frame 0| over t > 0, of pixels in [-1, 1]."""
    return (video_BFCHW[:, 1:] - video_BFCHW[:, :1]).abs().mean().item()


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Measure everything and draw the contact sheet.

    Args:
        arguments: The command line.

    Returns:
        The numbers by name, and the losses along the schedule by name.
    """
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(arguments.run / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    clips = load_heldout(arguments.heldout, pipeline)
    reconstruction = pipeline.decode_latents(clips.z_0).transpose(1, 2)
    still = pipeline.decode_latents(clips.z_image[:, :1]).transpose(1, 2)
    before = load_bridge_transformer(str(arguments.model_before), subfolder="transformer", dtype=torch.float32)
    after_losses = bridge_losses(pipeline.transformer, pipeline, clips)
    losses = {
        "before": bridge_losses(before, pipeline, clips)["network"],
        "after": after_losses["network"],
        "output 0": after_losses["zero"],
        "still image as x0": after_losses["still"],
    }
    samples = pipeline(
        image=clips.video[:, 0] / 2.0 + 0.5,
        prompt_embeds=clips.text,
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    samples = samples * 2.0 - 1.0
    scene = [i for i, name in enumerate(clips.names) if name.startswith(HELDOUT_SCENE)]
    numbers = {
        "vae psnr": sum(psnr(reconstruction[i], clips.video[i]) for i in scene) / len(scene),
        **{f"loss {name}": sum(values) / len(values) for name, values in losses.items()},
        "first frame psnr": psnr(samples[:, 0], still[:, 0]),
        "psnr of samples": psnr(samples, clips.video),
        "psnr of the still image": psnr(clips.video[:, :1].expand_as(clips.video), clips.video),
        "motion of real clips": motion(clips.video),
        "motion of samples": motion(samples),
    }

    image = images_to_pixels(arguments.image, *samples.shape[-2:])
    written = read_frames(str(arguments.sample), range) / 127.5 - 1.0
    decoded_image = pipeline.decode_latents(encode_video(pipeline.vae, image.unsqueeze(1))).transpose(1, 2)
    numbers["file: first frame psnr"] = psnr(written[:1], decoded_image[0])
    numbers["file: motion"] = motion(written[None])

    rows, labels = [], []
    for i in range(1, len(clips.names), 3):  # every third clip is enough to look at
        for label, video in (("real", clips.video), ("VAE", reconstruction), ("sample", samples)):
            enlarged = video[i].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            rows.append((enlarged / 2.0 + 0.5).clamp(0.0, 1.0))
            labels.append(f"{clips.names[i]}: {label}")
    contact_sheet(rows, arguments.run / "check.png", columns=samples.shape[1], labels=labels)
    return numbers, losses


def failures(numbers: dict[str, float]) -> list[str]:
    """Say what does not hold, one line each (a number that is not finite never holds)."""
    after, real = numbers["loss after"], numbers["motion of real clips"]
    low, high = MOTION_RANGE
    statements = [
        (numbers["vae psnr"] >= MINIMUM_VAE_PSNR, f"the VAE reaches {MINIMUM_VAE_PSNR} dB on the held-out scene"),
        (after < numbers["loss before"], "the loss after training is below the loss before"),
        (after < numbers["loss output 0"], "the loss after training is below that of the output 0"),
        (after < numbers["loss still image as x0"], "the loss after training is below that of the still image"),
        (numbers["first frame psnr"] >= MINIMUM_PSNR, f"the samples begin with the image ({MINIMUM_PSNR} dB)"),
        (numbers["file: first frame psnr"] >= MINIMUM_PSNR, f"the file begins with the image ({MINIMUM_PSNR} dB)"),
        (numbers["psnr of samples"] >= MINIMUM_FOLLOWING_PSNR, "the samples do not decay into noise"),
        (
            low * real <= numbers["motion of samples"] <= high * real,
            f"samples move {low} to {high} times as real clips",
        ),
        (low * real <= numbers["file: motion"], f"the file moves at least {low} times as real clips"),
    ]
    return [statement for holds, statement in statements if not holds]


def main() -> None:
    """Measure, print, write, and fail where a statement does not hold."""
    parser = argparse.ArgumentParser(description="Measure the quickstart's result on held-out clips.")
    parser.add_argument("--model-before", type=Path, required=True, help="text-to-video folder before the run")
    parser.add_argument("--run", type=Path, required=True, help="output folder of the run")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of held-out clips")
    parser.add_argument("--sample", type=Path, required=True, help="mp4 that `finetrainers sample` wrote")
    parser.add_argument("--image", type=Path, required=True, help="the image that it was sampled from")
    arguments = parser.parse_args()
    with alone():
        numbers, losses = measure(arguments)
    for name, value in numbers.items():
        print(f"{name:40} {value:9.4f}")
    print("losses in ten bands of the schedule, from the data to the prior")
    for name, values in losses.items():
        print(f"  {name:18}", *(f"{value:9.4f}" for value in values))
    failed = failures(numbers)
    result = {"numbers": numbers, "losses": losses, "failed": failed}
    (arguments.run / "check.json").write_text(json.dumps(result, indent=2) + "\n")
    for statement in failed:
        print(f"does not hold: {statement}")
    if failed:
        raise SystemExit(1)
    print(f"all statements hold; look at {arguments.run / 'check.png'}")


if __name__ == "__main__":
    main()
