"""`PruneConfig`: which weights go, how many, in which pattern and when. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from tf_gptopt._errors import UserError, known_arguments, suggest

SCHEDULES = ("polynomial", "cubic", "constant", "adaptive")
SCORES = ("random", "magnitude", "gradient", "taylor", "wanda", "sparsegpt")
CALIBRATED = ("gradient", "taylor", "wanda", "sparsegpt")  # scores that have to see data
SCOPES = ("layer", "output", "global")

# The Dense kernels of every block. The token table stays dense: tied, it makes the logits as well.
BLOCK_KERNELS = ("block_*_qkv", "block_*_proj", "block_*_fc", "block_*_out")


@known_arguments
@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What `prune` does to a model, and by which schedule.

    Steps count optimizer updates since `prune`; step 0 is before the first one, so a schedule with
    `begin_step=0` acts at once. After `end_step` the masks stand still.

    Args:
        sparsity: fraction of zeros at the end in every pruned kernel, in [0, 1). Each kernel keeps
            `round(weights * (1 - sparsity))` of its weights, at least one. With 0 nothing new is
            pruned, and zeros that the model already has stay zero. An N:M pattern fixes it at
            1 - N/M. With blocks it is the fraction of blocks; adaptive goes no further than that.
        initial_sparsity: fraction at `begin_step`, for the schedules that rise.
        begin_step: first step that prunes.
        end_step: the step that reaches `sparsity`; end well before training does, so that the
            surviving weights can recover. Adaptive decides here for the last time.
        frequency: steps between two mask updates; `end_step` always is one. For adaptive, the steps
            that a rise has to recover before the validation loss judges it.
        schedule: `"polynomial"` rises fast, then gently: `sparsity` is approached by `power` of
            the remaining time; `"cubic"` is power 3 (Zhu & Gupta 2017, "To prune, or not to prune",
            arXiv:1710.01878). `"constant"` takes the whole fraction at `begin_step`; with
            `begin_step=0` that is one-shot pruning, which needs no training step. `"adaptive"`
            rises by `increment` while the validation loss allows it.
        layers: patterns (`fnmatch`) of the names of the Dense layers whose kernels are pruned.
        min_weights: kernels with fewer weights than this stay dense.
        score: what a weight is worth: `"magnitude"`, `"random"`, `"gradient"`, `"taylor"`,
            `"wanda"` or `"sparsegpt"`; see `scores.py`. The last four need calibration data, and
            SparseGPT, which changes the weights as well, is one-shot.
        pattern: `"unstructured"`; `"2:4"`, or any N:M: of every M consecutive inputs of one output
            at most N are kept (M inputs that are left over at the end make a shorter group, which
            keeps at most N as well); `"4x4"`, `"16x1"`: blocks of inputs x outputs go as a whole,
            smaller ones at the edges of a kernel that they do not divide.
        scope: which scores are compared with each other: those of one kernel (`"layer"`), of one
            output of it (`"output"`, so each output loses the same share), or of all chosen kernels
            (`"global"`, so `sparsity` is the fraction of all of them together).
        power: exponent of the polynomial schedule.
        seed: of the random score.
        tolerance: for adaptive, how much the validation loss may exceed the loss before pruning
            (0.02 = 2%).
        increment: for adaptive, the first rise; it is halved whenever it proved too much.
        refresh: steps between two measurements of the importance for gradient, taylor and wanda
            (and of the shares of the kernels for the global scope) by `pruning_callbacks`.

    Raises:
        UserError: when the values make no schedule, or contradict each other.
    """

    sparsity: float = 0.5
    initial_sparsity: float = 0.0
    begin_step: int = 0
    end_step: int = 1000
    frequency: int = 10
    schedule: str = "polynomial"
    layers: tuple[str, ...] = BLOCK_KERNELS
    min_weights: int = 0
    score: str = "magnitude"
    pattern: str = "unstructured"
    scope: str = "layer"
    power: float = 3.0
    seed: int = 0
    tolerance: float = 0.02
    increment: float = 0.05
    refresh: int = 100

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("score", SCORES), ("scope", SCOPES)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"Unknown pruning {name} {value!r}.{suggest(str(value), known)}")
        for name in ("sparsity", "initial_sparsity"):
            _check_fraction(name, getattr(self, name))
        self._check_pattern()
        if self.initial_sparsity > self.sparsity:
            raise UserError(
                "initial_sparsity must not exceed sparsity, the fraction at the end. Received: "
                f"initial_sparsity={self.initial_sparsity}, sparsity={self.sparsity}."
            )
        for name, least in (
            ("begin_step", 0),
            ("end_step", 0),
            ("frequency", 1),
            ("min_weights", 0),
            ("seed", 0),
            ("refresh", 1),
        ):
            _check_integer(name, getattr(self, name), least)
        for name in ("power", "tolerance", "increment"):
            _check_positive(name, getattr(self, name))
        if self.schedule != "constant" and self.end_step <= self.begin_step:
            raise UserError(
                "end_step must come after begin_step (or take schedule='constant'). Received: "
                f"begin_step={self.begin_step}, end_step={self.end_step}."
            )
        if self.score == "sparsegpt":
            self._check_sparsegpt()
        patterns = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        if not patterns or not all(isinstance(p, str) and p for p in patterns):
            raise UserError(
                "layers must be one or more patterns of layer names, such as 'block_*_fc'. "
                f"Received: layers={self.layers!r}."
            )
        object.__setattr__(self, "layers", patterns)  # the dataclass is frozen

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """`(N, M)` of an N:M pattern: of M consecutive inputs of an output, N are kept."""
        return n_of_m(self.pattern)

    @property
    def block(self) -> tuple[int, int]:
        """Inputs and outputs of a block; `(1, 1)` without blocks."""
        return block_of(self.pattern)

    def _check_pattern(self) -> None:
        text = isinstance(self.pattern, str)
        if not text or (
            self.pattern != "unstructured" and not self.n_of_m and self.block == (1, 1)
        ):
            raise UserError(
                "pattern must be 'unstructured', N:M with 1 <= N < M, such as '2:4', or a block of "
                f"inputs x outputs, such as '4x4'. Received: pattern={self.pattern!r}."
            )
        if not self.n_of_m:
            return
        n, m = self.n_of_m
        fixed, default = 1 - n / m, type(self).sparsity
        if self.sparsity != default and abs(self.sparsity - fixed) > 1e-6:
            raise UserError(
                f"The pattern {self.pattern} fixes the sparsity at {fixed:g}. Received: "
                f"sparsity={self.sparsity}. Leave sparsity out, or take pattern='unstructured'."
            )
        object.__setattr__(self, "sparsity", fixed)
        if self.schedule == "adaptive":
            raise UserError(
                f"schedule='adaptive' may stop before the pattern {self.pattern} is whole. Take "
                "another schedule, or an unstructured or block pattern."
            )
        if self.scope == "global":
            raise UserError(
                f"The pattern {self.pattern} fixes the sparsity of every kernel, so kernels cannot "
                "share one. Take scope='layer'."
            )

    def _check_sparsegpt(self) -> None:
        if self.schedule != "constant" or self.begin_step:
            raise UserError(
                "score='sparsegpt' solves for all weights at once, so it prunes in one shot. Take "
                f"schedule='constant' and begin_step=0. Received: schedule={self.schedule!r}, "
                f"begin_step={self.begin_step}."
            )
        if self.scope == "global":
            raise UserError(
                "score='sparsegpt' solves one layer after the other and cannot compare them. Take "
                "scope='layer' or scope='output'."
            )


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """`"2:4"` -> `(2, 4)`; None for what is no N:M pattern."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 1 <= int(found[1]) < int(found[2]):
        return None
    return int(found[1]), int(found[2])


def block_of(pattern: str) -> tuple[int, int]:
    """`"16x1"` -> `(16, 1)`; `(1, 1)` for what is no block."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", pattern)
    return (int(found[1]), int(found[2])) if found else (1, 1)


def _check_fraction(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value < 1.0:
        hint = ""
        if number and 1.0 < value < 100.0:
            hint = f" For {value:g}% write {value / 100:g}."
        raise UserError(
            f"{name} must be a fraction in [0, 1): the share of zeros. "
            f"Received: {name}={value!r}.{hint}"
        )


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(
            f"{name} must be an integer of at least {least}. Received: {name}={value!r}."
        )


def _check_positive(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 < value < float("inf"):
        raise UserError(f"{name} must be a positive number. Received: {name}={value!r}.")
