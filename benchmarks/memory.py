"""Whether what a run is said to need of memory is what it takes: `finetrainers doctor --recipe` against real runs.

    python benchmarks/memory.py --output benchmarks/results/memory_cpu

Each case is a shipped recipe on a model of the published widths with few layers and random weights, trained on the
CPU. What is computed comes from configs alone. What is measured is all that lies in tensors before an update, the
optimizer's state among it, and the most that reading, encoding and updating allocate besides, by torch's own record.
It writes OUTPUT.json and OUTPUT.md, with what the models need at full size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import framebridge_plugin  # noqa: F401  (before diffusers: it repairs torchvision)

# isort: split
from random_models import make_trainer, write_run
from reports import environment, environment_line, write_results
from step_measures import AddedBytes, live_bytes

from framebridge_plugin.recipe import resolve_recipe
from framebridge_plugin.training import FrameBridgeTrainer
from framebridge_plugin.training.memory import memory_needs
from framebridge_plugin.training.precomputation.precompute import precompute

GIB = 2**30
TOLERANCE = 0.15
PLAIN, CHECKPOINTED = (f"training.gradient_checkpointing={value}" for value in ("false", "true"))
AUTOCAST = "precision.autocast=bf16"
BF16 = tuple(f"precision.{part}_dtype=bf16" for part in ("transformer", "vae", "text_encoder"))
EIGHT_BIT = "optimization.optimizer=adamw-torchao-8bit"
STORED = "framebridge.precomputed={folder}/store"
ONE = "training.batch_size=1"
_T5 = {"num_layers": 1}
_TINY_T5 = {"num_layers": 1, "d_kv": 8, "d_ff": 64, "num_heads": 2, "vocab_size": 1024}
_TINY_VAE = {"layers_per_block": 1, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2}
_SMALL, _USUAL = (9, 64, 64), (17, 256, 256)
CASES: dict[str, tuple[str, tuple[int, int, int], dict[str, dict[str, Any]], tuple[str, ...]]] = {
    "2B in full, float32": (
        "cogvideox_bridge",
        _SMALL,
        {"transformer": {"num_layers": 2}, "text_encoder": _T5, "vae": {"layers_per_block": 1}},
        (PLAIN,),
    ),
    "2B in full, bfloat16, 8-bit AdamW, checkpointed": (
        "cogvideox_bridge",
        _SMALL,
        {"transformer": {"num_layers": 3}, "text_encoder": _T5},
        (CHECKPOINTED, *BF16, EIGHT_BIT),
    ),
    "2B in full, float32, precomputed": (
        "cogvideox_bridge",
        _USUAL,
        {"transformer": {"num_layers": 2}, "text_encoder": _TINY_T5, "vae": _TINY_VAE},
        (PLAIN, STORED),
    ),
    "2B in full, autocast, precomputed, checkpointed": (
        "cogvideox_bridge",
        _USUAL,
        {"transformer": {"num_layers": 3}, "text_encoder": _TINY_T5, "vae": _TINY_VAE},
        (CHECKPOINTED, AUTOCAST, STORED),
    ),
    "2B, LoRA, bfloat16, checkpointed": (
        "cogvideox_bridge_lora",
        _SMALL,
        {"transformer": {"num_layers": 4}, "text_encoder": _T5},
        (CHECKPOINTED,),
    ),
    "5B, LoRA, bfloat16, precomputed, checkpointed": (
        "cogvideox_bridge_lora",
        _USUAL,
        {
            "transformer": {"num_layers": 2, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
            "text_encoder": _TINY_T5,
            "vae": _TINY_VAE,
        },
        (CHECKPOINTED, STORED),
    ),
    "Latte-S/2, whole": ("ucf101_bridge", (16, 128, 128), {}, ()),
    "Latte-S/2, whole, autocast, precomputed": (
        "ucf101_bridge",
        (16, 256, 256),
        {"vae": _TINY_VAE},
        (AUTOCAST, STORED),
    ),
    "Wan 1.3B in full, float32, checkpointed, 2 clips added up": (
        "wan_bridge",
        _SMALL,
        {"transformer": {"num_layers": 2}, "text_encoder": _T5 | {"vocab_size": 1024}},
        (CHECKPOINTED, "training.gradient_accumulation_steps=2"),
    ),
    "Wan 1.3B, LoRA, bfloat16, precomputed": (
        "wan_bridge_lora",
        _USUAL,
        {"transformer": {"num_layers": 3}, "text_encoder": _TINY_T5, "vae": {"base_dim": 8}},
        (PLAIN, STORED),
    ),
    "LTX, LoRA, bfloat16, checkpointed": (
        "ltx_bridge_lora",
        (9, 128, 128),
        {"transformer": {"num_layers": 3}, "text_encoder": _T5},
        (CHECKPOINTED,),
    ),
    "LTX, LoRA, bfloat16, precomputed": (
        "ltx_bridge_lora",
        (33, 256, 256),
        {"transformer": {"num_layers": 3}, "text_encoder": _TINY_T5},
        (PLAIN, STORED),
    ),
}
"""Recipe, clip, what the configs have in place of the published values, and overrides."""

LARGE = (*(f"framebridge.data.{name}" for name in ("num_frames=49", "height=480", "width=720")), ONE)
_ALONE = "parallelism.dp_degree=1"
_NO_ENCODERS = "framebridge.precomputed=latents"
_FIVE = "model.pretrained_model_name_or_path=zai-org/CogVideoX-5b"
FULL_SIZE: dict[str, tuple[str, tuple[str, ...], str]] = {
    "2B, LoRA, bfloat16": ("cogvideox_bridge_lora", (), "19.0 / 7.2"),
    "2B in full, float32": ("cogvideox_bridge", (_ALONE,), "49.9 / 28.6"),
    "2B in full, bfloat16, 8-bit AdamW": ("cogvideox_bridge", (_ALONE, *BF16, EIGHT_BIT), "21.9 / 11.2"),
    "2B in full, autocast, 8-bit AdamW, 64 clips added up": (
        "cogvideox_bridge",
        (_ALONE, *BF16[1:], AUTOCAST, EIGHT_BIT, "training.gradient_accumulation_steps=64"),
        "",
    ),
    "5B, LoRA, bfloat16": ("cogvideox_bridge_lora", (_FIVE,), ""),
}
"""Recipe, overrides, and GiB computed by hand from the sizes of weights and activations, live and precomputed."""


class _Measured(Exception):
    """Ends a run."""


class _MeasuredTrainer(FrameBridgeTrainer):
    """Measures its second update, when the optimizer has its state, from its first clip until the next one's."""

    peak = 0

    def _batches(self) -> Any:
        return _MeasuredBatches(super()._batches(), self)


