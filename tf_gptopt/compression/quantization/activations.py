"""Activations as int8 integers of a fixed range, and a KV cache as integers, in TensorFlow.

The arithmetic is the file's: a number becomes `clip(round(x / scale) + zero_point)`, with the scale
and zero point that `grids.activation_scale` gives. The gradient passes straight through, and is
zero for what was clipped.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt.compression.quantization.fake_quantize import run_compiled
from tf_gptopt.compression.quantization.grids import SMALLEST
from tf_gptopt.models.custom_gradients import custom_gradient
from tf_gptopt.models.fused import xla

MOMENTUM = 0.99  # of ranges that follow training


def fake_quantize_static(x: tf.Tensor, known: tf.Tensor, symmetric: bool) -> tf.Tensor:
    """`x` as int8 activations between `known[0]` and `known[1]`, in its own dtype.

    Args:
        x: of any shape.
        known: `(low, high)` float32; it gets no gradient.
        symmetric: as in `grids.activation_scale`.
    """
    scale, zero_point = activation_scale(known, symmetric)

    @custom_gradient
    def on_grid(x: tf.Tensor) -> Any:
        y = run_compiled(_static, x, scale, zero_point, symmetric)
        return y, lambda upstream: run_compiled(
            _static_gradient, x, scale, zero_point, symmetric, upstream
        )

    return on_grid(x)


def activation_scale(known: tf.Tensor, symmetric: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """`grids.activation_scale` of `(low, high)`: scale and zero point, both float32 scalars."""
    low, high = tf.unstack(tf.cast(known, tf.float64))
    low, high = tf.minimum(low, 0.0), tf.maximum(high, 0.0)
    reach = tf.maximum(-low, high) / 127 if symmetric else (high - low) / 255
    scale = tf.cast(reach, tf.float32)
    zero_point = tf.round(-128 - low / tf.cast(scale, tf.float64))
    zero_point = tf.cast(tf.clip_by_value(zero_point, -128, 127), tf.float32)
    none = scale < SMALLEST
    middle = tf.logical_or(none, symmetric)
    return tf.where(none, 1.0, scale), tf.where(middle, 0.0, zero_point)


def batch_range(x: tf.Tensor) -> tf.Tensor:
    """The smallest and the largest of `x`, `(2,)` float32."""
    x = tf.stop_gradient(x)
    return tf.cast(tf.stack([tf.reduce_min(x), tf.reduce_max(x)]), tf.float32)


def follow(known: tf.Tensor, seen: tf.Tensor) -> tf.Tensor:
    """The moving average of ranges, `(2,)` each; `seen` itself where nothing is known yet, and
    `known` where it is not finite, as in a step that overflowed."""
    moved = tf.where(known[1] > known[0], known + (1 - MOMENTUM) * (seen - known), seen)
    return tf.where(tf.reduce_all(tf.math.is_finite(seen)), moved, known)


def fake_quantize_rows(x: tf.Tensor) -> tf.Tensor:
    """`x` as a cache of int8 gives it back: each vector of the last axis has a scale of its own.

    A vector's scale is `max|x| / 127`, or 1 for zeros. The gradient passes straight through.

    Args:
        x: `(..., head_dim)`, keys or values; computed in float32, returned in its own dtype.
    """

    @custom_gradient
    def on_grid(x: tf.Tensor) -> Any:
        return run_compiled(_rows, x), lambda upstream: upstream

    return on_grid(x)


@xla
def _static(x: tf.Tensor, scale: tf.Tensor, zero_point: tf.Tensor, symmetric: bool) -> tf.Tensor:
    integers = tf.round(tf.cast(x, tf.float32) / scale) + zero_point
    integers = tf.clip_by_value(integers, -127.0 if symmetric else -128.0, 127.0)
    return tf.cast((integers - zero_point) * scale, x.dtype)


@xla
def _static_gradient(
    x: tf.Tensor, scale: tf.Tensor, zero_point: tf.Tensor, symmetric: bool, upstream: tf.Tensor
) -> tf.Tensor:
    integers = tf.round(tf.cast(x, tf.float32) / scale) + zero_point
    inside = (integers >= (-127.0 if symmetric else -128.0)) & (integers <= 127.0)
    return tf.where(inside, upstream, tf.zeros_like(upstream))


@xla
def _rows(x: tf.Tensor) -> tf.Tensor:
    wide = tf.cast(x, tf.float32)
    scale = tf.reduce_max(tf.abs(wide), -1, keepdims=True) / 127.0
    scale = tf.where(scale < SMALLEST, 1.0, scale)
    return tf.cast(tf.round(wide / scale) * scale, x.dtype)
