"""The fused formulas of training against the plain ones of inference."""

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt.models import fused
from tf_gptopt.models.layers import Gelu, LayerNorm


def values_and_gradients(function, *tensors):
    upstream = tf.random.stateless_normal(tensors[0].shape, [1, 2])
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
        total = tf.reduce_sum(tf.cast(y, tf.float32) * upstream)
    return [y, *tape.gradient(total, tensors)]


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        a, b = (tf.cast(t, tf.float32).numpy() for t in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_gelu(dtype, tolerance):
    x = tf.cast(tf.random.stateless_normal((3, 4, 50), [0, 0]) * 3.0, dtype)
    want = values_and_gradients(lambda x: tf.nn.gelu(x, approximate=True), x)
    assert_close(values_and_gradients(fused.gelu, x), want, tolerance)
    want = values_and_gradients(lambda x: tf.nn.gelu(x, approximate=False), x)
    assert_close(values_and_gradients(fused.exact_gelu, x), want, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_layer_norm(dtype, tolerance, width):
    x = tf.random.stateless_normal((3, 4, width), [0, 0]) * 5.0 + 2.0
    gamma, beta = 1.0 + tf.random.stateless_normal((2, width), [0, 1])
    tensors = [tf.cast(t, dtype) for t in (x, gamma, beta)]

    def plain(x, gamma, beta):
        x32 = tf.cast(x, tf.float32)
        mean, variance = tf.nn.moments(x32, -1, keepdims=True)
        gamma, beta = tf.cast(gamma, tf.float32), tf.cast(beta, tf.float32)
        return tf.cast((x32 - mean) / tf.sqrt(variance + 1e-5) * gamma + beta, x.dtype)

    got = values_and_gradients(lambda *t: fused.layer_norm(*t, 1e-5), *tensors)
    assert_close(got, values_and_gradients(plain, *tensors), tolerance)


def test_cross_entropy_is_one_pass_for_value_and_gradient():
    logits = tf.random.stateless_normal((6, 11), [3, 3]) * 4.0
    labels = tf.constant([0, 10, 3, 3, 7, 1])
    plain = lambda x: tf.nn.sparse_softmax_cross_entropy_with_logits(labels, x)  # noqa: E731
    for function, name in ((plain, "want"), (lambda x: fused.cross_entropy(x, labels), "got")):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = function(logits)
        if name == "want":
            want = loss, tape.gradient(loss, logits)
    np.testing.assert_allclose(loss, want[0], rtol=1e-5)
    np.testing.assert_allclose(tape.gradient(loss, logits), want[1], rtol=1e-5, atol=1e-6)


def test_layers_compute_the_same_in_training_and_inference():
    x = tf.random.stateless_normal((2, 5, 24), [5, 5])
    for layer in (Gelu(), LayerNorm(epsilon=1e-5)):
        np.testing.assert_allclose(layer(x, training=True), layer(x), rtol=1e-5, atol=2e-6)


def test_a_second_derivative_exists():
    x = tf.constant([[0.3, -1.2]])
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = fused.gelu(x)
        slope = inner.gradient(y, x)
    h = 0.05
    y0, y1, y2 = (tf.nn.gelu(x + d, True) for d in (-h, 0.0, h))
    np.testing.assert_allclose(outer.gradient(slope, x), (y0 - 2 * y1 + y2) / h**2, atol=0.02)
