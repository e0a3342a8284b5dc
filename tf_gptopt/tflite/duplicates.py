"""What a .tflite file stores more than once: the same bytes, or the same numbers in two forms."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from tf_gptopt.tflite.reading import constants, dequantized, tensor_name

_WORTH_A_LINE = 256  # bytes, from which a second copy is told
_SAMPLE = 256  # numbers of a matrix, from which it is compared with others
_CORNER = 64  # rows and columns of theirs that are compared
_ALIKE = 0.98  # correlation, from which they are the same one in two forms


def equal_buffers(model: Any) -> list[tuple[str, int]]:
    """Buffers of equal content: their names, and the bytes of all but one."""
    names = {tensor.Buffer(): tensor_name(tensor) for _, tensor in constants(model)}
    groups = defaultdict(list)
    for i in range(1, model.BuffersLength()):
        buffer = model.Buffers(i)
        if (size := buffer.DataLength()) >= _WORTH_A_LINE:
            name = names.get(i) or f"buffer {i}"
            groups[size, hashlib.sha256(buffer.DataAsNumpy()).digest()].append(name)
    return [
        (_listed(same), size * (len(same) - 1))
        for (size, _), same in groups.items()
        if len(same) > 1
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def two_forms(
    weights: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
) -> list[tuple[str, int]]:
    """Matrices that hold the same numbers, rounded differently or transposed: their names, and the
    bytes of the smaller one.

    Args:
        weights: what `reading.read_weights` gives.
    """
    groups = defaultdict(list)
    for name, (values, _) in weights.items():
        if values.ndim == 2 and values.size >= _SAMPLE:
            groups[frozenset(values.shape)].append(name)
    found = []
    for names in groups.values():
        corners = {name: _corner(*weights[name]) for name in names if len(names) > 1}
        for first, second in itertools.combinations(corners, 2):
            stored = [weights[name][0] for name in (first, second)]
            if stored[0].dtype == stored[1].dtype and np.array_equal(*stored):
                continue  # equal to the byte: told elsewhere
            if any(_alike(corners[first], form) for form in (corners[second], corners[second].T)):
                found.append((_listed([first, second]), min(array.nbytes for array in stored)))
    return found


def _corner(values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    return dequantized(values, scales)[:_CORNER, :_CORNER]


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(
        a.std() and b.std() and np.corrcoef(a.ravel(), b.ravel())[0, 1] > _ALIKE
    )
