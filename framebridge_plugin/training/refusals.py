"""What our trainer refuses of finetrainers' arguments, with any specification."""

from __future__ import annotations

from typing import Any

import torch

from framebridge_plugin.backbones.placing import check_compiler
from framebridge_plugin.errors import UsageError
from framebridge_plugin.training.quantization import float8_problem


def refuse_unsupported(args: Any) -> None:
    """Refuses what does not work with any specification."""
    for name in ("pp_degree", "cp_degree", "tp_degree"):
        if getattr(args, name) > 1:
            raise UsageError(
                f"{name}={getattr(args, name)}: no specification of this package supports it; use dp_degree and "
                "dp_shards"
            )
    if others := set(args.compile_modules) - {"transformer"}:
        raise UsageError(
            f"compile_modules={' '.join(sorted(others))}: only the transformer is compiled; of encoders other methods "
            "are called than torch.compile compiles"
        )
    if args.compile_modules:
        check_compiler("compile_modules")
    if args.checkpointing_limit is not None and args.checkpointing_limit < 2:
        raise UsageError(
            f"checkpointing_limit={args.checkpointing_limit}: keep 2 or more, or all: a checkpoint written just "
            "before a NaN holds what leads to it"
        )
    if args.precomputed is not None and args.enable_precomputation:
        raise UsageError("precomputed excludes enable_precomputation, which encodes anew; leave one of them out")
    float8 = getattr(args, "float8_training", None)
    if float8 is not None and (problem := float8_problem(float8)):
        raise UsageError(f"precision.float8_training: {problem}")
    may_be_half = args.training_type == "lora" and args.dp_shards == 1
    if args.autocast is not None and args.transformer_dtype not in (torch.float32, may_be_half and torch.bfloat16):
        raise UsageError(
            f"autocast={args.autocast} needs transformer_dtype=fp32 (or bf16 for LoRA without dp_shards), not "
            f"{args.transformer_dtype}: the weights that are trained stay float32"
        )
    if args.hub_token is not None:
        raise UsageError("hub_token: leave it out; log in by `hf auth login`, or set HF_TOKEN")
    if args.enable_model_cpu_offload and not torch.accelerator.is_available():
        raise UsageError("enable_model_cpu_offload: there is no accelerator to offload from; leave it out")
    if args.offload_optimizer and not torch.cuda.is_available():
        raise UsageError("offload_optimizer: there is no CUDA GPU whose memory it would spare; leave it out")
    if args.optimizer == "adamw-torchao-fp8" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < (8, 9):
            has = ".".join(map(str, capability))
            raise UsageError(
                f"adamw-torchao-fp8 needs a GPU of compute capability 8.9 (Ada, Hopper), not {has}; take "
                "adamw-torchao-8bit"
            )
