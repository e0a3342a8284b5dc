"""Learning rates as written down, decay on matrices alone, and updates equal to Keras's AdamW."""

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.training.optimizer import AdamW, adamw
from tf_gptopt.training.schedules import WarmupSchedule


def rates(**options):
    schedule = WarmupSchedule(0.1, **options)
    return [float(schedule(tf.constant(step, tf.int64))) for step in range(options["steps"] + 2)]


def test_warm_up_rises_to_the_peak_and_never_is_zero():
    got = rates(steps=10, warmup_steps=3, kind="constant")
    np.testing.assert_allclose(got[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    np.testing.assert_allclose(got[4:], 0.1, rtol=1e-6)


def test_linear_ends_at_its_fraction_and_stays():
    got = rates(steps=11, kind="linear", final=0.2)
    np.testing.assert_allclose(got[:11], np.linspace(0.1, 0.02, 11), rtol=1e-5)
    np.testing.assert_allclose(got[11:], 0.02, rtol=1e-5)


def test_cosine_is_half_way_in_the_middle():
    got = rates(steps=11, kind="cosine", final=0.1)
    np.testing.assert_allclose([got[0], got[5], got[10]], [0.1, 0.055, 0.01], rtol=1e-5)


def test_a_schedule_survives_serialization():
    optimizer = adamw(steps=100, learning_rate=0.3, warmup_steps=7, schedule="linear")
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    assert type(again) is AdamW
    assert again.get_config() == optimizer.get_config()
    for step in (0, 7, 50, 99):
        assert float(again._learning_rate(step)) == float(optimizer._learning_rate(step))
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        adamw(steps=100, schedule="liner")


def variables():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (5, 3), "bias": (3,), "gamma": (4,)}
    return [
        tf.Variable(rng.normal(size=s).astype("float32"), name=n, trainable=True)
        for n, s in shapes.items()
    ]


def test_only_matrices_decay():
    kernel, bias, gamma = weights = variables()
    before = [weight.numpy() for weight in weights]
    optimizer = adamw(steps=10, learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    optimizer.apply_gradients([(tf.zeros_like(weight), weight) for weight in weights])
    np.testing.assert_allclose(kernel.numpy(), before[0] * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(bias.numpy(), before[1])
    np.testing.assert_array_equal(gamma.numpy(), before[2])


def test_updates_equal_those_of_keras():
    ours, theirs = variables(), variables()
    optimizer = adamw(steps=20, learning_rate=0.05, warmup_steps=4)
    keras_adamw = keras.optimizers.AdamW(
        WarmupSchedule(0.05, 20, 4),
        weight_decay=0.1,
        beta_1=0.9,
        beta_2=0.95,
        epsilon=1e-8,
        global_clipnorm=1.0,
        jit_compile=False,
    )
    keras_adamw.exclude_from_weight_decay(var_names=["bias", "gamma"])
    rng = np.random.default_rng(1)
    for step in range(12):
        scale = 10.0 if step % 2 else 0.01  # clipped, and not
        gradients = [rng.normal(size=w.shape).astype("float32") * scale for w in ours]
        optimizer.apply_gradients(zip(map(tf.constant, gradients), ours, strict=True))
        keras_adamw.apply_gradients(zip(map(tf.constant, gradients), theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-5, atol=2e-6)


def test_sparse_gradients_count_as_dense_ones():
    dense, sparse = (tf.Variable(np.ones((6, 2), "float32")) for _ in range(2))
    rows, values = tf.constant([1, 4, 1]), tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    for weight, gradient in (
        (dense, tf.math.unsorted_segment_sum(values, rows, 6)),
        (sparse, tf.IndexedSlices(values, rows, dense_shape=(6, 2))),
    ):
        optimizer = adamw(steps=10, learning_rate=0.1, warmup_steps=0)
        optimizer.apply_gradients([(gradient, weight)])
    np.testing.assert_allclose(dense.numpy(), sparse.numpy(), rtol=1e-6)


def test_a_constraint_is_applied_after_the_update():
    weight = tf.Variable(np.ones((4, 4), "float32"), constraint=lambda w: w * 0.0)
    adamw(steps=10).apply_gradients([(tf.ones((4, 4)), weight)])
    assert not weight.numpy().any()
