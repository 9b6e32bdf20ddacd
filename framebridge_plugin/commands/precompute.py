"""What `finetrainers precompute` does before the work itself: the recipe, the place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from framebridge_plugin.recipe import Recipe, load_recipe


def precompute_request(recipe_name: str, overrides: Sequence[str], output: Path | None) -> tuple[Recipe, Path]:
    """The checked recipe, and the folder to write."""
    recipe = load_recipe(recipe_name, overrides, needed=lambda where: where != "framebridge.precomputed")
    store = output or Path(recipe.framebridge.precomputed or Path(recipe.checkpoints.output_dir, "precomputed"))
    encoding = recipe.framebridge.model_copy(update={"precomputed": None})
    return recipe.model_copy(update={"framebridge": encoding}), store
