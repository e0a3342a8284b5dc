"""`DistillConfig`: how a student listens to its teacher. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tf_gptopt._errors import UserError


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The two numbers of knowledge distillation (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        temperature: divides both models' logits before the softmax; above 1 it brings out what the
            teacher thinks of the unlikely tokens.
        alpha: weight of the teacher in [0, 1]; the labels get `1 - alpha`. 0 is plain training, and
            then the teacher is never run.

    Raises:
        UserError: when a number is out of its range.
    """

    temperature: float = 2.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise UserError(
                "temperature must be a positive number; 1 to 4 is usual. "
                f"Received: temperature={self.temperature!r}."
            )
        if not _is_number(self.alpha) or not 0.0 <= self.alpha <= 1.0:
            raise UserError(
                "alpha must be in [0, 1]: the teacher's share of the loss. "
                f"Received: alpha={self.alpha!r}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
