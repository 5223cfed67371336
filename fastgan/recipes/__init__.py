"""Recipes: files of data that say what is trained on what and how; copy one, edit it, ``--recipe my.yaml``."""

from __future__ import annotations

from fastgan.recipes.schema import Recipe, about, load_recipe, names

__all__ = ["Recipe", "about", "load_recipe", "names"]
