"""The one check of token ids that come in, for every function that takes some. Needs numpy alone.

numpy turns much into integers without a word: `np.asarray(x, np.int32)` makes 1 of 1.5, of True, of
"1" and of 2**32 + 1. So nothing is cast here before it has been looked at.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError

_INT32 = np.iinfo(np.int32)


def as_ids(
    values: Any, expected: str, *, ndim: Collection[int] = (1,), vocab_size: int | None = None
) -> np.ndarray:
    """`values` as int32, of the same shape.

    Args:
        values: integers, as an array, a tensor or (nested) lists; none may be there.
        expected: the sentence that says what would be right.
        ndim: how many axes there may be.
        vocab_size: how many tokens there are; None takes whatever fits into int32.

    Raises:
        UserError: for anything but integers, another number of axes, and ids out of range.
    """
    array = _as_array(values)
    none = array.size == 0 and array.dtype.kind == "f"  # how numpy reads []
    if array.ndim not in ndim or not (array.dtype.kind in "iu" or none):
        raise UserError(
            f"{expected} Received: {array.dtype} values of shape {array.shape} "
            f"({type(values).__name__})."
        )
    low, high = (_INT32.min, _INT32.max) if vocab_size is None else (0, vocab_size - 1)
    outside = array[(array < low) | (array > high)]
    if outside.size:
        if vocab_size is None:
            raise UserError(f"{outside[0]} is no token id: ids are from 0 to {_INT32.max}.")
        raise UserError(
            f"Token id {outside[0]} is outside the vocabulary of {vocab_size} tokens. Use the "
            "tokenizer that the model was trained with."
        )
    return array.astype(np.int32)


def _as_array(values: Any) -> np.ndarray:
    if isinstance(values, np.ma.MaskedArray):
        values = values if not np.ma.is_masked(values) else None
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError):  # lists of different lengths
        return np.empty(0, object)
    if array.dtype.kind in "iu" and isinstance(values, (list, tuple)) and _has_bool(values):
        return np.empty(array.shape, bool)
    return array


def _has_bool(values: Any) -> bool:
    """Whether a Boolean is among nested lists' numbers: numpy counts it as 0 or 1."""
    return any(
        _has_bool(item) if isinstance(item, (list, tuple)) else isinstance(item, (bool, np.bool_))
        for item in values
    )
