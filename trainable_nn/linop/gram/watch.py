"""A progress bar on stderr while a kernel is computed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def watched(wanted: bool) -> Iterator[Callable[[float, int], None]]:
    """Gives ``advance(done, of)`` in runs of the network, with fractions of one."""
    if not wanted:
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("kernel", total=1.0)
        yield lambda done, of: bar.update(task, completed=done / of)
