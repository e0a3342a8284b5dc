"""Soft labels: divergences between two distributions over the vocabulary, and their gradients.

A loss and its gradient are made together, as one XLA island around TensorFlow's own softmax (which
uses all cores, and XLA's on a CPU does not): a third less time than the same operations one by one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.distillation.losses import SoftLabels
from tf_gptopt.models.custom_gradients import custom_gradient
from tf_gptopt.models.fused import xla

_LEAST = 1e-30  # of a probability whose logarithm is taken


class Logits(NamedTuple):
    """What one or several teachers think of all tokens.

    Attributes:
        logits: of each teacher, `(..., vocab_size)`.
        shares: of each in the mean of their probabilities; they sum to 1.
    """

    logits: tuple[tf.Tensor, ...]
    shares: tuple[float, ...] = (1.0,)


class TopK(NamedTuple):
    """What a teacher thinks of its likeliest tokens, at the temperature of the loss.

    Attributes:
        ids: `(..., k)` int32.
        log_probs: `(..., k + 1)` float32: of each, and last of all other tokens together.
    """

    ids: tf.Tensor
    log_probs: tf.Tensor


Target = Logits | TopK


def distillation_loss(
    teacher: tf.Tensor | Target,
    student_logits: tf.Tensor,
    temperature: float,
    divergence: str = "forward",
    beta: float = 0.5,
) -> tf.Tensor:
    """T^2 times the divergence of each token; `SoftLabels` has the formulas.

    Of a `TopK` target the distributions are over k + 1 events: each of its tokens, and any other.
    Only the student gets a gradient; one array of logits' size is kept for the backward pass.

    Args:
        teacher: logits `(..., vocab_size)` of one teacher, or a `Target`.
        student_logits: `(..., vocab_size)`, any float dtype.
        temperature: T.
        divergence: "forward", "reverse" or "js".
        beta: of "js".

    Returns:
        float32, one number for each row of logits, in nats.
    """
    if not isinstance(teacher, (Logits, TopK)):
        teacher = Logits((teacher,))
    soft = SoftLabels(temperature, divergence, beta)
    student_logits = tf.cast(student_logits, tf.float32)
    vocab, shape = student_logits.shape[-1], tf.shape(student_logits)

    @custom_gradient
    def loss_of_student(logits: tf.Tensor) -> tuple[tf.Tensor, Any]:
        rows = tf.reshape(logits, [-1, vocab])
        losses, gradient = loss_and_gradient(soft, target_rows(teacher), rows)
        gradient = tf.reshape(gradient, shape)
        return tf.reshape(losses, shape[:-1]), lambda upstream: upstream[..., None] * gradient

    return loss_of_student(student_logits)


def target_rows(target: Target) -> Target:
    """The same target with all its axes but the last made one; float32."""
    if isinstance(target, TopK):
        ids, log_probs = (tf.reshape(x, [-1, x.shape[-1]]) for x in target)
        return TopK(ids, log_probs)
    logits = tuple(tf.reshape(x, [-1, x.shape[-1]]) for x in map(tf.stop_gradient, target.logits))
    return Logits(tuple(tf.cast(x, tf.float32) for x in logits), target.shares)


def loss_and_gradient(
    soft: SoftLabels, target: Target, logits: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """T^2 times the divergence of each row, `(rows,)`, and its gradient to the student's `logits`,
    `(rows, vocab_size)` float32."""
    form = soft.temperature, soft.divergence, soft.beta
    q = tf.nn.softmax(logits / soft.temperature)
    if isinstance(target, TopK):
        return _of_top_k(target.ids, target.log_probs, logits, q, *form)
    return _of_all(*with_softmax(soft, target), target.shares, logits, q, *form)


def with_softmax(
    soft: SoftLabels, target: Logits
) -> tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
    """The teachers' logits and their probabilities at the loss's temperature."""
    return target.logits, tuple(tf.nn.softmax(x / soft.temperature) for x in target.logits)


@xla
def _of_all(
    teachers: tuple[tf.Tensor, ...],
    softmaxes: tuple[tf.Tensor, ...],
    shares: tuple[float, ...],
    student: tf.Tensor,
    q: tf.Tensor,
    temperature: float,
    divergence: str,
    beta: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    log_ps = [_log(x, p, temperature) for x, p in zip(teachers, softmaxes, strict=True)]
    p, log_p = _mean(softmaxes, log_ps, shares)
    terms, slopes = _terms(divergence, beta, p, log_p, q, _log(student, q, temperature))
    gradient = slopes - q * _row_sum(slopes)[:, None]
    return temperature**2 * _row_sum(terms), temperature * gradient


@xla
def _of_top_k(
    ids: tf.Tensor,
    log_p: tf.Tensor,
    student: tf.Tensor,
    q: tf.Tensor,
    temperature: float,
    divergence: str,
    beta: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    rows, k = tf.shape(ids)[0], ids.shape[1]
    where = tf.stack([tf.repeat(tf.range(rows)[:, None], k, axis=1), ids], -1)
    others = tf.tensor_scatter_nd_update(q, where, tf.zeros([rows, k]))
    rest = tf.maximum(_row_sum(others), _LEAST)[:, None]
    log_q = tf.gather(_log(student, q, temperature), ids, batch_dims=1)
    buckets = tf.concat([tf.exp(log_q), rest], -1)
    log_buckets = tf.concat([log_q, tf.math.log(rest)], -1)
    terms, slopes = _terms(divergence, beta, tf.exp(log_p), log_p, buckets, log_buckets)
    gradient = slopes - buckets * _row_sum(slopes)[:, None]
    # the rest's gradient falls on its tokens by their probability
    of_others = others * (gradient[:, -1:] / rest)
    gradient = tf.tensor_scatter_nd_update(of_others, where, gradient[:, :-1])
    return temperature**2 * _row_sum(terms), temperature * gradient


def _terms(
    divergence: str, beta: float, p: Any, log_p: Any, q: Any, log_q: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """What each event adds to the divergence, and q times the divergence's slope along q, up to a
    constant times q, which a softmax does not feel."""
    if divergence == "forward":
        return p * (log_p - log_q), -p
    if divergence == "reverse":
        terms = q * (log_q - log_p)
        return terms, terms
    # where both are too small for a float, what the logarithm is multiplied with is zero
    log_m = tf.math.log(tf.maximum(beta * p + (1.0 - beta) * q, _LEAST))
    of_q = (1.0 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + of_q, of_q


def _log(logits: tf.Tensor, softmax: tf.Tensor, temperature: float) -> tf.Tensor:
    """The logarithm of `softmax(logits / temperature)`, without a pass of exponentials: the largest
    probability is at least 1 / vocab_size, so its logarithm gives the normalizer."""
    largest = tf.math.log(tf.reduce_max(softmax, -1, keepdims=True))
    return (logits - tf.reduce_max(logits, -1, keepdims=True)) / temperature + largest


def _mean(ps: Any, log_ps: list[tf.Tensor], shares: tuple[float, ...]) -> tuple[Any, Any]:
    """The weighted mean of probabilities, and its logarithm."""
    if len(log_ps) == 1:
        return ps[0], log_ps[0]
    p = tf.add_n([share * p for share, p in zip(shares, ps, strict=True)])
    shifted = [math.log(share) + log_p for share, log_p in zip(shares, log_ps, strict=True)]
    largest = shifted[0]
    for other in shifted[1:]:
        largest = tf.maximum(largest, other)
    return p, largest + tf.math.log(tf.add_n([tf.exp(x - largest) for x in shifted]))


def _row_sum(rows: tf.Tensor) -> tf.Tensor:
    if tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"):
        return tf.reduce_sum(rows, -1)
    # XLA's row sum is a scalar loop on a CPU, its product is not (and a GPU's would be TF32)
    return tf.matmul(rows, np.ones([rows.shape[-1], 1], np.float32))[:, 0]
