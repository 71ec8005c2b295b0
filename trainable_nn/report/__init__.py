"""The page that a person reads: what was found of a network and its conversion, in one file without network access."""

from .examine import examine
from .findings import Findings, Kernel, Losses, Missing
from .page import page

__all__ = ["Findings", "Kernel", "Losses", "Missing", "examine", "page"]
