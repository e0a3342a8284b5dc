"""k microbatches make the update of their whole batch: in the optimizer, and in `fit`."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.layers import Dropout
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.microbatches import microbatches
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.trainer import fit

CONFIG = TrainConfig(steps=12, batch_size=8, learning_rate=1e-2, log_every=3, clip_norm=0.5)


def gradients(count):
    rng = np.random.default_rng(0)
    return [tf.constant(rng.normal(size=(4, 3)), tf.float32) * 5 for _ in range(count)]


def test_an_update_takes_the_clipped_mean_and_projects_once():
    projections = tf.Variable(0)

    def project(weight):
        projections.assign_add(1)
        return weight

    weight = tf.Variable(np.ones((4, 3), "float32"), constraint=project)
    expected = tf.Variable(np.ones((4, 3), "float32"))
    parts, whole = adamw(steps=9, accumulate=3), adamw(steps=9)
    step = tf.function(lambda gradient: parts.apply_gradients([(gradient, weight)]))
    microbatch_gradients = gradients(3) + [0.01 * gradient for gradient in gradients(3)]
    for count, gradient in enumerate(microbatch_gradients, 1):
        before = weight.numpy()
        step(gradient)
        assert (weight.numpy() != before).any() == (count % 3 == 0)
        assert int(parts.iterations) == int(projections) == count // 3
    for i in (0, 3):
        whole.apply_gradients([(tf.add_n(microbatch_gradients[i : i + 3]) / 3, expected)])
    np.testing.assert_allclose(weight.numpy(), expected.numpy(), rtol=1e-6)
    for ours, theirs in (
        (parts._momentums, whole._momentums),
        (parts._velocities, whole._velocities),
    ):
        np.testing.assert_allclose(ours[0].numpy(), theirs[0].numpy(), rtol=1e-5)


def test_a_checkpoint_amid_an_update_holds_what_was_accumulated(tmp_path):
    def parts():
        weight = tf.Variable(np.ones((4, 3), "float32"))
        optimizer = adamw(steps=9, accumulate=3)
        optimizer.build([weight])
        return weight, optimizer, tf.train.Checkpoint(weight=weight, optimizer=optimizer)

    weight, optimizer, checkpoint = parts()
    todo = gradients(6)
    for gradient in todo[:4]:
        optimizer.apply_gradients([(gradient, weight)])
    path = checkpoint.write(str(tmp_path / "checkpoint"))
    again, other, checkpoint = parts()
    checkpoint.read(path).assert_consumed()
    for gradient in todo[4:]:
        optimizer.apply_gradients([(gradient, weight)])
        other.apply_gradients([(gradient, again)])
    assert int(other.iterations) == 2
    np.testing.assert_array_equal(weight.numpy(), again.numpy())


def test_a_compiled_model_is_saved_and_loaded_amid_an_update(tmp_path):
    model = build()
    model.compile(adamw(steps=9, accumulate=4, max_accumulate=8), loss=NextTokenLoss())
    data = Padded().batches("train", 4)
    for inputs, labels in data.take(6):
        model.train_on_batch(inputs, labels)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for each in (model, loaded):
        each.fit(data.skip(6), steps_per_epoch=2, verbose=0)
        assert int(each.optimizer.iterations) == 2
    assert same_weights(model, loaded)


class Padded:
    """Random sequences whose padding crowds in the first rows."""

    sequence_length = 8

    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            ids = tf.random.stateless_uniform([batch_size, 9], [seed, step], 0, 31, tf.int32)
            kept = tf.random.stateless_uniform([batch_size, 8], [seed + 1, step])
            kept *= tf.linspace(0.5, 3.0, batch_size)[:, None]
            return ids[:, :-1], tf.where(kept > 0.4, ids[:, 1:], -1)

        return tf.data.Dataset.range(start_step, 2**40).map(batch)


def build(dropout=0.0, seed=0):
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


def report_to(losses):
    return lambda report: losses.append(report.loss)


def same_weights(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


def test_microbatches_are_the_rows_of_the_batch():
    batch = next(iter(Padded().batches("train", 8)))
    parts = list(microbatches(Padded().batches("train", 8), 4).take(4))
    for i in range(2):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), batch[i])


def test_fit_makes_the_same_curve_however_the_padding_is_spread():
    """Rounding alone differs: see test_same_result."""
    curves = []
    for accumulate in (1, 4):
        losses, model = [], build()
        config = dataclasses.replace(CONFIG, accumulate=accumulate, log_every=1)
        metrics = fit(model, Padded(), config, None, [], report_to(losses))
        assert metrics["tokens"] == 12 * 8 * 8
        assert int(model.optimizer.iterations) == 12 == len(losses)
        curves.append(losses)
    np.testing.assert_allclose(*curves, rtol=1e-5)


class Crash(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 16:  # the first microbatch of the ninth update
            raise InterruptedError


def test_a_crash_amid_an_update_changes_nothing(tmp_path):
    config = dataclasses.replace(CONFIG, accumulate=2, checkpoint_every=1e-9)
    whole = build(dropout=0.1)
    expected = fit(whole, Padded(), config, None, [], lambda report: None)
    with pytest.raises(InterruptedError):
        fit(build(dropout=0.1), Padded(), config, tmp_path, [Crash()], lambda report: None)
    model, first = build(dropout=0.1, seed=1), []
    metrics = fit(model, Padded(), config, tmp_path, [], first.append)
    assert first[0].step == 9  # on from the sixth
    assert metrics["loss"] == expected["loss"]
    assert metrics["tokens"] == expected["tokens"]
    assert same_weights(model, whole)


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == 16


def test_a_stop_amid_an_update_begins_it_anew(tmp_path):
    config = dataclasses.replace(CONFIG, accumulate=2)
    whole, model = build(), build()
    fit(whole, Padded(), config, None, [], lambda report: None)
    assert fit(model, Padded(), config, tmp_path, [Stop()], lambda report: None)["steps"] == 8
    fit(model, Padded(), config, tmp_path, [], lambda report: None)
    assert same_weights(model, whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accumulate": 3}, r"3 microbatches on 1 replica\..*multiple of 3"),
        ({"max_batch_size": 16}, "accumulate=2"),
        ({"accumulate": 0}, "accumulate must be an integer, 1 or more"),
        ({"max_batch_size": 4}, "max_batch_size must be an integer, 8 or more"),
    ],
)
def test_what_cannot_be_divided_is_said_beforehand(changes, said):
    with pytest.raises(UserError, match=said):
        fit(build(), Padded(), dataclasses.replace(CONFIG, **changes))


def test_a_compiled_optimizer_has_to_accumulate_as_the_run_does():
    model = build()
    model.compile(adamw(steps=12), loss=NextTokenLoss())
    with pytest.raises(UserError, match=r"accumulate=1 and max_accumulate=1.*needs 4 and 4"):
        fit(model, Padded(), dataclasses.replace(CONFIG, accumulate=4))
