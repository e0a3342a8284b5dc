"""Mixed schemes: how many bits each layer gets, for a budget. Needs no TensorFlow.

Every layer takes one of its options, each of which has a size and a cost (KL to the float model, or
loss, measured with that layer changed alone). Wanted is the least sum of costs within a budget of
bytes, or the least bytes within a budget of loss: a knapsack with one choice from each group.

Layer by layer, all sums that can be reached are kept which no other beats in both size and cost.
That is exact, and stays small for a GPT, whose layers have few different sizes. Only beyond
`MOST_STATES` of them do neighbours merge, the cheaper one staying, which loses a budget less than
`layers / MOST_STATES` of the largest size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import BITS, LAYER_WEIGHTS

MOST_STATES = 20_000


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a layer may become: its weights, their bytes, and what that costs."""

    weights: str
    bytes: int
    cost: float


def from_sensitivity(
    table: Any, bytes: int | float | None = None, loss: float | None = None
) -> dict[str, str]:
    """The weights of every layer of a `Sensitivity`, for a budget; see
    `QuantConfig.from_sensitivity`."""
    if (bytes is None) == (loss is None):
        raise UserError("Name one budget: bytes=... or loss=....")
    groups: dict[str, list[Choice]] = {}
    for row in table.rows:
        layer = groups.setdefault(row.layer, [])
        if not layer and not any(r.option == "float16" for r in table.rows):
            layer.append(Choice("float16", 2 * row.weights, 0.0))
        if row.option not in LAYER_WEIGHTS:
            continue
        cost = max(0.0, row.kl)
        if loss is not None:  # the rise of the loss is KL and luck, which a budget must not spend
            cost = max(cost, row.loss - table.loss)
        layer.append(Choice(row.option, row.bytes, cost))
    if not groups:
        raise UserError("The table of sensitivity has no rows: measure some layers first.")
    most = float(loss) if bytes is None else _as_bytes(bytes, table)
    picked = (lightest if bytes is None else cheapest)(list(groups.values()), most)
    return dict(zip(groups, (choice.weights for choice in picked), strict=True))


def _as_bytes(bytes: int | float, table: Any) -> float:
    """A fraction counts in sizes of uniform int4."""
    if isinstance(bytes, bool) or not isinstance(bytes, (int, float)) or bytes <= 0:
        raise UserError(
            "A budget is a number of bytes such as 4_000_000, or a fraction of the size of uniform "
            f"int4 such as 1.0. Received: bytes={bytes!r}."
        )
    if isinstance(bytes, int):
        return bytes
    uniform = [row.bytes for row in table.rows if row.option == "int4"]
    if len(uniform) < len({row.layer for row in table.rows}):
        raise UserError(
            "A fraction counts in sizes of uniform int4, and the table does not have every layer "
            "as int4. Measure that option too, or name the budget as an integer, in bytes."
        )
    return bytes * sum(uniform)


def cheapest(groups: Sequence[Sequence[Choice]], most_bytes: float) -> list[Choice]:
    """One choice of each group: the least cost, in at most so many bytes.

    Raises:
        UserError: when not even the smallest choices fit; it names the least possible.
    """
    least = sum(min(choice.bytes for choice in group) for group in groups)
    if least > most_bytes:
        raise UserError(
            f"{int(most_bytes):,} bytes are too few: with what was measured the matrices take "
            f"{least:,} bytes at least. Raise the budget, or measure smaller options (int4:128)."
        )
    return _reach(groups, most_bytes, float("inf"))[-1]


def lightest(groups: Sequence[Sequence[Choice]], most_cost: float) -> list[Choice]:
    """One choice of each group: the least bytes, at a cost of at most so much.

    Raises:
        UserError: when not even the best choices stay below it; it names the least possible.
    """
    least = sum(min(choice.cost for choice in group) for group in groups)
    if not least <= most_cost:
        raise UserError(
            f"A loss budget of {most_cost:g} nats cannot be met: with what was measured the loss "
            f"rises by {least:.3g} at least. Raise the budget."
        )
    return _reach(groups, float("inf"), most_cost)[0]


def _reach(
    groups: Sequence[Sequence[Choice]], most_bytes: float, most_cost: float
) -> tuple[list[Choice], list[Choice]]:
    """The smallest and the cheapest of all combinations within both limits."""
    sizes, costs = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each state: which before it, which choice
    for done, group in enumerate(groups, start=1):
        rest = groups[done:]
        room = most_bytes - sum(min(choice.bytes for choice in g) for g in rest)
        spare = most_cost - sum(min(choice.cost for choice in g) for g in rest)
        new_sizes = np.concatenate([sizes + choice.bytes for choice in group])
        new_costs = np.concatenate([costs + choice.cost for choice in group])
        kept = _undominated(new_sizes, new_costs, room, spare * (1 + 1e-12))
        steps.append((kept % len(sizes), kept // len(sizes)))
        sizes, costs = new_sizes[kept], new_costs[kept]

    def walk_back(state: int) -> list[Choice]:
        found = []
        for group, (before, choice) in zip(reversed(groups), reversed(steps), strict=True):
            found.append(group[choice[state]])
            state = before[state]
        return found[::-1]

    return walk_back(0), walk_back(len(sizes) - 1)


def _undominated(sizes: np.ndarray, costs: np.ndarray, room: float, spare: float) -> np.ndarray:
    """Indices of the states that no other beats in both, by size; at most `MOST_STATES`."""
    order = np.lexsort((costs, sizes))
    order = order[(sizes[order] <= room) & (costs[order] <= spare)]
    before = np.minimum.accumulate(np.concatenate([[np.inf], costs[order][:-1]]))
    order = order[costs[order] < before]
    if len(order) <= MOST_STATES:
        return order
    by_size = sizes[order]
    buckets = ((by_size - by_size[0]) / (by_size[-1] - by_size[0]) * MOST_STATES).astype(int)
    return order[np.append(np.diff(buckets) > 0, True)]  # the cheapest of each


def matrix_bytes(rows: int, width: int, weights: str, group: str | int) -> int:
    """What a matrix takes in a .tflite file.

    Args:
        rows, width: its shape; a row is an output channel, or a token.
        weights: a name from `WEIGHTS`.
        group: who shares a scale. Scales of rows or more are float32 beside an int64 zero point,
            those of blocks are float16.
    """
    if weights not in BITS:
        return rows * width * (2 if weights == "float16" else 4)
    integers = rows * width * BITS[weights] // 8
    if isinstance(group, int):
        return integers + 2 * rows * (width // group)
    return integers + 12 * (rows if group == "channel" else 1)
