"""`PruneConfig`: how many weights go, which layers lose them and when. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
from typing import Any

from tf_gptopt._errors import UserError, suggest

SCHEDULES = ("polynomial", "constant")

# The Dense kernels of every block. The token table stays dense: tied, it makes the logits as well.
BLOCK_KERNELS = ("block_*_qkv", "block_*_proj", "block_*_fc", "block_*_out")


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What `prune` does to a model, and by which schedule.

    Steps count optimizer updates since `prune`; step 0 is before the first one, so a schedule with
    `begin_step=0` acts at once. After `end_step` the masks stand still.

    Args:
        sparsity: fraction of zeros at the end in every pruned kernel, in [0, 1). Each kernel keeps
            `round(weights * (1 - sparsity))` of its weights, at least one. With 0 nothing new is
            pruned, and zeros that the model already has stay zero.
        initial_sparsity: fraction at `begin_step`, for the polynomial schedule.
        begin_step: first step that prunes.
        end_step: the step that reaches `sparsity`; end well before training does, so that the
            surviving weights can recover.
        frequency: steps between two mask updates; `end_step` always is one.
        schedule: `"polynomial"` rises fast, then gently: `sparsity` is approached by the cube of
            the remaining time (Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878).
            `"constant"` takes the whole fraction at `begin_step`; with `begin_step=0` that is
            one-shot magnitude pruning, which needs no training step.
        layers: patterns (`fnmatch`) of the names of the Dense layers whose kernels are pruned.
        min_weights: kernels with fewer weights than this stay dense.

    Raises:
        UserError: when the numbers make no schedule.
    """

    sparsity: float = 0.5
    initial_sparsity: float = 0.0
    begin_step: int = 0
    end_step: int = 1000
    frequency: int = 10
    schedule: str = "polynomial"
    layers: tuple[str, ...] = BLOCK_KERNELS
    min_weights: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            hint = suggest(str(self.schedule), SCHEDULES)
            raise UserError(f"Unknown pruning schedule {self.schedule!r}.{hint}")
        for name in ("sparsity", "initial_sparsity"):
            _check_fraction(name, getattr(self, name))
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
        ):
            _check_integer(name, getattr(self, name), least)
        if self.schedule == "polynomial" and self.end_step <= self.begin_step:
            raise UserError(
                "end_step must come after begin_step (or take schedule='constant'). Received: "
                f"begin_step={self.begin_step}, end_step={self.end_step}."
            )
        patterns = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        if not patterns or not all(isinstance(p, str) and p for p in patterns):
            raise UserError(
                "layers must be one or more patterns of layer names, such as 'block_*_fc'. "
                f"Received: layers={self.layers!r}."
            )
        object.__setattr__(self, "layers", patterns)  # the dataclass is frozen


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
