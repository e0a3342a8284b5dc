"""GELU, LayerNorm and cross-entropy as single compiled loops, for training.

TensorFlow runs a formula operation by operation, each a pass over memory. Here a formula and its
gradient, written by hand, are each one XLA island: on a CPU that makes GELU and cross-entropy four
times faster and LayerNorm twice. XLA compiles an island anew for every shape, so layers use them in
training, where the shape stays the same, and the plain TensorFlow operation elsewhere.

All of them compute in float32 and return the dtype that they were given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.models.custom_gradients import custom_gradient

_GELU = float(np.sqrt(2 / np.pi))
_CUBIC = 0.044715


def xla(function: Callable) -> Callable:
    """`function` compiled by XLA where XLA exists, else as an ordinary `tf.function`."""
    jit = keras.src.utils.tf_utils.can_jit_compile()
    return tf.function(function, jit_compile=jit or None, autograph=False)


@custom_gradient
def gelu(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """GPT-2's `gelu_new`: x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2."""
    return _gelu(x), lambda upstream: _gelu_gradient(x, upstream)


@xla
def _gelu(x: tf.Tensor) -> tf.Tensor:
    x32 = tf.cast(x, tf.float32)
    return tf.cast(0.5 * x32 * (1.0 + _gelu_tanh(x32)), x.dtype)


@xla
def _gelu_gradient(x: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    x32 = tf.cast(x, tf.float32)
    tanh = _gelu_tanh(x32)
    inner = _GELU * (1.0 + 3.0 * _CUBIC * x32 * x32)
    slope = 0.5 * (1.0 + tanh) + 0.5 * x32 * (1.0 - tanh * tanh) * inner
    return tf.cast(tf.cast(upstream, tf.float32) * slope, x.dtype)


@custom_gradient
def exact_gelu(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """x * (1 + erf(x / sqrt(2))) / 2."""
    return _exact_gelu(x), lambda upstream: _exact_gelu_gradient(x, upstream)


@xla
def _exact_gelu(x: tf.Tensor) -> tf.Tensor:
    x32 = tf.cast(x, tf.float32)
    return tf.cast(x32 * _normal_cdf(x32), x.dtype)


@xla
def _exact_gelu_gradient(x: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    x32 = tf.cast(x, tf.float32)
    density = tf.exp(-0.5 * x32 * x32) * float(1 / np.sqrt(2 * np.pi))
    slope = _normal_cdf(x32) + x32 * density
    return tf.cast(tf.cast(upstream, tf.float32) * slope, x.dtype)


def _normal_cdf(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * (1.0 + tf.math.erf(x * float(np.sqrt(0.5))))


def _gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    return tf.tanh(_GELU * (x + _CUBIC * x * x * x))


def layer_norm(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tf.Tensor:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over the last axis (Ba et al. 2016)."""

    @custom_gradient
    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y, mean, scale = _layer_norm(x, gamma, beta, epsilon)
        return y, lambda upstream: _layer_norm_gradient(x, gamma, mean, scale, upstream)

    return normalize(x, gamma, beta)


@xla
def _layer_norm(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    rows = _rows(x)
    mean = _row_mean(rows)
    centered = rows - mean
    scale = tf.math.rsqrt(_row_mean(centered * centered) + epsilon)
    y = centered * scale * tf.cast(gamma, tf.float32) + tf.cast(beta, tf.float32)
    return tf.cast(tf.reshape(y, tf.shape(x)), x.dtype), mean, scale


@xla
def _layer_norm_gradient(
    x: tf.Tensor, gamma: tf.Tensor, mean: tf.Tensor, scale: tf.Tensor, upstream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    dy = _rows(upstream)
    normal = (_rows(x) - mean) * scale
    scaled = dy * tf.cast(gamma, tf.float32)
    dx = scale * (scaled - _row_mean(scaled) - normal * _row_mean(scaled * normal))
    d_gamma, d_beta = tf.reduce_sum(dy * normal, 0), tf.reduce_sum(dy, 0)
    return (
        tf.cast(tf.reshape(dx, tf.shape(x)), x.dtype),
        tf.cast(d_gamma, gamma.dtype),
        tf.cast(d_beta, gamma.dtype),
    )


class CrossEntropy(NamedTuple):
    """What a token costs: log Z - sum(target * logits) + z_loss * (log Z)^2, Z = sum(exp(logits)).

    Attributes:
        label_smoothing: share of the target that is spread evenly over the vocabulary; the label
            has the rest.
        z_loss: weight of (log Z)^2.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = CrossEntropy()


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, form: CrossEntropy = PLAIN) -> tf.Tensor:
    """Loss of every row: `(rows, vocab)`, `(rows,)` int32 -> `(rows,)` float32.

    The softmax is computed once and serves the gradient too. A label outside `[0, vocab)` gives
    NaN.
    """

    @custom_gradient
    def of(logits: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        probabilities = tf.nn.softmax(tf.cast(logits, tf.float32))
        losses, log_z = cross_entropy_of(logits, probabilities, labels, form)

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            slope = cross_entropy_gradient(probabilities, log_z, labels, upstream, form)
            return tf.cast(slope, logits.dtype)

        return losses, gradient

    return of(logits)


@xla
def cross_entropy_of(
    logits: tf.Tensor,
    probabilities: tf.Tensor,
    labels: tf.Tensor,
    form: CrossEntropy = PLAIN,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Each row's loss and log Z, `(rows,)`, given the softmax of its logits."""
    # log sum exp from the largest class alone: its probability is at least 1/vocab, never 0
    logits = tf.cast(logits, tf.float32)
    log_z = tf.reduce_max(logits, -1) - tf.math.log(tf.reduce_max(probabilities, -1))
    vocab = tf.shape(logits)[-1]
    target = tf.gather(logits, tf.clip_by_value(labels, 0, vocab - 1), batch_dims=1)
    if form.label_smoothing:
        even = tf.reduce_mean(logits, -1)
        target = (1.0 - form.label_smoothing) * target + form.label_smoothing * even
    losses = log_z - target
    if form.z_loss:
        losses += form.z_loss * tf.square(log_z)
    is_class = (labels >= 0) & (labels < vocab)
    return tf.where(is_class, losses, np.nan), log_z


@xla
def cross_entropy_gradient(
    probabilities: tf.Tensor,
    log_z: tf.Tensor,
    labels: tf.Tensor,
    upstream: tf.Tensor,
    form: CrossEntropy = PLAIN,
) -> tf.Tensor:
    """`(rows, vocab)`: the loss's gradient to the logits."""
    vocab = probabilities.shape[-1]
    target = tf.one_hot(labels, vocab)
    if form.label_smoothing:
        target = (1.0 - form.label_smoothing) * target + form.label_smoothing / vocab
    if form.z_loss:
        probabilities *= 1.0 + 2.0 * form.z_loss * log_z[:, None]
    return (probabilities - target) * upstream[:, None]


def _rows(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.reshape(x, [-1, x.shape[-1]]), tf.float32)


def _row_mean(rows: tf.Tensor) -> tf.Tensor:
    """`(rows, width)` -> `(rows, 1)`."""
    if tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"):
        return tf.reduce_mean(rows, -1, keepdims=True)
    # XLA's row sum is a scalar loop on a CPU, its product is not (and a GPU's would be TF32)
    width = rows.shape[-1]
    return tf.matmul(rows, tf.fill([width, 1], 1.0 / width))
