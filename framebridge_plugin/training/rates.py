"""The course of the learning rate: a function of the recipe and the number of the update alone."""

from __future__ import annotations

from typing import Any

from finetrainers.optimizer import get_lr_scheduler
from finetrainers.parallel import ParallelBackendEnum


def rate_schedule(args: Any, optimizer: Any, step: int) -> Any:
    """The schedule after so many updates; finetrainers itself hands no cycles, power and (polynomial) rate over."""
    for group in optimizer.param_groups:
        group["initial_lr"] = args.lr
    return get_lr_scheduler(
        ParallelBackendEnum.ACCELERATE,  # a plain LambdaLR
        name=args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.train_steps,
        # Its "cosine" counts whole waves, at whose end the rate is back where it began.
        num_cycles=args.lr_num_cycles / 2 if args.lr_scheduler == "cosine" else args.lr_num_cycles,
        power=args.lr_power,
        lr_init=args.lr,
        last_epoch=step - 1,  # it makes a first step itself
    )
