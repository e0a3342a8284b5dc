"""Weights that are numbers: NaN comes out of a training that went wrong, and stays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tf_gptopt._errors import UserError


def check_finite(weights: Mapping[str, np.ndarray]) -> None:
    """Raise a `UserError` for a weight that is NaN or infinite."""
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"Weight {name!r} holds NaN or infinity: the model has diverged. "
                "Take an earlier checkpoint."
            )
