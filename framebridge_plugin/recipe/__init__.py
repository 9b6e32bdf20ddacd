"""Recipes: what they may say (`schema`), what must hold (`rules`), and how they are read (`loading`)."""

from __future__ import annotations

from framebridge_plugin.recipe.loading import (
    find_recipe,
    load_recipe,
    recipe_summary,
    resolve_recipe,
    shipped_recipes,
)
from framebridge_plugin.recipe.outside import outside_effects
from framebridge_plugin.recipe.schema import Recipe

__all__ = [
    "Recipe",
    "find_recipe",
    "load_recipe",
    "outside_effects",
    "recipe_summary",
    "resolve_recipe",
    "shipped_recipes",
]
