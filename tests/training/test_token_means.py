"""A loss is sum / number of labels, however tokens are divided into batches, replicas and steps."""

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw

VOCAB, TIME = 31, 12


def padded(rows=6, seed=0, padding=-1):
    """Ids and labels; the first rows have few labels, the others all."""
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(1, VOCAB, (rows, TIME)).astype("int32") for _ in range(2))
    y[: rows // 2, 2:] = padding
    return x, y


def true_loss(model, x, y):
    logits = model(x).numpy().astype("float64")
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, np.maximum(y, 0)[..., None], -1)[..., 0]
    return (log_z - chosen)[y >= 0].mean()


@pytest.fixture
def model(tiny_model):
    return lambda seed=0: tiny_model(seed, vocab_size=VOCAB, max_sequence_length=TIME)


@pytest.mark.parametrize("kind", ["gpt", "distiller", "metrics"])
def test_the_reported_loss_does_not_depend_on_the_batch_size(model, kind):
    x, y = padded()
    plain = trained = model()
    metrics = None
    if kind == "distiller":
        trained = Distiller(plain, model(1), alpha=0.5)
    if kind == "metrics":
        metrics = [keras.metrics.SparseCategoricalAccuracy()]
    trained.compile("sgd", NextTokenLoss(), metrics=metrics)
    name = "hard_loss" if kind == "distiller" else "loss"
    want = true_loss(plain, x, y)
    logs = [trained.evaluate(x, y, b, verbose=0, return_dict=True) for b in (6, 4, 1)]
    assert [log[name] for log in logs] == pytest.approx([want] * 3, rel=1e-5)
    for part in logs[0]:
        if part.endswith("loss"):
            assert [log[part] for log in logs] == pytest.approx([logs[0][part]] * 3, rel=1e-5)


def first_gradient(model):
    """Momentums after one update of an untouched AdamW are a tenth of its gradient."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return np.concatenate([m.numpy().ravel() for m in optimizer._momentums])


@pytest.mark.parametrize("kind", ["gpt", "distiller", "mixed_float16"])
@pytest.mark.parametrize("eagerly", [False, True])
def test_microbatches_weigh_by_their_labels(model, kind, eagerly):
    if kind == "mixed_float16":
        keras.mixed_precision.set_global_policy(kind)

    def gradient(accumulate, batch_size):
        keras.utils.set_random_seed(1)
        trained = model()
        if kind == "distiller":
            trained = Distiller(trained, model(1), alpha=0.5)
        optimizer = adamw(steps=9, accumulate=accumulate, clip_norm=None)
        if kind == "mixed_float16":
            optimizer = keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=128)
        trained.compile(optimizer, NextTokenLoss(), run_eagerly=eagerly)
        trained.fit(*padded(), batch_size, shuffle=False, verbose=0)
        return first_gradient(trained)

    whole, parts = gradient(1, 6), gradient(3, 2)
    tolerance = 2e-2 if kind == "mixed_float16" else 1e-5  # by microbatch it would be 0.3 or more
    assert np.linalg.norm(parts - whole) < tolerance * np.linalg.norm(whole)


def test_an_evaluation_between_two_microbatches_weighs_nothing(model):
    x, y = padded()
    trained = model()
    trained.compile(adamw(steps=9, accumulate=2, clip_norm=None), NextTokenLoss())
    whole = model()
    whole.compile(adamw(steps=9, clip_norm=None), NextTokenLoss())
    whole.train_on_batch(x, y)
    for rows in (slice(0, 3), slice(3, 6)):
        trained.train_on_batch(x[rows], y[rows])
        trained.test_on_batch(x[:1], y[:1])
    np.testing.assert_allclose(first_gradient(trained), first_gradient(whole), atol=1e-7)


def test_what_is_left_at_the_end_of_a_fit_makes_an_update(model):
    x, y = padded(5)
    trained, whole = model(), model()
    trained.compile(adamw(steps=9, accumulate=4, clip_norm=None), NextTokenLoss())
    whole.compile(adamw(steps=9, clip_norm=None), NextTokenLoss())
    trained.fit(x[:3], y[:3], batch_size=1, shuffle=False, verbose=0)  # fewer than accumulate
    whole.train_on_batch(x[:3], y[:3])
    assert int(trained.optimizer.iterations) == 1
    np.testing.assert_allclose(first_gradient(trained), first_gradient(whole), atol=1e-7)
    trained.fit(x, y, batch_size=1, shuffle=False, verbose=0)  # four, and one left over
    whole.train_on_batch(x[:4], y[:4])
    whole.train_on_batch(x[4:], y[4:])
    assert int(trained.optimizer.iterations) == 3
    np.testing.assert_allclose(first_gradient(trained), first_gradient(whole), atol=1e-7)


REPLICAS = """
import numpy as np
from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.parallel.pipeline import pipeline
from tf_gptopt.training.parallel.tensor import shard

rng = np.random.default_rng(0)
x, y = (rng.integers(1, 31, (5, 12)).astype("int32") for _ in range(2))
y[:2, 2:] = -1

def build(seed=1):
    keras.utils.set_random_seed(seed)
    return GPTModel(31, 16, 2, 2, max_sequence_length=12)

