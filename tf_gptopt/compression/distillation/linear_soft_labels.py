"""Soft labels and labels straight from the last hidden states, a chunk of rows at a time.

The counterpart of `models/linear_cross_entropy.py` for a student and its teachers: neither's logits
are ever whole, and both losses share the student's products. At a vocabulary of 50,257, four
sequences of 256 tokens have 206 MB of logits, of which a plain loss holds some six copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_gptopt.compression.distillation.losses import SoftLabels
from tf_gptopt.compression.distillation.soft_labels import Logits, Target, TopK, loss_and_gradient
from tf_gptopt.models.custom_gradients import custom_gradient
from tf_gptopt.models.fused import (
    PLAIN,
    CrossEntropy,
    cross_entropy_gradient,
    cross_entropy_of,
    xla,
)
from tf_gptopt.models.linear_cross_entropy import CHUNK, Head, pieces_of


def linear_soft_labels(
    student: Head,
    teacher: Sequence[Head] | TopK,
    labels: tf.Tensor,
    weights: tf.Tensor,
    soft: SoftLabels,
    soft_share: float,
    hard_share: float,
    shares: tuple[float, ...] = (1.0,),
    chunk: int = CHUNK,
    form: CrossEntropy = PLAIN,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`soft_share` x soft labels + `hard_share` x cross-entropy, and both of them.

    Args:
        student: where the student's logits come from.
        teacher: the same of each teacher, or what is known of its logits, `(batch, time, ...)`.
        labels: `(batch, time)` int32, each in [0, vocab_size); another one gives NaN unless its
            weight is 0.
        weights: `(batch, time)` float32, of each token in both sums; they get no gradient.
        soft: the divergence.
        shares: of each teacher in the mean of their probabilities.
        chunk: how many logits of a model are held at a time, if that is at least a row.
        form: of the cross-entropy.

    Returns:
        Three float32 scalars: the total, and the weighted sums of the soft labels' losses and of
        the cross-entropies. The total alone has a gradient, to the student's rows and table.
    """
    vocab, width = student.table.shape
    rows = tf.reshape(student.rows, [-1, width])
    count = rows.shape[0] or tf.shape(rows)[0]
    chunks, size = pieces_of(count, max(1, chunk // vocab))

    def split(x: tf.Tensor) -> tf.Tensor:
        """`(batch, time, ...)` -> `(chunks, size, ...)`, zeros at the end."""
        x = tf.reshape(x, [-1, *x.shape[2:]])
        x = tf.pad(x, [[0, chunks * size - count]] + [[0, 0]] * (len(x.shape) - 1))
        return tf.reshape(x, [chunks, size, *x.shape[1:]])

    labels, weights = split(tf.where(weights == 0, 0, labels)), split(weights)
    if isinstance(teacher, TopK):
        known: list[tf.Tensor] = [split(x) for x in teacher]
    else:
        known = [split(tf.stop_gradient(head.rows)) for head in teacher]

    def target(i: Any) -> Target:
        if isinstance(teacher, TopK):
            return TopK(known[0][i], known[1][i])
        return Logits(
            tuple(
                _logits(rows[i], tf.stop_gradient(head.table))
                for rows, head in zip(known, teacher, strict=True)
            ),
            shares,
        )

    @custom_gradient
    def loss_of(student_rows: tf.Tensor, table: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Any]:
        pieces = split(student_rows)

        def both(i: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
            logits = _logits(pieces[i], table)
            losses, slope = loss_and_gradient(soft, target(i), logits)
            probabilities = tf.nn.softmax(logits)
            hard, log_z = cross_entropy_of(logits, probabilities, labels[i], form)
            of_token = probabilities, log_z, labels[i], weights[i]
            slope = _sum(slope, *of_token, soft_share, hard_share, form)
            slope = tf.cast(slope, table.dtype)
            wide = tf.matmul(pieces[i], slope, transpose_a=True)  # (width, vocab): see TokenLogits
            return (
                tf.reduce_sum(losses * weights[i]),
                tf.reduce_sum(hard * weights[i]),
                tf.matmul(slope, table),
                tf.cast(wide, tf.float32),
            )

        def step(i: Any, softs: Any, hards: Any, d_rows: Any, d_table: Any) -> tuple[Any, ...]:
            of_soft, of_hard, d_piece, d_wide = both(i)
            return (
                i + 1,
                softs + of_soft,
                hards + of_hard,
                d_rows.write(i, d_piece),
                (d_table + d_wide),
            )

        if rows.shape[0] is not None and chunks == 1:
            softs, hards, d_rows, d_table = both(0)
        else:
            array = tf.TensorArray(rows.dtype, chunks, element_shape=pieces.shape[1:])
            start = (0, 0.0, 0.0, array, tf.zeros([width, vocab]))
            _, softs, hards, d_rows, d_table = tf.while_loop(
                lambda i, *_: i < chunks, step, start, parallel_iterations=1
            )  # two chunks at once would be twice the memory
            d_rows = d_rows.stack()
        d_rows = tf.reshape(tf.reshape(d_rows, [-1, width])[:count], tf.shape(student_rows))

        def gradient(upstream: tf.Tensor, *_: Any) -> tuple[tf.Tensor, tf.Tensor]:
            of_table = tf.transpose(d_table * upstream)
            return d_rows * tf.cast(upstream, rows.dtype), tf.cast(of_table, table.dtype)

        total = soft_share * softs + hard_share * hards
        return (total, softs, hards), gradient

    return loss_of(student.rows, student.table)


def _logits(rows: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.matmul(rows, table, transpose_b=True), tf.float32)


@xla
def _sum(
    soft: tf.Tensor,
    probabilities: tf.Tensor,
    log_z: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
    soft_share: float,
    hard_share: float,
    form: CrossEntropy,
) -> tf.Tensor:
    """Both gradients to the logits as one."""
    hard = cross_entropy_gradient(probabilities, log_z, labels, hard_share * weights, form)
    return (soft_share * weights)[:, None] * soft + hard
