"""Adaptive pruning: rises, steps back to the last good state, says where it stopped, resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.adaptive import AdaptivePruning
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity, strip_pruning
from tf_gptopt.models.gpt import GPTModel

IDS = np.cumsum(np.random.default_rng(0).integers(1, 3, (64, 9)), axis=1).astype("int32") % 61
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CONFIG = PruneConfig(
    0.97, schedule="adaptive", end_step=40, frequency=2, increment=0.16, tolerance=0.01
)


def start(model: GPTModel, config: PruneConfig) -> tuple[GPTModel, AdaptivePruning]:
    pruned = prune(model, config)
    pruned.compile(keras.optimizers.Adam(3e-3), LOSS)
    pruned.optimizer.build(pruned.trainable_variables)
    return pruned, pruning_callbacks(pruned, IDS)[-1]


def train(model: GPTModel, first: int, last: int, *callbacks: Any) -> dict[str, list]:
    rows = np.tile(IDS, (4, 1))[4 * first : 4 * last]
    arguments = {"batch_size": 4, "shuffle": False, "verbose": 0, "callbacks": callbacks}
    return model.fit(rows[:, :-1], rows[:, 1:], **arguments).history


@pytest.fixture(scope="module")
def learnt() -> GPTModel:
    """A model that has learnt enough for pruning to hurt."""
    keras.utils.set_random_seed(0)
    model = GPTModel(61, 16, 1, 2, max_sequence_length=8)
    model.compile(keras.optimizers.Adam(1e-2), LOSS)
    for _ in range(3):
        train(model, 0, 40)
    return model


class Recorder(keras.callbacks.Callback):
    """Validation loss and sparsity as each step leaves them, and a checkpoint after one of them."""

    def __init__(self, adaptive: AdaptivePruning, prefix: str) -> None:
        super().__init__()
        self.adaptive, self.prefix = adaptive, prefix
        self.seen: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.adaptive.layers[0].steps_done
        self.seen.append((step, self.adaptive.sparsity, self.adaptive.validation_loss()))
        if step == 9:
            model = self.adaptive.pruned
            tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(self.prefix)


def test_it_rises_steps_back_stops_and_resumes(
    learnt: GPTModel, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    prefix = str(tmp_path / "ninth")
    model, adaptive = start(learnt, CONFIG)
    before = adaptive.validation_loss()
    recorder = Recorder(adaptive, prefix)
    logs = train(model, 0, 50, adaptive, recorder)
    state = adaptive.state
    limit = before * 1.01
    assert state.baseline == before

    judged = {step: (tried, loss, kept) for step, tried, loss, kept in state.history}
    assert {kept for _, _, kept in judged.values()} == {True, False}  # both have happened
    assert judged[0][:2] == (0.0, before)
    good, increment = 0.0, 0.16
    for step, (tried, loss, kept) in judged.items():
        assert step % 2 == 0
        assert kept == (loss <= limit)
        if kept:
            good = tried
        else:
            increment /= 2
        following = judged.get(step + 2)
        if following:
            assert following[0] == pytest.approx(min(good + increment, 0.97))
    # stopped because the rises had become too small, with what was last within the tolerance
    assert adaptive.stopped_at == good == state.good
    assert increment < 0.16 / 8 or max(judged) == 40
    end = max(judged)
    after = {step: (zeros, loss) for step, zeros, loss in recorder.seen}
    assert after[end][1] <= limit
    for step, zeros, _ in recorder.seen:
        if step >= end:  # and the masks stand still
            assert zeros == pytest.approx(good, abs=1e-3)
    assert sparsity(model)["total"] == pytest.approx(good, abs=1e-3)
    assert logs["adaptive_sparsity"] == [good]
    assert f"Pruning stopped at {good:.1%} zeros after step {end}" in capfd.readouterr().err

    killed, again = start(learnt, CONFIG)
    for weight in killed.trainable_weights:  # nothing is right by chance
        weight.assign(tf.ones_like(weight))
    checkpoint = tf.train.Checkpoint(model=killed, optimizer=killed.optimizer)
    checkpoint.read(prefix).assert_consumed()
    train(killed, 9, 50, again)
    assert again.state.history == state.history
    for ours, theirs in zip(killed.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_rise_that_was_too_much_leaves_no_trace(tiny_model: Callable) -> None:
    model, adaptive = start(tiny_model(num_layers=1), CONFIG)
    adaptive.on_train_begin()
    assert adaptive.sparsity == pytest.approx(0.16, abs=1e-3)
    good = [variable.numpy() for variable in adaptive.variables]
    adaptive.state.baseline = 1e9  # whatever comes is within the tolerance
    adaptive._judge(2)
    assert adaptive.sparsity == pytest.approx(0.32, abs=1e-3)
    for variable in model.trainable_weights:  # the next steps do harm
        variable.assign_add(tf.ones_like(variable))
    adaptive.state.baseline = 0.0
    adaptive.schedule.end_step = 4
    adaptive._judge(4)
    for variable, value in zip(adaptive.variables, good, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert adaptive.stopped_at == pytest.approx(0.16)


def test_initial_sparsity_is_the_first_rise_and_sparsity_the_last(tiny_model: Callable) -> None:
    config = PruneConfig(
        0.5, 0.4, schedule="adaptive", tolerance=1e6, scope="global", pattern="4x1"
    )
    pruned, adaptive = start(tiny_model(num_layers=1), config)
    assert adaptive.sparsity == 0  # the loss before pruning has to be measured first
    found = []
    for step in (0, 10, 20):
        adaptive._judge(step)
        found.append(round(adaptive.sparsity, 2))
    assert found == [0.4, 0.45, 0.5]
    with pytest.warns(UserWarning, match="has not finished at step 0 of 1000"):
        strip_pruning(pruned)
    adaptive._judge(30)
    assert adaptive.stopped_at == 0.5


def test_adaptive_needs_validation(tiny_model: Callable) -> None:
    pruned = prune(tiny_model(num_layers=1), CONFIG)
    with pytest.raises(UserError, match=r"validation=\.\.\."):
        pruning_callbacks(pruned)
