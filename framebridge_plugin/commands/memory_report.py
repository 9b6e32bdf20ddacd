"""What `finetrainers doctor --recipe` prints: the memory that a run takes, whether this card has it, what helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from framebridge_plugin.errors import FrameBridgeError, UsageError, print_line, print_lines
from framebridge_plugin.imports import without_collection
from framebridge_plugin.recipe import Recipe, resolve_recipe
from framebridge_plugin.settings.choices import Offload

if TYPE_CHECKING:
    from framebridge_plugin.backbones.sampling_memory import SamplingMemory
    from framebridge_plugin.training.memory import MemoryNeeds

_CARDS = (16, 24, 48, 80, 141)  # GB on their boxes
_FOR_CUDA = 1.0
"""GiB that CUDA, its libraries and what they lay by take for themselves: assumed, not computed."""
_WORTH = 0.03
_GIB = 2**30


def report_memory(name: str, overrides: Sequence[str]) -> int:
    """Prints what a run of a recipe takes of a GPU; returns the exit code, 1 if this machine's card has less."""
    recipe, _ = resolve_recipe(name, overrides)
    with without_collection():
        import torch

        from framebridge_plugin.training.memory import memory_needs, memory_of_sampling

    known: dict[str, Any] = {}
    try:
        needs, sampling = memory_needs(recipe, known), memory_of_sampling(recipe, torch.bfloat16)
    except FrameBridgeError as error:  # 1 says something else
        raise UsageError(str(error)) from error
    gib = needs.total / _GIB + _FOR_CUDA
    parallelism = recipe.parallelism
    processes = (parallelism.dp_degree or 1) * parallelism.dp_shards
    each = f" on each of {processes}" if processes > 1 else ""
    fits = True
    if torch.cuda.is_available():
        has = torch.cuda.get_device_properties(0).total_memory / _GIB
        fits = gib <= has
        print_line(f"needs {gib:.1f} GiB{each}; this card has {has:.0f}" + ("" if fits else ": too little"))
    else:
        cards = [card for card in _CARDS if gib <= 0.98 * card]
        fitting = (
            f"cards of {', '.join(map(str, cards))} GB have it" if cards else f"no card of {_CARDS[-1]} GB has it"
        )
        print_line(f"needs {gib:.1f} GiB of a GPU{each}; there is none here; {fitting}")
    _print_parts("\nAll the time", needs.resident)
    _print_parts("Besides, one at a time", needs.working)
    print_lines(f"CUDA and its libraries, assumed\n  {_FOR_CUDA:5.1f}")
    _print_remedies(name, overrides, recipe, needs, known)
    _print_sampling(sampling)
    return 0 if fits else 1


def _print_sampling(memory: SamplingMemory) -> None:
    frames, height, width = memory.clip
    tiled = memory.is_tiled("auto")
    by_tiles = ", decoded by tiles" if tiled else ""
    print_lines(f"\nSampling {frames} frames of {height} x {width} from it, in bf16{by_tiles}")
    for offload in get_args(Offload):
        gib = memory.needed(1, offload, tiled) / _GIB + _FOR_CUDA
        print_line(f"  {gib:5.1f}  {f'--offload {offload}' if offload != 'none' else 'all of it on the GPU'}")


def _print_parts(title: str, parts: Mapping[str, int]) -> None:
    print_lines(title)
    for name, size in sorted(parts.items(), key=lambda part: -part[1]):
        print_line(f"  {size / _GIB:5.1f}  {name}")


def _print_remedies(
    name: str, overrides: Sequence[str], recipe: Recipe, needs: MemoryNeeds, known: dict[str, Any]
) -> None:
    from framebridge_plugin.training.memory import memory_needs

    found = []
    for remedy, note in _remedies(recipe):
        try:
            changed, _ = resolve_recipe(name, [*overrides, *remedy])
        except UsageError:  # not in this combination
            continue
        saved = needs.total - memory_needs(changed, known).total
        if saved > _WORTH * needs.total:
            found.append((saved, " ".join(remedy), note))
    if found:
        print_lines("\nWhat would save most, each by itself")
    for saved, words, note in sorted(found, reverse=True):
        print_line(f"  {saved / _GIB:5.1f}  {words}  ({note})")


def _remedies(recipe: Recipe) -> Iterator[tuple[list[str], str]]:
    """What takes less memory than what the recipe says, with a word on it."""
    training, precision, is_lora = recipe.training, recipe.precision, recipe.training.training_type == "lora"
    if recipe.framebridge.precomputed is None:
        yield ["framebridge.precomputed=FOLDER"], "of `finetrainers precompute`: no encoders in training"
        if recipe.backbone.condition == "text" and recipe.framebridge.text_encoder_device is None:
            yield ["framebridge.text_encoder_device=cpu"], "captions embedded in main memory, each once as far as kept"
            if precision.text_encoder_quantization is None:
                yield ["precision.text_encoder_quantization=int8"], "other embeddings in the second digit"
    if is_lora and precision.transformer_quantization is None:
        quantized = ["precision.transformer_quantization=int8", "training.gradient_checkpointing=true"]
        if training.gradient_checkpointing_every > 1:
            quantized.append("training.gradient_checkpointing_every=1")
        yield quantized, "its frozen blocks in 8 bits, unpacked in every pass"
    if not training.gradient_checkpointing:
        more = "half" if is_lora else "a third"
        yield ["training.gradient_checkpointing=true"], f"{more} more of the network's arithmetic"
    if training.batch_size > 1:
        steps = training.gradient_accumulation_steps * training.batch_size
        yield ["training.batch_size=1", f"training.gradient_accumulation_steps={steps}"], "the same batch"
    if not is_lora:
        yield ["training.training_type=lora"], "another kind of model: layers for the same network"
    if "8bit" not in recipe.optimization.optimizer and not is_lora:
        yield ["optimization.optimizer=adamw-torchao-8bit"], "its state in 8 bits"
    if recipe.backbone.condition == "text" and precision.text_encoder_dtype == "fp32":
        yield ["precision.text_encoder_dtype=bf16"], "other embeddings in the third digit"
    if precision.transformer_dtype == "fp32" and not is_lora:
        yield ["precision.transformer_dtype=bf16"], "steps of small rates are lost"
