"""What 8 bits change: outputs, loss and gradients at published widths, with random weights and fewer layers, on a CPU.

    python benchmarks/quantization.py --output benchmarks/results/quantization_cpu.json

Takes four minutes and 4 GB. Each row is compared with the same computation in float32 and, as what a setting adds to
what a recipe has anyway, with bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framebridge_plugin.training.quantization import quantize_blocks, stored_bytes, use_float8_products

TOKENS = 226
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Result = dict[str, torch.Tensor]


def text_encoder(layers: int, width: int) -> torch.nn.Module:
    """T5-XXL's encoder, whose width is 4096, with as few layers."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    shape = {"d_model": width, "d_kv": 64, "d_ff": width * 5 // 2, "num_heads": width // 64, "vocab_size": 512}
    return T5EncoderModel(T5Config(**shape, num_layers=layers, feed_forward_proj="gated-gelu")).eval()


def embedded(encoder: torch.nn.Module) -> Result:
    """The embeddings of a caption."""
    tokens = torch.randint(512, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return {"embeddings": encoder(tokens).last_hidden_state}


def network(layers: int, heads: int) -> torch.nn.Module:
    """CogVideoX-2B's network, which has 30 heads, with its input widened and as few blocks."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    shape = {"num_attention_heads": heads, "attention_head_dim": 64, "in_channels": 32, "out_channels": 16}
    return CogVideoXTransformer3DModel(
        **shape, num_layers=layers, sample_width=16, sample_height=16, sample_frames=9, max_text_seq_length=TOKENS
    )


def updated(model: Any) -> Result:
    """Prediction, loss and gradients of an update, on 3 x 16 x 16 latents, the target of unit variance."""
    generator = torch.Generator().manual_seed(1)
    latents, text, target = (
        torch.randn(shape, generator=generator)
        for shape in ((1, 3, 32, 16, 16), (1, TOKENS, 4096), (1, 3, 16, 16, 16))
    )
    prediction = model(latents.to(model.dtype), text.to(model.dtype), torch.tensor([500]))[0].float()
    loss = (prediction - target).square().mean()
    loss.backward()
    gradients = [p.grad.flatten().float() for n, p in model.named_parameters() if p.grad is not None and "block" in n]
    return {"prediction": prediction.detach(), "loss": loss.detach(), "gradients": torch.cat(gradients)}


def frozen(model: Any) -> None:
    """Nothing of the model is trained."""
    model.requires_grad_(False)


def with_lora(model: Any) -> None:
    """The network frozen, with LoRA layers in float32."""
    from peft import LoraConfig

    model.requires_grad_(False).add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def compare(
    make: Callable[[], Any], prepare: Callable[[Any], Any], result: Callable[[Any], Result], ways: dict[str, Any]
) -> dict[str, Any]:
    """Deviations, bytes and seconds of a model in float32, in bfloat16, and in the ways that begin with that."""
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, Result] = {}
    for name, change in {"float32": None, "bfloat16": None, **ways}.items():
        model = make()
        model.to(torch.float32 if name == "float32" else torch.bfloat16)
        prepare(model)
        if change is not None:
            change(model)
        size = sum(map(stored_bytes, [*model.parameters(), *model.buffers()]))
        start = time.process_time()
        found[name] = result(model)
        rows[name] = {"MB": round(size / 1e6, 1), "seconds": time.process_time() - start}
        del model
        for other in ("float32", "bfloat16")[: len(rows) - 1]:
            rows[name][f"from {other}"] = {
                key: float(f"{(value - found[other][key]).norm() / found[other][key].norm():.2g}")
                for key, value in found[name].items()
            }
        if change is not None:
            del found[name]
    of_bfloat16 = rows["bfloat16"]["seconds"]
    for row in rows.values():
        row["CPU seconds, of bfloat16's"] = round(row.pop("seconds") / of_bfloat16, 2)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Prints what was found, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4], help="of the text encoder")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 8], help="of the network; in full the first")
    parser.add_argument("--width", type=int, default=4096, help="of the text encoder")
    parser.add_argument("--heads", type=int, default=30, help="of the network")
    options = parser.parse_args(arguments)
    eight = {kind: functools.partial(quantize_blocks, kind=kind) for kind in ("int8", "fp8")}
    emulated = functools.partial(use_float8_products, emulate=True)
    float8 = {recipe: functools.partial(emulated, recipe=recipe) for recipe in ("tensorwise", "rowwise")}
    results: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for layers in options.layers:
        encoder = functools.partial(text_encoder, layers, options.width)
        results[f"text encoder, {layers} layers"] = compare(encoder, frozen, embedded, eight)
    for blocks in options.blocks:
        made = functools.partial(network, blocks, options.heads)
        results[f"LoRA, {blocks} blocks"] = compare(made, with_lora, updated, eight)
    made = functools.partial(network, options.blocks[0], options.heads)
    results[f"full, {options.blocks[0]} blocks, emulated"] = compare(made, nn.Module.train, updated, float8)
    text = json.dumps(results, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
