"""What people bring along from Keras: callbacks, .keras files, batches of free length."""

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw

SHAPE = {"vocab_size": 31, "embedding_dim": 16, "num_layers": 1, "num_heads": 2}
TIME = 8


def data(rows=8):
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, 31, (rows, TIME)).astype("int32") for _ in range(2))


def build(seed=1, **options):
    keras.utils.set_random_seed(seed)
    return GPTModel(**SHAPE, max_sequence_length=TIME, **options)


def same_weights(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


class Stop(keras.callbacks.Callback):
    """Ends the run as a killed process does, after so many batches."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise InterruptedError


@pytest.mark.parametrize("wrapped", [False, True])
def test_backup_and_restore_goes_on_with_the_dropout_that_was_to_come(tmp_path, wrapped):
    def train(seed, *callbacks):
        model = build(seed, dropout=0.2)
        if wrapped:
            model = prune(model, PruneConfig(0.5, schedule="constant", min_weights=0))
        model.compile(adamw(steps=12), NextTokenLoss())
        model.fit(*data(), batch_size=2, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
        return model

    whole = train(1)
    with pytest.raises(InterruptedError):
        train(1, keras.callbacks.BackupAndRestore(tmp_path), Stop(6))
    again = train(7, keras.callbacks.BackupAndRestore(tmp_path))
    assert same_weights(again, whole)
    assert not same_weights(train(7), whole)


def rate_of(model):
    return float(model.optimizer.learning_rate.numpy())


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_callbacks_set_the_rate_of_an_optimizer_without_a_schedule(policy):
    def train(callback):
        model = build(dtype=policy)
        optimizer = adamw(9, schedule="constant", warmup_steps=0, learning_rate=1e-3)
        model.compile(optimizer, NextTokenLoss())
        before = model.get_weights()
        history = model.fit(*data(), epochs=3, verbose=0, callbacks=[callback])
        moved = any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
        return moved, rate_of(model), history.history["lr"]

    zero = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.0)
    assert train(zero) == (False, 0.0, [0.0] * 3)
    cut = keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=100)
    moved, rate, logged = train(cut)
    assert moved
    assert rate == pytest.approx(1e-5)
    assert logged == pytest.approx([1e-3, 1e-3, 1e-4])


@pytest.mark.parametrize("kind", ["gpt", "distiller"])
def test_what_fit_could_not_do_is_refused(kind):
    model = build() if kind == "gpt" else Distiller(build(), build(2))
    model.compile(adamw(9), NextTokenLoss())
    for callback in (
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.0),
        keras.callbacks.ReduceLROnPlateau(),
    ):
        with pytest.raises(UserError, match='schedule="constant", warmup_steps=0'):
            model.fit(*data(), verbose=0, callbacks=[callback])
    with pytest.raises(UserError, match="sample_weight"):
        model.fit(*data(), verbose=0, class_weight={0: 1.0, 1: 2.0})
    with pytest.raises(UserError, match="sample_weight"):
        model.train_on_batch(*data(), class_weight={0: 1.0, 1: 2.0})


@pytest.mark.parametrize("saved", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_keras_file_keeps_the_policy_of_its_layers(tmp_path, saved):
    model = build(dtype=saved)
    assert keras.mixed_precision.global_policy().name == "float32"
    model.compile(keras.optimizers.Adam(), NextTokenLoss())
    model.fit(*data(), verbose=0)
    model.save(tmp_path / "model.keras")
    for policy in ("float32", "mixed_float16"):
        keras.mixed_precision.set_global_policy(policy)
        again = keras.models.load_model(tmp_path / "model.keras")
        assert again.base_layer("block_0_qkv").dtype_policy.name == saved
        assert again.dtype_policy.name == saved
        assert type(again.optimizer) is type(model.optimizer)
        assert keras.mixed_precision.global_policy().name == policy
        assert same_weights(again, model)


def test_batches_longer_than_the_context_are_named():
    model = build()
    model.compile("sgd", NextTokenLoss())
    ids = np.ones((2, TIME + 3), "int32")
    free = tf.TensorSpec([None, None], tf.int32)
    batches = tf.data.Dataset.from_generator(
        lambda: iter([(ids, ids)]), output_signature=(free, free)
    )
    with pytest.raises(
        UserError, match=r"input is 11 tokens long and the model's context is 8\. Cut"
    ):
        model.fit(batches, verbose=0)
    short = batches.map(lambda x, y: (x[:, :TIME], y[:, :TIME]))
    assert np.isfinite(model.fit(short, verbose=0).history["loss"][0])
