"""Warm-up, stable, decay, and plateau: the rates, longer runs, the state in checkpoints and fit."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.schedules import Plateau, PlateauSchedule, WarmupSchedule, schedule_of
from tf_gptopt.training.trainer import fit


class Noise:
    """Tokens without a pattern: the loss stops improving at once."""

    sequence_length = 8

    def batches(self, split, batch_size, seed=0, start_step=0):
        def batch(step):
            ids = tf.random.stateless_uniform(
                [batch_size, 9], [seed, step], maxval=31, dtype="int32"
            )
            return ids[:, :-1], ids[:, 1:]

        return tf.data.Dataset.range(start_step, 2**40).map(batch)


def build(seed=0):
    keras.utils.set_random_seed(seed)
    return GPTModel(31, 16, 1, 2, max_sequence_length=8)


class Interrupt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def quiet(report):
    pass


def assert_same_weights(a, b):
    for x, y in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)


# Warm-up, stable, decay


def rates(steps, **options):
    schedule = WarmupSchedule(0.1, steps, kind="wsd", **options)
    return np.array([float(schedule(tf.constant(step, tf.int64))) for step in range(steps + 2)])


def test_wsd_is_stable_and_then_falls_as_one_minus_a_root():
    got = rates(20, warmup_steps=4, decay_fraction=0.25, final=0.2)
    np.testing.assert_allclose(got[:4], [0.02, 0.04, 0.06, 0.08], rtol=1e-6)
    np.testing.assert_allclose(got[4:16], 0.1, rtol=1e-6)
    way = np.arange(5) / 4  # updates 15 to 19
    np.testing.assert_allclose(got[15:20], 0.02 + 0.08 * (1 - np.sqrt(way)), rtol=1e-5)
    np.testing.assert_allclose(got[20:], 0.02, rtol=1e-5)


def test_a_longer_wsd_run_begins_in_the_same_way():
    short, long = rates(20, warmup_steps=3), rates(60, warmup_steps=3)
    np.testing.assert_array_equal(short[:17], long[:17])
    assert short[17] < long[17]


def test_a_decay_never_reaches_into_the_warm_up():
    got = rates(10, warmup_steps=6, decay_fraction=1.0)
    assert (np.diff(got[:7]) > 0).all()
    assert got[6] == pytest.approx(0.1)
    assert got[9] == pytest.approx(0.01)


WSD = TrainConfig(
    steps=20, batch_size=2, learning_rate=1e-2, warmup_steps=2, schedule="wsd", log_every=5
)


def test_a_wsd_run_becomes_longer_before_its_decay_and_not_after(tmp_path):
    longer = dataclasses.replace(WSD, steps=30)
    whole, model = build(), build()
    fit(whole, Noise(), longer, None, [], quiet)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Noise(), WSD, tmp_path / "a", [Interrupt(15)], quiet)
    model = build(seed=1)
    fit(model, Noise(), longer, tmp_path / "a", [], quiet)
    assert_same_weights(model, whole)
    with pytest.raises(UserError, match="falls from step 24 on, so it cannot become one of 40"):
        fit(build(), Noise(), dataclasses.replace(WSD, steps=40), tmp_path / "a", [], quiet)
    with pytest.raises(UserError, match="is of step 30, and the run is to end at 20"):
        fit(build(), Noise(), WSD, tmp_path / "a", [], quiet)


# Plateau


def scale_after(losses, **options):
    schedule = PlateauSchedule(0.1, **{"patience": 3, "memory": 0.0, **options})
    for loss in losses:
        schedule.observe(tf.constant(loss))
    return float(schedule.scale)


def test_plateau_cuts_when_nothing_is_better_for_its_patience():
    assert scale_after([5.0, 4.0, 4.1, 4.2]) == 1.0
    assert scale_after([5.0, 4.0, 4.1, 4.2, 4.3]) == 0.5
    assert scale_after([5.0, 4.0, 4.1, 4.2, 3.9, 4.3]) == 1.0  # a new best in time
    assert scale_after([4.0, 3.999, 3.998, 3.997]) == 0.5  # less than 0.1% is no new best
    assert scale_after([4.0] * 30, final=0.2) == pytest.approx(0.2)
    assert scale_after([4.0, 4.0, np.nan, np.inf, 4.0]) == 1.0  # these do not count
    assert scale_after([4.0, 4.0, np.nan, np.inf, 4.0, 4.0]) == 0.5


def test_smoothing_sees_through_noise():
    noise = np.random.default_rng(0).normal(0.0, 0.3, 400)
    falling = np.linspace(6.0, 4.0, 400) + noise
    assert scale_after(falling, patience=60, memory=0.98) == 1.0
    assert scale_after(falling, patience=60, memory=0.0) < 1.0
    assert scale_after(4.0 + noise, patience=60, memory=0.98) < 1.0


def test_the_rate_is_warm_up_times_scale():
    schedule = PlateauSchedule(0.1, warmup_steps=3, patience=1, memory=0.0)
    got = [float(schedule(tf.constant(step))) for step in range(5)]
    np.testing.assert_allclose(got, [0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-6)
    schedule.observe(tf.constant(1.0))
    schedule.observe(tf.constant(1.0))
    assert float(schedule(tf.constant(9))) == pytest.approx(0.05)


def test_a_plateau_survives_serialization_and_impossible_ones_do_not():
    optimizer = adamw(steps=100, learning_rate=0.3, schedule="plateau", plateau_patience=7)
    optimizer._learning_rate.scale.assign(0.25)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    schedule = schedule_of(again)
    assert isinstance(schedule, PlateauSchedule)
    assert schedule.patience == 7
    assert float(schedule(tf.constant(50))) == pytest.approx(0.3 * 0.25)
    with pytest.raises(UserError, match="factor=1"):
        PlateauSchedule(0.1, factor=1)
    with pytest.raises(UserError, match="make a PlateauSchedule"):
        WarmupSchedule(0.1, 10, kind="plateau")


PLATEAU = TrainConfig(
    steps=60,
    batch_size=2,
    learning_rate=1e-2,
    schedule="plateau",
    plateau_patience=4,
    log_every=7,
    checkpoint_every=1e-9,
)


def test_plateau_resumes_exactly(tmp_path):
    whole, reports = build(), []
    expected = fit(whole, Noise(), PLATEAU, None, [], reports.append)
    state = [
        float(v) for v in (schedule_of(whole.optimizer).scale, schedule_of(whole.optimizer).smooth)
    ]
    assert state[0] < 1.0
    assert reports[-1].learning_rate == pytest.approx(1e-2 * state[0], rel=0.6)  # one cut at most
    assert expected["loss"] == pytest.approx(np.log(31), rel=0.1)
    for step in (11, 31):  # between two reports, before and after the first cut
        with pytest.raises(KeyboardInterrupt):
            fit(build(), Noise(), PLATEAU, tmp_path, [Interrupt(step)], quiet)
    model = build(seed=1)
    fit(model, Noise(), dataclasses.replace(PLATEAU, log_every=13), tmp_path, [], quiet)
    schedule = schedule_of(model.optimizer)
    assert [float(schedule.scale), float(schedule.smooth)] == state
    assert_same_weights(model, whole)


def test_in_a_fit_of_your_own(tiny_model):
    ids = np.random.default_rng(0).integers(0, 61, (24, 9)).astype("int32")
    data = (ids[:, :-1], ids[:, 1:])
    model = tiny_model(num_layers=1)
    schedule = PlateauSchedule(0.0, patience=3, memory=0.5)  # with no learning, no improvement
    model.compile(adamw(steps=10), loss=NextTokenLoss())
    model.optimizer._learning_rate = schedule
    batches = [[part[i : i + 4] for part in data] for i in range(0, 24, 4)]
    losses = [float(NextTokenLoss()(labels, model(inputs))) for inputs, labels in batches]
    model.fit(*data, batch_size=4, shuffle=False, verbose=0, epochs=2, callbacks=[Plateau()])
    smooth = 0.0
    for loss in losses * 2:
        smooth = 0.5 * smooth + 0.5 * loss
    assert float(schedule.smooth) == pytest.approx(smooth, rel=1e-5)
    assert float(schedule.scale) < 1.0
    with pytest.raises(UserError, match="validation_data"):
        model.fit(*data, verbose=0, callbacks=[Plateau("val_loss")])
    schedule = PlateauSchedule(0.0, patience=2, memory=0.0)
    model.compile(adamw(steps=10), loss=NextTokenLoss())
    model.optimizer._learning_rate = schedule
    model.fit(*data, validation_data=data, verbose=0, epochs=3, callbacks=[Plateau("val_loss")])
    assert float(schedule.scale) == 0.5
    model.compile(adamw(steps=10), loss=NextTokenLoss())
    with pytest.raises(UserError, match="schedule='plateau'"):
        model.fit(*data, verbose=0, callbacks=[Plateau()])