def run(strategy, kind):
    with strategy.scope():
        model = student = build()
        if kind == "distiller":
            model = Distiller(student, build(2))
        optimizer = keras.optimizers.SGD(0.5)
        if kind == "accumulated":
            optimizer = adamw(9, accumulate=2, clip_norm=None)
        model.compile(optimizer, NextTokenLoss())
    logs = model.fit(x, y, batch_size=4, shuffle=False, verbose=0).history  # the last row is alone
    if kind != "accumulated":
        logs |= model.evaluate(x, y, batch_size=3, verbose=0, return_dict=True)
    return model, student, logs

def loop(strategy):
    with strategy.scope():
        model, optimizer = build(), keras.optimizers.SGD(0.5)
        loss_of = NextTokenLoss()
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        optimizer.apply_gradients(zip(tape.gradient(loss, model.weights), model.weights))
        return loss
    data = tf.data.Dataset.from_tensors((x, y)).unbatch().batch(5)
    for batch in strategy.experimental_distribute_dataset(data):
        losses = tf.function(lambda x, y: strategy.run(step, (x, y)))(*batch)
    return model, float(strategy.reduce("SUM", losses, axis=None))

two, one = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()
assert two.num_replicas_in_sync == 2
for kind in ("plain", "distiller", "accumulated"):
    (_, mirrored, logs), (_, single, want) = run(two, kind), run(one, kind)
    for name, value in want.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5, err_msg=f"{kind} {name}")
    for a, b in zip(mirrored.get_weights(), single.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-3 if kind == "accumulated" else 1e-6)

class Smoothed(NextTokenLoss):
    def call(self, y_true, y_pred):
        return super().call(y_true, y_pred) + 1.0

for loss in (NextTokenLoss(), Smoothed(), NextTokenLoss(label_smoothing=0.1, z_loss=1e-3)):
    plain = build()
    plain.compile("sgd", loss)
    want = plain.evaluate(x, y, verbose=0)
    for model in (pipeline(plain, 2, microbatches=1), shard(plain, "model=2")):
        model.compile("sgd", loss)
        for rows in (5, 2) if type(loss) is NextTokenLoss and not loss.z_loss else (5,):
            reported = model.evaluate(x, y, batch_size=rows, verbose=0)
            np.testing.assert_allclose(reported, want, rtol=1e-5)
        if rows == 5:
            continue
        before = model.get_weights()
        try:
            model.fit(x, y + 30, batch_size=5, verbose=0)
        except UserError as error:
            assert "A label is no token" in str(error), error
        else:
            raise AssertionError("a label beyond the vocabulary was taken")
        for a, b in zip(before, model.get_weights()):
            np.testing.assert_array_equal(a, b)

(mirrored, loss), (single, want) = loop(two), loop(one)
np.testing.assert_allclose(loss, want, rtol=1e-6)
for a, b in zip(mirrored.get_weights(), single.get_weights()):
    np.testing.assert_allclose(a, b, atol=1e-6)
print("same")
"""


def test_replicas_of_unequal_batches_are_one_device(run_child):
    """In `fit`, where the last batch leaves a replica without a row, and in a loop of one's own."""
    assert run_child(REPLICAS, devices=2).endswith("same\n")


class Smoothed(NextTokenLoss):
    def call(self, y_true, y_pred):
        return super().call(y_true, y_pred) + 1.0


def test_a_subclass_is_asked_in_a_compiled_model(model):
    x, y = padded()
    plain = model()
    plain.compile("sgd", Smoothed())
    want = true_loss(plain, x, y) + 1.0
    assert plain.evaluate(x, y, verbose=0) == pytest.approx(want, rel=1e-5)
    taught = Distiller(plain, model(1))
    taught.compile("sgd", Smoothed())
    logs = taught.evaluate(x, y, verbose=0, return_dict=True)
    assert logs["hard_loss"] == pytest.approx(want, rel=1e-5)


def test_a_distiller_leaves_out_what_the_compiled_loss_leaves_out(model):
    x, y = padded(padding=0)
    logs = []
    for labels, ignored in ((y, 0), (np.where(y == 0, -100, y), -1)):
        distiller = Distiller(model(), model(1))
        distiller.compile("sgd", NextTokenLoss(ignore_label=ignored))
        logs.append(distiller.evaluate(x, labels, verbose=0, return_dict=True))
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt", "distiller"])
def test_an_id_that_is_none_is_named(model, kind):
    x, y = padded()
    trained = model()
    if kind == "distiller":
        trained = Distiller(trained, model(1))
    trained.compile("sgd", NextTokenLoss())
    wrong = y.copy()
    wrong[4, 3] = VOCAB + 5
    before = trained.get_weights()
    with pytest.raises(UserError, match=f"label is no token.* {VOCAB}.*label: {VOCAB + 5}"):
        trained.fit(x, wrong, verbose=0)
    with pytest.raises(UserError, match=f"label is no token.*label: {VOCAB + 5}"):
        trained.evaluate(x, wrong, verbose=0)
    with pytest.raises(UserError, match=f"token id is none.* {VOCAB}.*id: {VOCAB + 5}"):
        trained.predict(np.where(wrong < 0, 0, wrong), verbose=0)
    for a, b in zip(before, trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_of_keras_alone_is_trained_on_every_label_alike():
    """`fit` of this package installs the mean; Keras's own weighs the loss it reports by rows."""
    x, y = padded()
    model = keras.Sequential([keras.Input((None,)), keras.layers.Embedding(VOCAB, VOCAB)])
    model.compile(keras.optimizers.SGD(1.0), NextTokenLoss())
    assert model.evaluate(x, y, batch_size=6, verbose=0) == pytest.approx(
        true_loss(model, x, y), rel=1e-5
    )
