"""NextTokenLoss against Keras's own cross-entropy: values, gradients, padding, precision."""

import math

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.training.loss import NextTokenLoss

SHAPE = (3, 5, 37)


def batch(scale=3.0, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=shape) * scale).astype("float32")
    return tf.constant(rng.integers(0, shape[-1], shape[:2]), tf.int32), tf.constant(logits)


def loss_and_gradient(function, labels, logits, **options):
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = function(labels, logits, **options)
    return float(loss), tape.gradient(loss, logits).numpy()


@pytest.mark.parametrize("scale", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_value_and_gradient_are_those_of_keras(scale, compiled):
    labels, logits = batch(scale)
    theirs = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ours = tf.function(NextTokenLoss()) if compiled else NextTokenLoss()
    loss, gradient = loss_and_gradient(ours, labels, logits)
    want, want_gradient = loss_and_gradient(theirs, labels, logits)
    assert loss == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-8)


def test_ignored_labels_count_neither_above_nor_below():
    labels, logits = batch()
    keep = np.random.default_rng(1).random(SHAPE[:2]) < 0.6
    others = tf.constant(np.random.default_rng(2).choice([-1, -2, -100], SHAPE[:2]), tf.int32)
    loss, gradient = loss_and_gradient(NextTokenLoss(), tf.where(keep, labels, others), logits)
    theirs = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    want, want_gradient = loss_and_gradient(theirs, labels[keep], logits[keep])
    assert loss == pytest.approx(want, rel=1e-6)
    assert not gradient[~keep].any()
    np.testing.assert_allclose(gradient[keep], want_gradient, rtol=1e-5, atol=1e-8)


def test_a_batch_of_padding_alone_costs_nothing():
    _, logits = batch()
    loss, gradient = loss_and_gradient(NextTokenLoss(), tf.fill(SHAPE[:2], -1), logits)
    assert loss == 0
    assert not gradient.any()


def test_a_label_that_is_no_token_is_named():
    labels, logits = batch()
    labels = tf.tensor_scatter_nd_update(labels, [[1, 1]], [SHAPE[-1]])
    for loss in (NextTokenLoss(), tf.function(NextTokenLoss())):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)label is no token.*37.*37"):
            loss(labels, logits)
    in_xla = tf.function(NextTokenLoss(), jit_compile=True)  # which knows no errors
    assert math.isnan(float(in_xla(labels, logits)))


def test_a_hopeless_or_certain_prediction_is_finite():
    logits = tf.constant([[[0.0, 1e4, -1e4]]])
    assert float(NextTokenLoss()(tf.constant([[1]]), logits)) == 0
    loss, gradient = loss_and_gradient(NextTokenLoss(), tf.constant([[2]]), logits)
    assert loss == pytest.approx(2e4)
    np.testing.assert_allclose(gradient[0, 0], [0, 1, -1], atol=1e-6)


def test_weights_of_sequences_and_of_tokens():
    labels, logits = batch()
    each = NextTokenLoss(reduction="none")(labels, logits).numpy()
    assert each.shape == SHAPE[:2]
    of_tokens = np.random.default_rng(2).random(SHAPE[:2]).astype("float32")
    loss = NextTokenLoss()(labels, logits, sample_weight=of_tokens)
    assert float(loss) == pytest.approx((each * of_tokens).sum() / each.size, rel=1e-5)
    of_sequences = of_tokens[:, 0]
    loss = NextTokenLoss()(labels, logits, sample_weight=of_sequences)
    assert float(loss) == pytest.approx((each.T * of_sequences).sum() / each.size, rel=1e-5)
    total = NextTokenLoss(reduction="sum")(labels, logits)
    assert float(total) == pytest.approx(each.sum(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_are_summed_in_float32(dtype):
    labels, logits = batch()
    loss, gradient = loss_and_gradient(NextTokenLoss(), labels, tf.cast(logits, dtype))
    want, want_gradient = loss_and_gradient(NextTokenLoss(), labels, logits)
    assert loss == pytest.approx(want, rel=1e-2)
    np.testing.assert_allclose(gradient.astype("float32"), want_gradient, atol=2e-3)


def test_it_survives_serialization():
    loss = NextTokenLoss(ignore_label=0)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is NextTokenLoss
    assert again.get_config() == loss.get_config()


def test_it_is_compiled_fitted_saved_and_evaluated(tiny_model, tmp_path):
    model = tiny_model()
    model.compile("adam", loss=NextTokenLoss())
    ids = np.random.default_rng(0).integers(0, 61, (6, 9))
    model.fit(ids[:, :-1], ids[:, 1:], batch_size=4, verbose=0)  # a batch of 4 and one of 2
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again.loss, NextTokenLoss)
    want = model.evaluate(ids[:, :-1], ids[:, 1:], verbose=0)
    assert again.evaluate(ids[:, :-1], ids[:, 1:], verbose=0) == pytest.approx(want, rel=1e-6)


def smoothed_loss(logits, labels, smoothing, z_loss):
    """By Keras's own categorical cross-entropy, and log Z as TensorFlow has it."""
    one_hot = tf.one_hot(labels, SHAPE[-1])
    theirs = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    return theirs(one_hot, logits) + z_loss * tf.reduce_mean(
        tf.square(tf.reduce_logsumexp(logits, -1))
    )


@pytest.mark.parametrize("form", [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_label_smoothing_and_z_loss(form):
    labels, logits = batch()
    ours = NextTokenLoss(label_smoothing=form[0], z_loss=form[1])
    loss, gradient = loss_and_gradient(ours, labels, logits)
    theirs = lambda labels, logits: smoothed_loss(logits, labels, *form)  # noqa: E731
    want, want_gradient = loss_and_gradient(theirs, labels, logits)
    assert loss == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-7)
    again = keras.losses.deserialize(keras.losses.serialize(ours))
    assert float(again(labels, logits)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"z_loss": -1e-4}])
def test_shares_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="label_smoothing is a share"):
        NextTokenLoss(**wrong)
