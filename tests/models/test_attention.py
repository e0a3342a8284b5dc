"""Attention in blocks of queries against the plain one: values, gradients, odd lengths, dtypes."""

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt.models import attention
from tf_gptopt.models.layers import CausalSelfAttention


def value_and_gradient(layer, qkv, training):
    with tf.GradientTape() as tape:
        tape.watch(qkv)
        y = layer(qkv, training=training)
    return y, tape.gradient(y, qkv, tf.cos(y))


@pytest.mark.parametrize("time", [1, 5, 7, 8, 9, 23])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_blocks_change_nothing(time, dtype, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 7)
    layer = CausalSelfAttention(num_heads=3, dtype=dtype)
    qkv = np.random.default_rng(time).normal(size=(2, time, 3 * 3 * 8)) * 2
    qkv = tf.cast(qkv, layer.compute_dtype)
    want, want_gradient = value_and_gradient(layer, qkv, training=False)
    got, got_gradient = value_and_gradient(layer, qkv, training=True)
    assert got.dtype == want.dtype
    tolerance = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(tf.cast(got, "float32"), tf.cast(want, "float32"), atol=tolerance)
    np.testing.assert_allclose(
        tf.cast(got_gradient, "float32"), tf.cast(want_gradient, "float32"), atol=tolerance
    )


def test_the_future_has_no_influence(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    layer = CausalSelfAttention(num_heads=2)
    qkv = np.random.default_rng(0).normal(size=(1, 11, 3 * 2 * 4)).astype("float32")
    before = layer(tf.constant(qkv), training=True).numpy()
    qkv[:, 6:] += 100.0
    after = layer(tf.constant(qkv), training=True).numpy()
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1


def test_an_unknown_length_trains_too():
    layer = CausalSelfAttention(num_heads=2)
    spec = tf.TensorSpec([None, None, 24])
    step = tf.function(lambda x: value_and_gradient(layer, x, True), input_signature=[spec])
    qkv = tf.constant(np.random.default_rng(0).normal(size=(2, 9, 24)), tf.float32)
    for got, want in zip(step(qkv), value_and_gradient(layer, qkv, True), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
