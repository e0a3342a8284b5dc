"""The loss of a language model straight from its last hidden states, a chunk of rows at a time.

Logits are the largest array of a small GPT: 2,048 tokens of GPT-2's vocabulary are 412 MB, which a
plain loss holds three times over (logits, probabilities, gradient). Here each chunk's logits become
its loss and its gradient at once and are gone before the next (Wijmans et al. 2024, "Cut Your
Losses in Large-Vocabulary Language Models", arXiv:2411.09009, without the kernels).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_gptopt.models.custom_gradients import custom_gradient
from tf_gptopt.models.fused import PLAIN, CrossEntropy, cross_entropy_gradient, cross_entropy_of

CHUNK = 1 << 24  # logits: 64 MB


class Head(NamedTuple):
    """Where logits come from; `TokenLogits` leaves it on its output as the attribute `head`.

    Attributes:
        rows: `(batch, time, width)`, the last hidden states.
        table: `(vocab_size, width)`.
        training: whether gradients will be asked for.
    """

    rows: tf.Tensor
    table: tf.Tensor
    training: bool


def linear_cross_entropy(
    head: Head,
    labels: tf.Tensor,
    weights: tf.Tensor,
    chunk: int = CHUNK,
    form: CrossEntropy = PLAIN,
) -> tf.Tensor:
    """Sum of weights * the cross-entropy of softmax(rows table^T), the logits never whole.

    In training the gradient is made together with the loss, so it takes no more products than the
    plain loss does. Keep weights near 1 and divide the sum afterwards: 16-bit gradients are made
    before the division.

    Args:
        head: where the logits come from.
        labels: `(batch, time)` int32, each in [0, vocab_size); another one gives NaN unless its
            weight is 0.
        weights: `(batch, time)` float32; they get no gradient.
        chunk: how many logits are held at a time, if that is at least a row.
        form: of the cross-entropy.

    Returns a float32 scalar.
    """
    vocab, width = head.table.shape
    rows = tf.reshape(head.rows, [-1, width])
    count = rows.shape[0] or tf.shape(rows)[0]  # known in training, so that XLA compiles once
    chunks, size = pieces_of(count, max(1, chunk // vocab))

    def split(x: tf.Tensor) -> tf.Tensor:
        x = tf.pad(x, [[0, chunks * size - count]] + [[0, 0]] * (len(x.shape) - 1))
        return tf.reshape(x, [chunks, size, *x.shape[1:]])

    labels, weights = tf.reshape(labels, [-1]), tf.reshape(weights, [-1])
    labels, weights = split(tf.where(weights == 0, 0, labels)), split(weights)

    @custom_gradient
    def loss_of(rows: tf.Tensor, table: tf.Tensor) -> tuple[tf.Tensor, Any]:
        pieces = split(rows)

        def forward(i: Any) -> tuple[tf.Tensor, ...]:
            logits = tf.cast(tf.matmul(pieces[i], table, transpose_b=True), tf.float32)
            probabilities = tf.nn.softmax(logits)
            losses, log_z = cross_entropy_of(logits, probabilities, labels[i], form)
            return tf.reduce_sum(losses * weights[i]), probabilities, log_z

        def backward(i: Any, *softmax: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # log_z comes out of the loss, which is done with the logits before the gradient begins
            slope = cross_entropy_gradient(*softmax, labels[i], weights[i], form)
            slope = tf.cast(slope, table.dtype)
            wide = tf.matmul(pieces[i], slope, transpose_a=True)  # (width, vocab): see TokenLogits
            return tf.matmul(slope, table), tf.cast(wide, tf.float32)

        def step(i: Any, total: Any, d_rows: Any, d_table: Any) -> tuple[Any, ...]:
            loss, *softmax = forward(i)
            d_piece, d_wide = backward(i, *softmax)
            return i + 1, total + loss, d_rows.write(i, d_piece), d_table + d_wide

        if not head.training:
            _, loss = tf.while_loop(
                lambda i, _: i < chunks,
                lambda i, total: (i + 1, total + forward(i)[0]),
                (0, 0.0),
                parallel_iterations=1,
            )
            return loss, lambda upstream: (None, None)
        if rows.shape[0] is not None and chunks == 1:
            loss, *softmax = forward(0)
            d_rows, d_table = backward(0, *softmax)
        else:
            array = tf.TensorArray(rows.dtype, chunks, element_shape=pieces.shape[1:])
            start = (0, 0.0, array, tf.zeros([width, vocab]))
            _, loss, d_rows, d_table = tf.while_loop(
                lambda i, *_: i < chunks, step, start, parallel_iterations=1
            )  # two chunks at once would be twice the memory
            d_rows = d_rows.stack()
        d_rows = tf.reshape(d_rows, [-1, width])[:count]

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            of_table = tf.transpose(d_table * upstream)
            return d_rows * tf.cast(upstream, rows.dtype), tf.cast(of_table, table.dtype)

        return loss, gradient

    return loss_of(rows, head.table)


def pieces_of(count: Any, most: int) -> tuple[Any, Any]:
    """`(pieces, rows of each)` by which `count` rows go at most `most` at a time; one, empty, where
    a replica has no row."""
    at_least_one = max if isinstance(count, int) else tf.maximum
    pieces = at_least_one(-(-count // most), 1)
    return pieces, -(-count // pieces)
