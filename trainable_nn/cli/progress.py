"""Progress of a training on stderr: a live line for each model, or one line an epoch where nobody watches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..demo.training import Run
from .terminal import number, stderr


class Watch:
    """Shows the steps of several runs while they train."""

    def __init__(self, names: Sequence[str], steps: int, epochs: int) -> None:
        self.epochs, self.done = epochs, 0
        self.console = stderr()
        self.live = self.console.is_terminal
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
        self.bars = Progress(*columns, console=self.console, disable=not self.live, transient=True)
        self.tasks = {name: self.bars.add_task(name, total=steps, loss="") for name in names}

    def __enter__(self) -> Watch:  # noqa: PYI034, Self is typing's from 3.11 on
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def step(self, name: str, run: Run) -> None:
        state = f"diverged at step {run.diverged_at}" if run.diverged_at else f"loss {run.step_losses[-1]:.4f}"
        self.bars.update(self.tasks[name], completed=len(run.step_losses), loss=state)

    def epoch(self, runs: Mapping[str, Run]) -> None:
        self.done += 1
        losses = ", ".join(f"{name} {number(run.epochs[-1].train_loss)}" for name, run in runs.items())
        if not self.live:
            self.console.print(f"epoch {self.done}/{self.epochs}: training loss {losses}", markup=False)
