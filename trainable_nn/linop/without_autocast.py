"""Numbers of the dtype that a map has, also where autocast would compute in fewer digits."""

import functools
from collections.abc import Callable
from contextlib import ExitStack

import torch

KINDS = ("cpu", "cuda")
_enabled = torch.is_autocast_enabled


def without_autocast(f: Callable) -> Callable:
    """f, with autocast switched off while it runs."""

    @functools.wraps(f)
    def exact(*arguments, **options):
        if not (_enabled("cpu") or _enabled("cuda")):
            return f(*arguments, **options)
        with ExitStack() as stack:
            for kind in filter(_enabled, KINDS):
                stack.enter_context(torch.autocast(kind, enabled=False))
            return f(*arguments, **options)

    return exact
