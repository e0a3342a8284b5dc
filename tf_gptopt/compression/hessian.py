"""A kernel changed one input after another, where later inputs make up for what earlier ones lost.

The frame that SparseGPT (arXiv:2301.00774) and GPTQ (arXiv:2210.17323) share. A Dense layer is a
least-squares problem of its own: find a W' of some kind (sparse, or on a grid) such that X W' is
near X W on calibration text. With the Hessian H = 2/n X^T X, dampened, and the upper triangular
Cholesky factor U of its inverse (H^-1 = U^T U), the inputs are gone through in order. What input i
becomes leaves an error e_i = (w_i - w'_i) / U_ii, and all later inputs take W_j -= U_ij e_i.

All outputs of a layer share U and are worked on side by side. Kernels are `(inputs, outputs)` here,
so the columns of the papers are rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.calibration import Block

DAMPENING = 0.01  # of the mean of H's diagonal


class Moments:
    """Hessian (unless left out) and mean of a Dense layer's inputs, batch by batch."""

    def __init__(self, hessian: bool = True) -> None:
        self._counts_squares = hessian
        self._squares: tf.Tensor | float = 0.0
        self._sums: tf.Tensor | float = 0.0
        self._rows = 0

    def observe(self, x: tf.Tensor) -> None:
        """Take in x `(rows, inputs)` float32."""
        if self._counts_squares:
            self._squares += tf.matmul(x, x, transpose_a=True)
        self._sums += tf.reduce_sum(x, 0)
        self._rows += len(x)

    def hessian(self) -> np.ndarray:
        """`(inputs, inputs)` float64."""
        return self._squares.numpy().astype(np.float64) * (2 / self._rows)

    def mean(self) -> np.ndarray:
        """`(inputs,)` float64."""
        return self._sums.numpy().astype(np.float64) / self._rows


def observe_moments(
    block: Block, layers: Collection[str], hessian: bool = True
) -> dict[str, Moments]:
    """Those of the inputs of a block's layers that are among `layers`, by name."""
    moments = {name: Moments(hessian) for name in block.layers if name in layers}
    block.inputs(lambda name, x: moments[name].observe(x), layers)
    return moments


def inverse_factor(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper triangular U with U^T U = H^-1 after dampening, and which inputs were always zero.

    No inverse is needed: flipped in both directions, H = L L^T makes U the flipped inverse of L.
    """
    unseen = np.diag(hessian) <= 0
    dampened = hessian.copy()
    np.fill_diagonal(dampened, np.diag(hessian) + DAMPENING * np.diag(hessian).mean())
    dampened[unseen, unseen] = 1.0
    lower = tf.linalg.cholesky(dampened[::-1, ::-1])
    inverse = tf.linalg.triangular_solve(lower, tf.eye(len(hessian), dtype=tf.float64))
    return inverse.numpy()[::-1, ::-1], unseen


def settle_in_order(
    weights: np.ndarray,
    factor: np.ndarray,
    stretch: int,
    enter: Callable[[int, int], None],
    settle: Callable[[int, np.ndarray], np.ndarray],
) -> None:
    """Replace the rows of `weights` in place, the first first, each by what `settle` makes of it
    when it has heard of all errors before it.

    Args:
        weights: `(inputs, outputs)` float64.
        factor: from `inverse_factor`.
        stretch: inputs about which something is decided together.
        enter: called as `enter(start, end)` in front of each stretch, when the errors of all
            inputs before it have reached its rows.
        settle: from an input's index and row `(outputs,)` to what it becomes.
    """
    errors = np.zeros_like(weights)

    def go_through(start: int, end: int, entered: bool = False) -> None:
        """Inputs start..end-1, of which the earlier half is done before the later half hears of it:
        the same sums as input by input, in matrix products of every size."""
        if not entered and end - start <= stretch:
            enter(start, end)
            entered = True
        if end - start == 1:
            settled = settle(start, weights[start])
            errors[start] = (weights[start] - settled) / factor[start, start]
            weights[start] = settled
            return
        unit = 1 if entered else stretch
        middle = start + max(1, (end - start) // unit // 2) * unit
        go_through(start, middle, entered)
        weights[middle:end] -= factor[start:middle, middle:end].T @ errors[start:middle]
        go_through(middle, end, entered)

    go_through(0, len(weights))
