"""A plan as people read it: a table, and what to do. Needs no TensorFlow."""

from __future__ import annotations

from typing import Any

from tf_gptopt.training.memory import MARGIN
from tf_gptopt.training.plan import Plan, Row, human

COLUMNS = (
    "scheme",
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "total",
    "fits?",
    "largest batch",
)


def rich_table(plan: Plan) -> Any:
    """The plan as a `rich.table.Table`."""
    from rich.table import Table

    step = plan.step
    table = Table(
        title=f"{plan.devices} x {human(plan.device_memory)}: batch {step.batch_size} of "
        f"{step.sequence_length} tokens, {step.precision}"
        + (f", {step.accumulate} microbatches" if step.accumulate > 1 else "")
        + (", recomputed" if step.recompute else "")
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for row in plan.rows:
        chosen = row.scheme == plan.recommended
        table.add_row(*cells(row), style="bold green" if chosen else None)
    return table


def cells(row: Row) -> list[str]:
    """A row's texts, in the order of `COLUMNS`."""
    memory = row.memory
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations)
    largest = f"{row.largest_batch:,}" if row.largest_batch else "none"
    fits = "yes" if row.fits else "no"
    return [row.scheme, *map(human, parts), human(memory.total), fits, largest]


def explain(plan: Plan) -> list[str]:
    """What the table means, and what to do, line by line."""
    lines = [
        "Bytes of the device that needs most. Gradients come as activations go, so the total is "
        f"of the worst moment; it fits with {MARGIN:.0%} to spare, the error of this estimate.",
        plan.why,
    ]
    if plan.recommended:
        lines.append(f"{plan.recommended}: {plan.command}")
    return lines
