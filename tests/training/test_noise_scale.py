"""The estimate against a problem whose noise is known, and batches that grow by it."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.layers import Dropout
from tf_gptopt.training import noise_scale
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.noise_scale import GradientNoiseScale, estimate, grown, ratio
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.trainer import fit

SIZE = 4000  # weights
RNG = np.random.default_rng(0)
GRADIENT = RNG.normal(size=SIZE).astype("float32") * 0.1
SPREAD = RNG.uniform(0.2, 1.0, SIZE).astype("float32")  # standard deviation of an example's
TRUE = float((SPREAD**2).sum() / (GRADIENT**2).sum())  # tr(Sigma) / |G|^2, in examples


def example_gradients(rows):
    """The gradients of `rows` examples, averaged."""
    return GRADIENT + (RNG.normal(size=(rows, SIZE)) * SPREAD).mean(0).astype("float32")


def test_both_estimates_are_unbiased():
    parts, rows = 4, 6
    signals, noises = [], []
    for _ in range(300):
        small = [example_gradients(rows) for _ in range(parts)]
        big = np.mean(small, 0)
        signal, noise = estimate(
            np.mean([(g**2).sum() for g in small]), (big**2).sum(), rows, parts * rows
        )
        signals.append(signal)
        noises.append(noise)
    for got, want in ((signals, (GRADIENT**2).sum()), (noises, (SPREAD**2).sum())):
        error = np.std(got) / np.sqrt(len(got))
        assert abs(np.mean(got) - want) < 4 * error
        assert error < 0.05 * want


def test_the_optimizer_measures_what_is_true():
    weight, rows = tf.Variable(np.zeros(SIZE, "float32")), 8
    optimizer = adamw(steps=200, accumulate=4, measure_noise=True, learning_rate=1e-9)
    step = tf.function(lambda gradient: optimizer.apply_gradients([(gradient, weight)]))
    assert np.isnan(optimizer.noise_scale)
    seen = []
    for microbatch in range(4 * 120):
        step(tf.constant(example_gradients(rows)))
        if microbatch > 200 and microbatch % 4 == 3:
            seen.append(float(optimizer.noise_scale) * rows)
    assert np.mean(seen) == pytest.approx(TRUE, rel=0.1)
    assert np.std(seen) < 0.4 * TRUE


def test_ratio_where_there_is_none():
    values = [(2.0, 6.0), (-1.0, 6.0), (0.0, 0.0), (2.0, -1.0)]
    got = [float(ratio(tf.constant(a), tf.constant(b))) for a, b in values]
    np.testing.assert_array_equal(got, [3.0, np.inf, np.nan, 0.0])


def test_it_doubles_up_to_the_scale_and_the_limit():
    def after(size, most, scale):
        return int(grown(tf.constant(size, tf.int64), most, tf.constant(scale)))

    assert after(2, 16, 4.0) == 4
    assert after(2, 16, 3.9) == 2
    assert after(8, 15, 100.0) == 8
    assert after(8, 16, float("inf")) == 16
    assert after(8, 16, float("nan")) == 8


def test_one_part_cannot_be_compared():
    with pytest.raises(UserError, match="there is one part"):
        adamw(steps=9, measure_noise=True).apply_gradients([(tf.ones(2), tf.Variable([1.0, 2.0]))])
    with pytest.raises(UserError, match="max_accumulate is not below"):
        adamw(steps=9, accumulate=4, max_accumulate=2)


class Noise:
    """Labels that cannot be learnt: all of the gradient is noise, and batches have to grow."""

    sequence_length = 8

    def __init__(self):
        self.starts = []

    def batches(self, split, batch_size, seed=0, start_step=0):
        self.starts.append(start_step)

        def batch(step):
            ids = tf.random.stateless_uniform([batch_size, 9], [seed, step], 0, 31, tf.int32)
            return ids[:, :-1], ids[:, 1:]

        return tf.data.Dataset.range(start_step, 2**40).map(batch)


def model_of(seed=1, dropout=0.1):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(31, 16),
            Dropout(dropout, name="dropout"),
            layers.Dense(31),
        ]
    )


class Crash(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 4 * noise_scale.GROW_EVERY + 9:  # amid an update
            raise InterruptedError


def test_a_run_grows_its_batches_and_resumes_exactly(tmp_path):
    every = noise_scale.GROW_EVERY
    steps = 2 * every + 6
    config = TrainConfig(steps, 4, accumulate=2, max_batch_size=16, log_every=4, warmup_steps=0)
    often = dataclasses.replace(config, checkpoint_every=1e-9)
    reports, whole = [], model_of()
    metrics = fit(whole, Noise(), config, None, [], reports.append)
    sizes = [report.batch_size for report in reports]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (4, 16)
    assert metrics["steps"] == steps == int(whole.optimizer.iterations)
    by_size = {4: every, 8: every, 16: 6}  # updates
    assert metrics["tokens"] == sum(size * updates * 8 for size, updates in by_size.items())
    assert metrics["update_size"] == 16
    assert metrics["gradient_noise_scale"] > 16
    with pytest.raises(InterruptedError):
        fit(model_of(), Noise(), often, tmp_path, [Crash()], lambda report: None)
    data, resumed = Noise(), model_of(seed=2)
    again = fit(resumed, data, often, tmp_path, [], lambda report: None)
    assert data.starts == [every + 2 * 12]  # after 32 updates, 12 of them of two batches
    assert {**again, "seconds": 0, "tokens_per_second": 0} == {
        **metrics,
        "seconds": 0,
        "tokens_per_second": 0,
    }
    for a, b in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_own_fit_sees_it_in_the_logs():
    model = model_of()
    model.compile(adamw(60, accumulate=2, max_accumulate=4), "sparse_categorical_crossentropy")
    callback = GradientNoiseScale(batch_size=2)
    history = model.fit(
        Noise().batches("train", 2), steps_per_epoch=50, verbose=0, callbacks=[callback]
    ).history
    assert history["update_size"] == [8]
    assert [(update, size) for update, _, size in callback.history] == [(20, 8), (22, 8)]
    assert history["gradient_noise_scale"][0] == callback.history[-1][1] > 0
    model.compile(adamw(steps=60), "sparse_categorical_crossentropy")
    with pytest.raises(UserError, match="measure_noise=True"):
        model.fit(Noise().batches("train", 2), steps_per_epoch=1, verbose=0, callbacks=[callback])
