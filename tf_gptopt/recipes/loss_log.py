"""A stage's losses as losses.csv, a row a report: for a spreadsheet, or whoever wants a curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tf_gptopt._files import write_text

FILE = "losses.csv"
_COLUMNS = ("step", "loss", "learning_rate", "tokens_per_second")


class LossLog:
    """Passes the reports of a training on, and keeps them in `folder`/losses.csv.

    A training that goes on from a checkpoint writes anew what it does again.

    Args:
        folder: of the stage.
        goes_on: whether there is a checkpoint to go on from.
        then: is given each report too.
    """

    def __init__(self, folder: Path, goes_on: bool, then: Callable[[Any], Any]) -> None:
        self.path, self.then = folder / FILE, then
        self._goes_on, self._begun = goes_on, False

    def __call__(self, report: Any) -> None:
        if not self._begun:
            rows = _rows(self.path) if self._goes_on else []
            kept = [",".join(row) for row in rows if int(row[0]) < report.step]
            write_text(self.path, "\n".join([",".join(_COLUMNS), *kept, ""]))
            self._begun = True
        values = [f"{getattr(report, name):.6g}" for name in _COLUMNS[1:]]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(",".join([str(report.step), *values]) + "\n")
        self.then(report)


def _rows(path: Path) -> list[list[str]]:
    """The whole rows of a file; the last one may have been cut short."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)[1:]
    rows = [line.strip().split(",") for line in lines if line.endswith("\n")]
    return [row for row in rows if len(row) == len(_COLUMNS) and row[0].isdigit()]
