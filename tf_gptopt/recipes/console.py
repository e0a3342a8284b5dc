"""What a run shows while it works: stage headings, loss, tokens per second, time left."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

from tf_gptopt._clock import clock

SECONDS_BETWEEN_LINES = 10.0
LOG_WIDTH = 150  # columns where nobody's terminal says


class StepReport(Protocol):
    """What a training loop tells, as a line too: `tf_gptopt.training.callbacks.Progress`."""

    step: int
    steps: int
    mfu: float | None
    peak: str


class _RichConsole(RichConsole):
    def on_broken_pipe(self) -> None:
        """Whoever runs the command decides what a reader that went away means; rich would end the
        process with an error."""
        raise BrokenPipeError


class Console:
    """A live bar on a terminal, a line every ten seconds anywhere else; silent when `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = _RichConsole(quiet=quiet, highlight=False)
        if not self.rich.is_terminal:
            self.rich.width = LOG_WIDTH
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._computation = (
            0.0,
            0,
            0,
        )  # when its progress was first told, how far it was, of how much
        self._said: set[str] = set()

    def heading(self, stage: str, text: str) -> None:
        """A stage begins."""
        self.rich.print(f"[bold cyan]{stage:>9}[/]  {text}")
        self._last_line = time.monotonic()

    def note(self, text: Any) -> None:
        """A line, or anything that rich can draw."""
        if isinstance(text, str):
            self.rich.print(f"{'':>9}  {text}", soft_wrap=True)
        else:
            self.rich.print(text)

    def note_once(self, text: str) -> None:
        """A line that the next stages need not repeat."""
        if text not in self._said:
            self._said.add(text)
            self.note(text)

    def progress(self, done: int, total: int, what: str) -> None:
        """Some of a long computation was done; a line every ten seconds, with the time left."""
        now = time.monotonic()
        began, first, of = self._computation
        if of != total or done <= first:  # another one, which may go on from an earlier start
            began, first, of = self._computation = now, done, total
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            text = f"{done:,} of {total:,}  {what}"
            if done > first:
                rate = (done - first) / (now - began)
                text += f"  {rate:,.1f}/s  {clock((total - done) / rate)} left"
            self.note(text)

    def step(self, report: StepReport) -> None:
        """A training step was done; `on_progress` of the trainer."""
        text = str(report)
        if report.mfu is not None:
            self.note_once(f"MFU 100% is {report.peak}")
        if not self.rich.is_terminal:
            now = time.monotonic()
            if report.step >= report.steps or now - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = now
                self.note(text)
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn(" " * 10), BarColumn(24), TextColumn("{task.description}"),
                console=self.rich, transient=True,
            )  # fmt: skip
            self._bar.start()
            self._bar.add_task("")
        self._bar.update(
            self._bar.task_ids[0], completed=report.step, total=report.steps, description=text
        )
        if report.step >= report.steps:
            self.close()
            self.note(text)

    def close(self) -> None:
        """Take the live bar off the screen, if one is up."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
