"""Rewriting existing models: plan, convert, fold."""

from .apply import convert_model, plan
from .fold import fold
from .plan import Plan, Step
from .recipes import Recipe, paper

__all__ = ["Plan", "Recipe", "Step", "convert_model", "fold", "paper", "plan"]
