"""`trainable-nn`: parses, calls, prints. Results go to stdout, progress and errors to stderr.

Status 0: it holds (the run was finite, the model converts). 1: it does not hold. 2: it cannot be answered.
"""

from .app import main

__all__ = ["main"]
