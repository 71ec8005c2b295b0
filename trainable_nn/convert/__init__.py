"""Rewriting existing models: plan, convert, fold."""

from .apply import convert_model, plan
from .fold import fold
from .plan import Plan, Step
from .recipes import ProvableRecipe, Recipe, paper, provable

__all__ = ["Plan", "ProvableRecipe", "Recipe", "Step", "convert_model", "fold", "paper", "plan", "provable"]
