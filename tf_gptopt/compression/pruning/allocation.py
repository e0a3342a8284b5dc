"""One threshold for all kernels: how many of its weights each of them loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.pruning.config import block_of
from tf_gptopt.compression.pruning.masks import largest, rank_units
from tf_gptopt.compression.pruning.wrapper import PruneLowMagnitude


def allocate(layers: Sequence[PruneLowMagnitude], fraction: float) -> None:
    """Set the `shares` of `layers`, so that together they lose `fraction` of their units.

    The scores of all kernels are compared as they are now, and weights that are pruned already go
    first. From then on every wrapper prunes its own share by itself: on the way from what is pruned
    now to `fraction` each goes the same part of its own way, so the total is right at every step,
    to one unit a kernel (rounding, and no kernel loses its last one).
    """
    ranks = [
        tf.reshape(
            rank_units(
                tf.constant(layer.scores()),
                tf.constant(layer.mask_values() > 0.5),
                block_of(layer.pattern),
            ),
            [-1],
        )
        for layer in layers
    ]
    sizes = np.array([int(tf.size(r)) for r in ranks])
    dead = np.array([int(tf.reduce_sum(tf.cast(r == 0, tf.int32))) for r in ranks])
    total = sizes.sum()
    if fraction * total <= dead.sum():
        gone, fraction = dead, dead.sum() / total
    else:
        keep = tf.constant(round(total * (1 - fraction)), tf.int32)
        kept = largest(tf.concat(ranks, 0)[:, None], keep)
        gone = sizes - [
            int(np.count_nonzero(k)) for k in np.split(kept.numpy(), sizes.cumsum())[:-1]
        ]
    for layer, size, before, after in zip(layers, sizes, dead, gone, strict=True):
        layer.shares.assign([dead.sum() / total, before / size, fraction, after / size])
