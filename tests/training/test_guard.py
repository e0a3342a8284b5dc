"""What is not finite changes nothing, is counted and said, and ends a run after ten in a row."""

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.layers import Dropout
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.guard import NonFiniteGuard, Skips
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.trainer import fit

BAD = 29  # an id that the model cannot read
CONFIG = TrainConfig(steps=24, batch_size=4, learning_rate=1e-2, log_every=4, checkpoint_every=1e-9)


class Batches:
    """Counting sequences; of some steps the model makes NaN."""

    sequence_length = 8

    def __init__(self, bad=()):
        self.bad = tf.constant([-5, *bad], tf.int64)

    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            start = tf.random.stateless_uniform([batch_size, 1], [seed, step], 0, 29, tf.int32)
            ids = (start + tf.range(9)) % 29
            wrong = tf.reduce_any(step == self.bad)
            return tf.where(wrong, BAD, ids[:, :-1]), ids[:, 1:]

        return tf.data.Dataset.range(start_step, 2**40).map(batch)


def build(seed=0, dropout=0.1):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    ids = keras.Input((None,), dtype="int32")
    x = Dropout(dropout, name="dropout")(layers.Embedding(BAD + 1, 16)(ids))
    logits = layers.Dense(29, dtype="float32")(x)
    return keras.Model(ids, logits + tf.where(ids == BAD, math.nan, 0.0)[:, :, None])


def quiet(report):
    pass


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_update_changes_nothing_but_the_counters(accumulate, value):
    projected = tf.Variable(0)

    def constraint(weight):
        projected.assign_add(1)
        return weight

    weights = [tf.Variable(np.ones((3, 2), "float32"), constraint=constraint), tf.Variable([1.0])]
    optimizer = adamw(steps=20, accumulate=accumulate)
    apply = tf.function(lambda gradients: optimizer.apply_gradients(zip(gradients, weights)))  # noqa: B905
    fine = [tf.ones((3, 2)), tf.ones(1)]
    for _ in range(accumulate):
        apply(fine)
    state = [*weights, *optimizer._momentums, *optimizer._velocities, optimizer.iterations]
    before = [variable.numpy() for variable in state]
    apply([fine[0], tf.constant([value])])  # one element of one microbatch
    for _ in range(accumulate - 1):
        apply(fine)
    for variable, old in zip(state, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)
    assert int(projected) == 1
    assert Skips.of(optimizer) == Skips(total=1, in_a_row=1, last=2, loss_scale=None)
    for _ in range(accumulate):
        apply(fine)
    assert Skips.of(optimizer) == Skips(total=1, in_a_row=0, last=2, loss_scale=None)
    assert int(optimizer.iterations) == int(projected) == 2
    assert all(np.isfinite(variable.numpy()).all() for variable in state)


def test_a_loss_that_is_not_finite_skips_though_its_gradients_are():
    weight = tf.Variable([[2.0]])
    optimizer = adamw(steps=10)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(weight) + tf.stop_gradient(math.nan)
    optimizer.minimize(loss, [weight], tape=tape)
    assert weight.numpy().tolist() == [[2.0]]
    assert int(optimizer.skipped) == 1


def test_a_run_goes_on_after_skips_and_says_so(capsys, tmp_path):
    reports = []
    metrics = fit(build(), Batches(bad=[6, 7, 13]), CONFIG, tmp_path, [], reports.append)
    said = capsys.readouterr().err
    assert "2 updates were skipped, the last one number 8" in said
    assert "1 update was skipped, the last one number 14" in said
    assert metrics["skipped"] == 3 == reports[-1].skipped
    assert metrics["steps"] == 24
    assert math.isfinite(metrics["loss"])
    assert metrics["loss"] < reports[0].loss


def test_a_run_ends_after_ten_in_a_row_with_weights_as_they_were(tmp_path):
    model, expected = build(), build()
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0)
    fit(expected, Batches(), dataclasses.replace(config, steps=8), None, [], quiet)
    with pytest.raises(UserError, match=r"loss is nan at step 20.*12 updates in a row.*vocabulary"):
        fit(model, Batches(bad=range(8, 40)), config, tmp_path, [], quiet)
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_own_fit_has_a_callback_for_it():
    model, said = build(), []
    model.compile(adamw(steps=40), loss=NextTokenLoss())
    data = Batches(bad=range(3, 40)).batches("train", 4)
    with pytest.raises(UserError, match="17 updates in a row were skipped"):
        model.fit(data, steps_per_epoch=30, verbose=0, callbacks=[NonFiniteGuard(say=said.append)])
    assert said == [
        "7 updates were skipped, the last one number 10: its loss or gradient was not finite "
        "(7 so far, 7 in a row)",
        "10 updates were skipped, the last one number 20: its loss or gradient was not finite "
        "(17 so far, 17 in a row)",
    ]
    model.compile("adam", loss=NextTokenLoss())
    with pytest.raises(UserError, match=r"adamw\(steps\)"):
        model.fit(data, steps_per_epoch=1, verbose=0, callbacks=[NonFiniteGuard()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_scaling_halves_once_an_update_and_never_skips_silently(accumulate):
    keras.mixed_precision.set_global_policy("mixed_float16")
    model = build()
    inner = adamw(steps=40, accumulate=accumulate)
    model.compile(inner, loss=NextTokenLoss())
    data = Batches(bad=range(2 * accumulate, 90)).batches("train", 4)
    guard = NonFiniteGuard(say=lambda text: None)
    wrapper = model.optimizer
    assert wrapper.inner_optimizer is inner
    model.fit(data, steps_per_epoch=4 * accumulate, verbose=0, callbacks=[guard])
    assert int(inner.iterations) == 2
    assert Skips.of(wrapper) == Skips(total=2, in_a_row=2, last=4, loss_scale=2.0**13)
    wrapper._loss_scale.current_loss_scale.assign(1.0)
    with pytest.raises(UserError, match=r"loss scale is 1, its least.*mixed_bfloat16 or float32"):
        model.fit(data.skip(60), steps_per_epoch=10 * accumulate, verbose=0, callbacks=[guard])
    assert int(inner.iterations) == 2
