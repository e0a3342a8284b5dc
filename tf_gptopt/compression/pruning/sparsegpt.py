"""SparseGPT: prune a kernel in one shot, and let the weights that stay make up for those that go.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv:2301.00774. In the frame of `compression/hessian.py`, with U the factor of the Hessian's
inverse, a weight's saliency, the error that its removal costs after the rest has adapted to it, is
(w_i / U_ii)^2. The least salient of the next 128 inputs go; for N:M, of the next M. What goes
leaves an error that all later inputs make up for.

Not in the paper: weights that are zero already go first and stay zero; blocks (`"4x4"`), whose
saliency is the mean over their weights; exact counts, dealt to each stretch of 128 inputs by the
weights that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from tf_gptopt.compression.block_parts import HEAD
from tf_gptopt.compression.calibration import Progress, check_layers, walk_blocks
from tf_gptopt.compression.hessian import inverse_factor, observe_moments, settle_in_order
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.models.gpt import GPTModel

STRETCH = 128  # inputs whose masks are chosen together


def solve(
    model: GPTModel,
    config: PruneConfig,
    token_ids: Any,
    layers: Collection[str],
    on_progress: Progress | None = None,
) -> None:
    """Prune some kernels of `model` in place by SparseGPT, block by block.

    A block's kernels are all solved for the inputs that the dense block makes of what the pruned
    blocks before it hand on, as in the authors' code. Memory: see `calibration.py`, and for one
    block the Hessian of each of its layers and some float64 matrices of the largest's size.
    The same call gives the same weights.

    Args:
        model: a plain `GPTModel`.
        config: `sparsity`, `pattern` and `scope` count. (There is no global scope: kernels are
            solved one after the other, and their errors have no common scale.)
        token_ids: `(examples, time)` integers; see `calibration_ids`.
        layers: names of the Dense layers to prune.
        on_progress: called as `on_progress(done, total, what)`.

    Raises:
        UserError: for tokens that are not for this model, and names that are no Dense layer's.
    """
    check_layers(model, layers)
    left = set(layers)
    for block in walk_blocks(model, token_ids, on_progress=on_progress, head=HEAD in left):
        moments = observe_moments(block, left)
        for name in moments:
            kernel = model.base_layer(name).kernel
            hessian = moments[name].hessian()
            kernel.assign(prune_kernel(kernel.numpy(), hessian, config))
        left -= moments.keys()
        if not left:
            return


def prune_kernel(
    kernel: np.ndarray, hessian: np.ndarray, config: PruneConfig, stretch: int = STRETCH
) -> np.ndarray:
    """A sparse kernel near `kernel` in what it does to the inputs.

    Args:
        kernel: `(inputs, outputs)`.
        hessian: `(inputs, inputs)` float64, of any scale.
        config: `sparsity`, `pattern` and `scope` count.
        stretch: inputs whose masks are chosen together; N:M and blocks round it to their own.

    Returns:
        `(inputs, outputs)` in the kernel's dtype, with +0.0 wherever it was zero, and as many more
        zeros as the config asks for. An input that is always zero loses its weights first.
    """
    alive = kernel != 0
    if not alive.any():
        return kernel
    weights = kernel.astype(np.float64)
    factor, unseen = inverse_factor(hessian)
    scale = np.where(unseen, 0.0, 1 / np.diag(factor) ** 2)[:, None]
    stretch, choose = _chooser(alive, config, stretch)
    mask = np.zeros_like(alive)

    def choose_mask(start: int, end: int) -> None:
        mask[start:end] = choose(start, scale[start:end] * weights[start:end] ** 2)

    def keep(i: int, row: np.ndarray) -> np.ndarray:
        return np.where(mask[i], row, 0.0)

    settle_in_order(weights, factor, stretch, choose_mask, keep)
    return weights.astype(kernel.dtype)


# Which weights stay


def _chooser(
    alive: np.ndarray, config: PruneConfig, stretch: int
) -> tuple[int, Callable[[int, np.ndarray], np.ndarray]]:
    """How many inputs have their masks chosen together, and the choice itself: from the first of
    them and their saliency `(inputs, outputs)` to a mask of that shape."""
    if config.n_of_m:
        keep, group = config.n_of_m

        def choose_of_m(start: int, saliency: np.ndarray) -> np.ndarray:
            present = alive[start : start + len(saliency)]
            return largest(np.where(present, saliency, -1.0), keep) & present

        return group, choose_of_m

    height, width = config.block
    stretch = max(1, stretch // height) * height
    counts = _sum_blocks(np.ones(alive.shape), height, width)
    units = _sum_blocks(alive, height, width) > 0
    tall = stretch // height  # units of a stretch
    shares = _shares(units, tall, config)

    def choose(start: int, saliency: np.ndarray) -> np.ndarray:
        rows = slice(start // height, start // height + tall)
        present = alive[start : start + len(saliency)]
        mean = _sum_blocks(np.where(present, saliency, 0.0), height, width) / counts[rows]
        values = np.where(units[rows], mean, -1.0)
        compared = values if config.scope == "output" else values.reshape(-1, 1)
        kept = largest(compared, shares[start // stretch]).reshape(values.shape)
        kept = np.repeat(np.repeat(kept, height, 0), width, 1)
        return kept[: len(saliency), : saliency.shape[1]] & present

    return stretch, choose


def _shares(units: np.ndarray, tall: int, config: PruneConfig) -> np.ndarray:
    """How many units stay in each stretch of `tall` rows, `(stretches, columns)` ints: of what the
    kernel (or each column, for scope "output") keeps, its share by the units that it has."""
    starts = range(0, len(units), tall)
    present = np.add.reduceat(units.astype(np.int64), starts, axis=0)
    size = len(units)
    if config.scope != "output":
        present, size = present.sum(1, keepdims=True), units.size
    sums = np.cumsum(present, axis=0)
    keep = np.minimum(max(1, round(size * (1.0 - config.sparsity))), sums[-1])
    dealt = np.floor(sums * (keep / np.maximum(sums[-1], 1)) + 0.5).astype(np.int64)
    return np.diff(dealt, axis=0, prepend=0)


def largest(values: np.ndarray, keep: Any) -> np.ndarray:
    """A mask of the `keep` largest of each column, of equal ones the first."""
    rows = len(values)
    place = np.clip(rows - np.broadcast_to(keep, values.shape[1:]), 0, rows - 1)
    threshold = np.take_along_axis(np.sort(values, axis=0), place[None], axis=0)
    above, equal = values > threshold, values == threshold
    return above | (equal & (np.cumsum(equal, axis=0) <= keep - above.sum(0)))


def _sum_blocks(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums over blocks, smaller ones at the edges."""
    if height > 1:
        x = np.add.reduceat(x, range(0, len(x), height), axis=0)
    if width > 1:
        x = np.add.reduceat(x, range(0, x.shape[1], width), axis=1)
    return x