class _MeasuredBatches:
    def __init__(self, batches: Any, trainer: _MeasuredTrainer) -> None:
        self._batches, self._trainer, self._asked = batches, trainer, 0
        self._measuring = AddedBytes(torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __next__(self) -> Any:
        self._asked += 1
        clips = self._trainer.args.gradient_accumulation_steps
        if self._asked == clips + 1:
            if "torchao" in self._trainer.args.optimizer:
                # Their step is compiled on a GPU; on a CPU it is not, and makes float32 copies of whole tensors.
                self._trainer.optimizer.register_step_pre_hook(lambda *_: self._end())
            self._trainer.peak = live_bytes()
            self._measuring.__enter__()
        elif self._asked == 2 * clips + 1:
            self._end()
        return next(self._batches)

    def _end(self) -> None:
        self._measuring.__exit__()
        self._trainer.peak += self._measuring.peak
        raise _Measured


def measure_case(name: str) -> dict[str, float]:
    """Trains a case, in this process."""
    recipe_name, clip, changes, overrides = CASES[name]
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        said = (ONE, "optimization.train_steps=3", *(o.format(folder=folder) for o in overrides))
        if STORED not in overrides and "text_encoder" in changes:
            said = (*said, "framebridge.caption_cache_gib=0")  # the text encoder stays, as where captions do not fit
        recipe = write_run(recipe_name, Path(folder), clip, changes, *said)
        needs = memory_needs(recipe)
        if STORED in overrides:
            precompute(recipe, Path(folder, "store"))
        trainer = make_trainer(recipe, Path(folder), _MeasuredTrainer)
        with contextlib.suppress(_Measured):
            trainer.run()
    return {"computed_gib": needs.total / GIB, "measured_gib": trainer.peak / GIB}


def full_size() -> dict[str, list[float]]:
    """GiB of runs at the models' own size, live and precomputed."""
    found = {}
    for name, (recipe, overrides, _) in FULL_SIZE.items():
        known: dict[str, Any] = {}
        recipes = [resolve_recipe(recipe, (*LARGE, *overrides, *stored))[0] for stored in ((), (_NO_ENCODERS,))]
        found[name] = [memory_needs(recipe, known).total / GIB for recipe in recipes]
    return found


def as_table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [environment_line(results["environment"]), ""]
    lines += ["| few layers, on a CPU | computed, GiB | measured, GiB | computed / measured |", "|---|---|---|---|"]
    for name, case in results["cases"].items():
        computed, measured = case["computed_gib"], case["measured_gib"]
        lines.append(f"| {name} | {computed:.2f} | {measured:.2f} | {computed / measured:.2f} |")
    lines += ["", "Of torchao's optimizers without their step, which is compiled on a GPU and makes copies on a CPU."]
    lines += ["", "49 frames of 480x720, batch 1, checkpointed; what CUDA takes for itself comes on top.", ""]
    lines += ["| full size | live, GiB | precomputed, GiB | by hand |", "|---|---|---|---|"]
    for name, (live, stored) in results["full_size"].items():
        lines.append(f"| {name} | {live:.1f} | {stored:.1f} | {FULL_SIZE[name][2]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), help="measure this one alone, and print it as JSON")
    parser.add_argument("--output", type=Path, help="name of the results, without .json and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case is not None:
        print(json.dumps(measure_case(arguments.case)))
        return 0
    results: dict[str, Any] = {"environment": environment(torch.device("cpu")), "cases": {}}
    for name in CASES:  # a process each: a trainer leaves things behind
        command = [sys.executable, __file__, "--case", name]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results["cases"][name] = json.loads(printed.splitlines()[-1])
    results["full_size"] = full_size()
    write_results(arguments.output, results, as_table)
    ratios = {name: case["computed_gib"] / case["measured_gib"] for name, case in results["cases"].items()}
    wrong = [
        f"{name}: computed / measured = {ratio:.2f}" for name, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE
    ]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
