"""Seconds and memory of a sampled clip, against diffusers' own image-to-video pipeline of CogVideoX.

    python benchmarks/sampling_speed.py --output benchmarks/results/sampling_speed_cpu
    python benchmarks/sampling_speed.py --device cuda --output sampling_speed_cuda

Both pipelines have the same network, autoencoder and text embeddings (random weights of CogVideoX-2B's widths; on a
CPU with two layers and a small clip), the same size, steps and guidance, and so as many inputs of the network for a
clip. All ways take turns, so that what else the machine does falls on all of them alike; on a CPU one thread's own
processor time is taken. Exit code 1 says that they did not call the network alike.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import framebridge_plugin  # noqa: F401  (before diffusers: it repairs torchvision)

# isort: split
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline
from random_models import make_parts, make_specification, model_recipe
from reports import environment, environment_line, write_results
from step_measures import AddedBytes, seconds
from train_step import SIZES

from framebridge_plugin import FrameBridgeCogVideoXPipeline
from framebridge_plugin.schedulers import FrameBridgeScheduler

MODEL = "CogVideoX-2B"
GIB = 2**30


def make_ways(size: str, device: torch.device, steps: int) -> tuple[torch.nn.Module, dict[str, tuple[int, Callable]]]:
    """The network, and for each way its number of clips and a call that samples them."""
    clip, changes, *overrides = SIZES[size][MODEL]
    with tempfile.TemporaryDirectory(prefix="sampling-speed-") as folder:
        recipe = model_recipe("cogvideox_bridge", Path(folder), clip, changes, *overrides)
        _, specification = make_specification(recipe)
        parts = make_parts(specification, device)
        own = CogVideoXDDIMScheduler.from_config(specification.adapter.load_backbone().config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network, vae = parts["transformer"].to(dtype).eval().requires_grad_(False), parts["vae"].to(dtype)
    shared = {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": network}
    theirs = CogVideoXImageToVideoPipeline(**shared, scheduler=own)
    ours = FrameBridgeCogVideoXPipeline(**shared, scheduler=FrameBridgeScheduler.from_backbone(own))
    generator = torch.Generator().manual_seed(0)
    frames, height, width = clip
    texts = (2, network.config.max_text_seq_length, network.config.text_embed_dim)
    text, negative = torch.randn(texts, generator=generator).to(device, dtype).chunk(2)
    call = {
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": 6.0,
    }
    call |= {"prompt_embeds": text, "negative_prompt_embeds": negative, "output_type": "pt"}
    image = torch.rand(3, height, width, generator=generator)

    def sample(pipeline: Any, **more: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(image=image, generator=torch.Generator().manual_seed(1), **call | more)

    return network, {
        "diffusers' CogVideoXImageToVideoPipeline": (1, functools.partial(sample, theirs)),
        "a bridge": (1, functools.partial(sample, ours)),
        "a bridge, two clips at once": (2, functools.partial(sample, ours, num_videos_per_prompt=2)),
        "a bridge, guidance in two calls": (1, functools.partial(sample, ours, batch_size=1)),
    }


def measure(size: str, device: torch.device, steps: int, rounds: int) -> dict[str, Any]:
    """Measures all ways."""
    network, ways = make_ways(size, device, steps)
    calls: list[int] = []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    found: dict[str, Any] = {}
    for name, (clips, sample) in ways.items():  # which warms them up, too
        calls.clear()
        with AddedBytes(device) as added:
            sample()
        found[name] = {"clips": clips, "calls": len(calls), "inputs_of_a_clip": sum(calls) // clips}
        found[name]["gib"] = added.peak / GIB
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (clips, sample) in ways.items():
            times[name].append(seconds(sample, device) / clips)
    theirs = next(iter(times.values()))
    for name, own in times.items():
        found[name]["seconds_of_a_clip"] = statistics.median(own)
        found[name]["ratio"] = statistics.median(time / other for time, other in zip(own, theirs, strict=True))
    return found


def as_table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    clip = "x".join(map(str, results["clip"]))
    lines = [environment_line(results["environment"]), f"\nClips {clip}, {results['steps']} steps.\n"]
    lines += ["| | seconds of a clip | ratio | GiB | calls | inputs of a clip |", "|---|---|---|---|---|---|"]
    for name, row in results["ways"].items():
        cells = (f"{row['seconds_of_a_clip']:.3g}", f"{row['ratio']:.2f}", f"{row['gib']:.3g}", row["calls"])
        lines.append(f"| {' | '.join(map(str, (name, *cells, row['inputs_of_a_clip'])))} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny widths, one round: whether it runs at all")
    parser.add_argument("--steps", type=int, default=4, help="of a clip")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways; medians are given")
    parser.add_argument("--output", type=Path, help="name of the results, without .json and .md")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    size = "quick" if arguments.quick else {"cpu": "cpu", "cuda": "full"}[arguments.device]
    torch.set_num_threads(1)
    results: dict[str, Any] = {"environment": environment(device), "size": size, "steps": arguments.steps}
    results["clip"] = SIZES[size][MODEL][0]
    results["ways"] = measure(size, device, arguments.steps, 1 if arguments.quick else arguments.rounds)
    write_results(arguments.output, results, as_table)
    return 0 if len({row["inputs_of_a_clip"] for row in results["ways"].values()}) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
