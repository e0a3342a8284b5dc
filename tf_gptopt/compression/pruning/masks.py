"""Which weights stay: masks of an exact number of weights, in every pattern and scope.

Everything here is TensorFlow with static shapes, so it runs inside a training step, on each replica
alone, and XLA can compile it. Equal scores never blur a count: of equal ones the first are kept.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gptopt.compression.pruning.config import block_of, n_of_m


def choose(
    scores: tf.Tensor,
    alive: tf.Tensor,
    fraction: tf.Tensor | float,
    pattern: str = "unstructured",
    scope: str = "layer",
) -> tf.Tensor:
    """The weights of one kernel that stay when `fraction` of them are to be zero.

    Args:
        scores: `(inputs, outputs)` float32, not negative; the larger ones stay.
        alive: `(inputs, outputs)` bool; False is pruned already, counts, and never comes back.
        fraction: of zeros, a scalar in [0, 1); for an N:M pattern at most 1 - N/M, which completes
            it, and less is on the way there.
        pattern: as in `PruneConfig`.
        scope: `"output"` gives each output column the fraction; otherwise the kernel has it.

    Returns:
        `(inputs, outputs)` bool, a subset of `alive`: per kernel or column exactly
        `max(1, round(units * (1 - fraction)))` units (weights, or blocks), unless fewer are alive.
    """
    fraction = tf.cast(fraction, tf.float64)
    if n_of_m(pattern):
        return _choose_n_of_m(scores, alive, fraction, *n_of_m(pattern), scope)
    block = block_of(pattern)
    ranks = rank_units(scores, alive, block)
    shape = ranks.shape
    if scope != "output":
        ranks = tf.reshape(ranks, [-1, 1])
    keep = tf.maximum(1, _round(ranks.shape[0] * (1.0 - fraction)))
    kept = tf.reshape(largest(ranks, keep), shape)
    if block != (1, 1):
        kept = tf.repeat(tf.repeat(kept, block[0], 0), block[1], 1)
        kept = kept[: scores.shape[0], : scores.shape[1]]
    return kept & alive


def rank_units(scores: tf.Tensor, alive: tf.Tensor, block: tuple[int, int]) -> tf.Tensor:
    """The order in which the units of a kernel stay: int32, 0 for those that are pruned already.

    A unit is a weight, or a block, which is worth the mean of its scores (the sum, but fair to the
    smaller blocks at the edges); it is `(inputs, outputs)` blocks then.
    """
    if block != (1, 1):
        counts = _sum_blocks(tf.ones_like(scores), block)
        scores = _sum_blocks(tf.where(alive, scores, 0.0), block) / counts
        alive = _sum_blocks(tf.cast(alive, tf.float32), block) > 0
    # bit patterns of non-negative floats are ordered as the floats are; 0 is free for the dead
    return tf.where(alive, tf.bitcast(scores, tf.int32) + 1, 0)


def largest(ranks: tf.Tensor, keep: tf.Tensor) -> tf.Tensor:
    """A mask of exactly the `keep` largest ranks of each column.

    Bisects for a threshold: 31 counts in place of a sort (about 10x faster than `tf.math.top_k` at
    2 M ranks).

    Args:
        ranks: `(rows, columns)` int32, not negative.
        keep: int32 scalar, at least 0 and at most `rows`.
    """

    def count(chosen: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(chosen, tf.int32), axis=0)

    def lower(bit: tf.Tensor, threshold: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        candidate = threshold + tf.bitwise.left_shift(1, bit)
        return bit - 1, tf.where(count(ranks >= candidate) >= keep, candidate, threshold)

    start = (tf.constant(30), tf.zeros(ranks.shape[1:], tf.int32))
    _, threshold = tf.while_loop(lambda bit, _: bit >= 0, lower, start)
    above, equal = ranks > threshold, ranks == threshold
    first = tf.cumsum(tf.cast(equal, tf.int32), axis=0) <= keep - count(above)
    return above | (equal & first)


def largest_of_groups(ranks: tf.Tensor, n: int, m: int) -> tf.Tensor:
    """A mask of the `n` largest ranks of every `m` consecutive rows of a column.

    The last group may be shorter; it is filled up with ranks of 0, as hardware pads a kernel.
    """
    rows, columns = ranks.shape
    groups = -(-rows // m)
    grouped = tf.pad(ranks, [[0, groups * m - rows], [0, 0]])
    grouped = tf.reshape(grouped, [groups, m, columns])
    place = tf.reshape(tf.range(m), [m, 1])
    ahead = tf.zeros_like(grouped)  # how many of its group come before it
    for i in range(m):
        rival = grouped[:, i : i + 1]
        ahead += tf.cast((rival > grouped) | ((rival == grouped) & (i < place)), tf.int32)
    return tf.reshape(ahead < n, [-1, columns])[:rows]


def _choose_n_of_m(
    scores: tf.Tensor, alive: tf.Tensor, fraction: tf.Tensor, n: int, m: int, scope: str
) -> tf.Tensor:
    """What the pattern keeps stays all the way; of the others, the smallest go first."""
    ranks = rank_units(scores, alive, (1, 1))
    kept = largest_of_groups(ranks, n, m) & alive
    others = tf.where(kept, 0, ranks)
    if scope != "output":
        others = tf.reshape(others, [-1, 1])
    whole_groups, rest = divmod(scores.shape[0], m)
    to_go = whole_groups * (m - n) + max(0, rest - n)  # in a column, when nothing is pruned yet
    to_go *= scores.shape[1] // others.shape[1]
    keep = _round(to_go * (1.0 - fraction / (1.0 - n / m)))
    return kept | (tf.reshape(largest(others, keep), alive.shape) & alive)


def _sum_blocks(x: tf.Tensor, block: tuple[int, int]) -> tf.Tensor:
    """Sums over blocks of a matrix, filled up with zeros."""
    (rows, columns), (height, width) = x.shape, block
    down, across = -(-rows // height), -(-columns // width)
    x = tf.pad(x, [[0, down * height - rows], [0, across * width - columns]])
    return tf.reduce_sum(tf.reshape(x, [down, height, across, width]), [1, 3])


def _round(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.round(x), tf.int32)
