"""What `finetrainers precompute` does before the work itself: the recipe, the place, the processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from framebridge_plugin.commands.launching import end_with_launcher, launch
from framebridge_plugin.errors import UsageError
from framebridge_plugin.recipe import load_recipe, resolve_recipe


def run_precompute(
    recipe_name: str,
    overrides: Sequence[str],
    *,
    output: Path | None,
    processes: int,
    variants: int | None,
    shard_size: int | None,
    debug: bool,
) -> int:
    """Runs the command in this process, or in several that it starts."""
    # The folder that the recipe reads need not be there yet.
    recipe = load_recipe(recipe_name, [*overrides, "framebridge.precomputed=null"])
    named = resolve_recipe(recipe_name, overrides)[0].framebridge.precomputed
    store = output or Path(named or Path(recipe.checkpoints.output_dir, "precomputed"))
    if processes > 1:
        if "WORLD_SIZE" in os.environ:
            raise UsageError("--nproc: torchrun has started the processes already; leave one of the two out")
        options = {"--output": store, "--variants": variants, "--shard-size": shard_size}
        arguments = ["precompute", f"--recipe={recipe_name}", *overrides, *(["--debug"] if debug else [])]
        arguments += [f"{name}={value}" for name, value in options.items() if value is not None]
        return launch(arguments, processes)
    end_with_launcher()

    from framebridge_plugin.training.precomputation.precompute import precompute

    precompute(recipe, store, variants=variants, shard_size=shard_size)
    return 0
