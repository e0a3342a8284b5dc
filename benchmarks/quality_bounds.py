"""What benchmarks/quality.py set out to reach, and what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Rows = dict[str, dict[str, Any]]


def bounds(rows: Rows) -> list[dict[str, Any]]:
    """What we set out to reach, and what was reached: a row each, where its runs are done."""

    def change(name: str) -> float:
        return rows[name]["change"]

    def perplexity(name: str) -> float:
        return rows[name]["perplexity"]

    def better(ours: str, theirs: str) -> float:
        """By which share our perplexity is lower."""
        return 1 - perplexity(ours) / perplexity(theirs)

    def students(kind: str) -> float:
        return statistics.mean(perplexity(f"half-{kind}-{seed}") for seed in (0, 1, 2))

    def worse(run: str, limit: float) -> Callable[[], tuple[float, bool]]:
        return lambda: at_most(change(run), limit)

    def beats(ours: str, theirs: str, by: float = 0.0) -> Callable[[], tuple[float, bool]]:
        return lambda: at_least(better(ours, theirs), by)

    ladder = ("sparsegpt", "wanda", "magnitude", "random")
    two_four = [f"{score}-2of4-50%-tuned" for score in ("magnitude", "sparsegpt")]
    wanted: list[tuple[str, str, Callable[[], tuple[Any, bool]]]] = [
        (
            "50% magnitude, schedule and fine-tuning",
            "perplexity at most +2%",
            worse("magnitude-50%-tuned", 0.02),
        ),
        ("the same, taught by the parent", "at most +2%", worse("magnitude-50%-taught", 0.02)),
        (
            "50% magnitude, fine-tuned for twice the steps",
            "at most +2%",
            worse("magnitude-50%-tuned-long", 0.02),
        ),
        ("2:4, fine-tuned", "at most +4%", lambda: at_most(min(map(change, two_four)), 0.04)),
        ("the same, taught by the parent", "at most +4%", worse("sparsegpt-2of4-50%-taught", 0.04)),
        (
            "2:4, fine-tuned for twice the steps",
            "at most +4%",
            worse("sparsegpt-2of4-50%-tuned-long", 0.04),
        ),
        (
            "one-shot 50%: SparseGPT < Wanda < magnitude < random",
            "in this order",
            lambda: in_order([perplexity(f"{score}-50%") for score in ladder]),
        ),
        (
            "Taylor against magnitude at 70%, fine-tuned alike",
            "better",
            beats("taylor-70%-tuned", "magnitude-70%-tuned"),
        ),
        (
            "structured, a third of the parameters gone, distilled",
            "at most +5%",
            worse("third-distilled", 0.05),
        ),
        (
            "the same file's decoding against the parent's",
            "at least 1.3x",
            lambda: at_least(rows["third-distilled"]["decode_ratio"], 1.3),
        ),
        (
            "the same by Minitron rounds against that shape from scratch, same tokens",
            "better by at least 5%",
            beats("third-minitron", "third-scratch", by=0.05),
        ),
        (
            "half the depth distilled against labels alone, same tokens, three seeds",
            "better by at least 3%",
            lambda: at_least(1 - students("distilled") / students("labels"), 0.03),
        ),
        ("int8 per channel after training", "perplexity at most +0.3%", worse("ptq-int8", 0.003)),
        (
            "the same: positions with another likeliest token",
            "at most 1%",
            lambda: at_most(1 - rows["ptq-int8"]["agreement"], 0.01),
        ),
        ("int8 weight-only", "at most +0.1%", worse("ptq-int8-weight-only", 0.001)),
        ("int8 static, SmoothQuant", "at most +2%", worse("ptq-int8-static-smooth", 0.02)),
        ("int8 static, trained on its grid", "at most +1%", worse("qat-int8-static", 0.01)),
        (
            "int8 KV cache on top of int8",
            "at most +0.2%",
            lambda: at_most(-better("ptq-int8-cache", "ptq-int8"), 0.002),
        ),
        ("int4 per block of 32, GPTQ", "at most +4%", worse("ptq-int4-gptq", 0.04)),
        ("int4 per block of 32, trained on its grid", "at most +2.5%", worse("qat-int4", 0.025)),
        (
            "mixed by sensitivity against uniform int4 of the same size, both GPTQ",
            "better",
            beats("ptq-mixed", "ptq-int4-gptq"),
        ),
        (
            "half depth, half sparse, int8, distilled, against dense of the same gzip size",
            "better",
            beats("small", "small-dense"),
        ),
    ]
    found = []
    for what, bound, reach in wanted:
        try:
            reached, holds = reach()
        except KeyError:  # a run that is not done yet
            continue
        found.append({"what": what, "bound": bound, "reached": reached, "holds": holds})
    return found


def at_most(value: float, limit: float) -> tuple[float, bool]:
    return round(value, 5), value <= limit


def at_least(value: float, limit: float) -> tuple[float, bool]:
    return round(value, 5), value >= limit


def in_order(values: list[float]) -> tuple[list[float], bool]:
    return values, values == sorted(values) and len(set(values)) == len(values)
