"""What `finetrainers precompute` does before the work itself: the recipe, the place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from framebridge_plugin.recipe import Recipe, load_recipe, resolve_recipe


def precompute_request(recipe_name: str, overrides: Sequence[str], output: Path | None) -> tuple[Recipe, Path]:
    """The checked recipe, and the folder to write."""
    # The folder that the recipe reads need not be there yet.
    recipe = load_recipe(recipe_name, [*overrides, "framebridge.precomputed=null"])
    named = resolve_recipe(recipe_name, overrides)[0].framebridge.precomputed
    return recipe, output or Path(named or Path(recipe.checkpoints.output_dir, "precomputed"))
