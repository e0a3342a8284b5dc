"""The scheme that a model's weights lie on, found from the weights alone. numpy alone.

Grids are found again to the last bit (`grids.py`), so weights tell whether they were quantized and
to what, whoever did it and wherever the folder came from. What they cannot tell (what the file does
with activations and with its cache) a stage's metrics.json adds; see `recipes/schemes.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from tf_gptopt.compression.quantization.config import BITS, BLOCKS, QuantConfig, split_weights
from tf_gptopt.compression.quantization.grids import find_grid
from tf_gptopt.compression.quantization.rounding import (
    matrix_rows,
    quantizable_layers,
    round_matrix,
    shared_peaks,
)

# The smallest first: what lies on a grid of 4 bits lies on one of 8 as well
_KINDS = ("int4:channel", *(f"int4:{block}" for block in sorted(BLOCKS, reverse=True)),
          "int8:channel")  # fmt: skip
_SMOOTHED = 0.5  # whatever alpha it was: the file asks only whether the norms are to stay


def find_scheme(weights: Mapping[str, np.ndarray], is_static: bool = False) -> QuantConfig | None:
    """The integer scheme that `weights` lie on exactly, or None for float weights.

    Args:
        weights: by name, as `models.checkpoints.named_weights` gives them.
        is_static: whether the model carries ranges of static activations.
    """
    matrices = {
        layer: matrix_rows(name, weights[name])
        for layer, name in quantizable_layers(weights).items()
        if weights[name].any()  # zeros lie on every grid and say nothing
    }
    # One kind for all where there is one, as short rows lie on the grids of blocks as well
    common = next((k for k in _KINDS if all(_fits(m, k) for m in matrices.values())), None)
    found = {
        layer: common or next((kind for kind in _KINDS if _fits(rows, kind)), None)
        for layer, rows in matrices.items()
    }
    counts = Counter(kind for kind in found.values() if kind)
    if not counts:
        return None
    main = counts.most_common(1)[0][0]
    bits, group = split_weights(main)
    return QuantConfig(
        bits,
        activations="static" if is_static else "dynamic",
        granularity=group if bits == "int4" else None,
        smoothing=_SMOOTHED if _is_smoothed(weights) else 0.0,
        layers={layer: kind for layer, kind in found.items() if kind and kind != main},
        float_layers=tuple(layer for layer, kind in found.items() if not kind),
    )


def lies_on(weights: Mapping[str, np.ndarray], config: QuantConfig) -> bool:
    """Whether every matrix of `weights` has a value of `config`'s already, so that a file of that
    scheme holds them to the bit."""
    peaks = shared_peaks(weights, config)
    return all(
        np.array_equal(round_matrix(name, weights[name], config, peaks), weights[name])
        for name in quantizable_layers(weights).values()
    )


def _fits(rows: np.ndarray, kind: str) -> bool:
    bits, group = split_weights(kind)
    if isinstance(group, int) and rows.shape[1] % group:  # as QuantConfig does
        group = "channel"
    return find_grid(rows, BITS[bits], group) is not None


def _is_smoothed(weights: Mapping[str, np.ndarray]) -> bool:
    """Whether LayerNorms of blocks scale: quantization folds them away, bar those that smoothing
    needs."""
    gammas = (w for n, w in weights.items() if n.startswith("block_") and n.endswith("/gamma"))
    return any((gamma != 1).any() for gamma in gammas)
