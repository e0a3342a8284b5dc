"""Distillation: the loss is Hinton's, the teacher is untouched, and Keras' training is ordinary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.config import DistillConfig
from tf_gptopt.compression.distillation.distiller import Distiller, distillation_loss
from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity
from tf_gptopt.compression.structured.shrinking import shrink
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 61, (16, 9)).astype("int32")
INPUTS, LABELS = IDS[:, :-1], IDS[:, 1:]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    """T^2 * KL as its definition reads, `(batch, time)`."""
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * np.sum(np.exp(p) * (p - q), -1)


def hard_loss(logits: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_softmax(logits), LABELS[..., None], -1)[..., 0]


def pair(tiny_model: Callable, **overrides: Any) -> tuple[GPTModel, GPTModel]:
    teacher = tiny_model(seed=1, **overrides)
    return shrink(teacher, layers=1), teacher


def weights(model: keras.Model) -> list[np.ndarray]:
    return [w.numpy() for w in model.weights]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_loss_and_gradient_are_the_formula(temperature: float, shift: float) -> None:
    teacher = RNG.normal(shift, 3, (2, 5, 11)).astype(np.float32)
    student = RNG.normal(-shift, 3, (2, 5, 11)).astype(np.float32)
    variable = tf.Variable(student)
    with tf.GradientTape() as tape:
        loss = distillation_loss(tf.constant(teacher), variable, temperature)
        total = tf.reduce_sum(loss * [[1, 2, 3, 4, 5]])
    expected = kl(teacher, student, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-4)
    difference = np.exp(log_softmax(student / temperature)) - np.exp(
        log_softmax(teacher / temperature)
    )
    expected_gradient = temperature * difference * np.array([1, 2, 3, 4, 5])[:, None]
    np.testing.assert_allclose(tape.gradient(total, variable), expected_gradient, atol=1e-4)


def test_loss_of_equal_logits_is_zero_and_impossible_tokens_are_harmless() -> None:
    logits = RNG.normal(0, 3, (1, 4, 7)).astype(np.float32)
    np.testing.assert_allclose(distillation_loss(logits, logits, 2.0), 0, atol=1e-6)
    logits[..., 3] = -1e9
    assert np.isfinite(distillation_loss(logits, RNG.normal(0, 3, (1, 4, 7)), 2.0)).all()


def test_reported_losses_are_their_definitions(tiny_model: Callable) -> None:
    student, teacher = pair(tiny_model)
    distiller = Distiller(student=student, teacher=teacher, temperature=3.0, alpha=0.3)
    distiller.compile("sgd", LOSS, metrics=["accuracy"], run_eagerly=True)
    # 16 examples in batches of 6, 6 and 4: the means must weigh them by size
    logs = distiller.evaluate(INPUTS, LABELS, batch_size=6, verbose=0, return_dict=True)
    soft = kl(teacher(INPUTS).numpy(), student(INPUTS).numpy(), 3.0).mean()
    hard = hard_loss(student(INPUTS).numpy()).mean()
    assert logs["distillation_loss"] == pytest.approx(soft, rel=1e-4)
    assert logs["hard_loss"] == pytest.approx(hard, rel=1e-4)
    assert logs["loss"] == pytest.approx(0.3 * soft + 0.7 * hard, rel=1e-4)
    assert list(logs) == ["loss", "distillation_loss", "hard_loss", "accuracy"]


@pytest.mark.parametrize("shape", [(6,), (6, 8)])
def test_sample_weights_weigh_both_losses(tiny_model: Callable, shape: tuple) -> None:
    student, teacher = pair(tiny_model)
    distiller = Distiller(student=student, teacher=teacher)
    distiller.compile("sgd", LOSS)
    weight = RNG.random(shape).astype(np.float32)
    inputs, labels = tf.constant(INPUTS[:6]), tf.constant(LABELS[:6])
    logits = student(inputs)
    loss = distiller.compute_loss(inputs, labels, logits, tf.constant(weight))
    soft = kl(teacher(INPUTS[:6]).numpy(), logits.numpy(), 2.0)
    both = 0.5 * soft + 0.5 * hard_loss(student(INPUTS).numpy())[:6]
    full = weight if len(shape) == 2 else weight[:, None]
    assert float(loss) == pytest.approx(np.mean(both * full), rel=1e-4)


def test_tokens_without_a_label_do_not_count(tiny_model: Callable) -> None:
    student, teacher = pair(tiny_model)
    distiller = Distiller(student=student, teacher=teacher, alpha=1.0)
    distiller.compile("sgd", NextTokenLoss())
    labels = np.where(RNG.random(LABELS.shape) < 0.3, -1, LABELS)
    logits = student(INPUTS)
    loss = distiller.compute_loss(INPUTS, tf.constant(labels), logits)
    expected = kl(teacher(INPUTS).numpy(), logits.numpy(), 2.0)[labels >= 0].mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_student_comes_closer_and_teacher_stays(tiny_model: Callable, tmp_path: Path) -> None:
    student, teacher = pair(tiny_model, dropout=0.2)
    before, trainable = weights(teacher), teacher.trainable
    distiller = Distiller(student=student, teacher=teacher, alpha=1.0)
    distiller.compile(keras.optimizers.Adam(3e-3), LOSS)
    saver = keras.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"))
    fit = distiller.fit(
        INPUTS, LABELS, batch_size=8, epochs=8, verbose=0, callbacks=[saver], shuffle=False
    )
    losses = fit.history["distillation_loss"]
    assert losses[-1] < 0.8 * losses[0]
    for weight, old in zip(teacher.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)
    assert teacher.trainable is trainable  # the caller's model is not even marked
    names = {w.name for w in student.trainable_weights}
    assert {w.name for w in distiller.trainable_weights} == names
    np.testing.assert_allclose(
        distiller.predict(INPUTS[:2], verbose=0), student(INPUTS[:2]), atol=1e-4
    )

    # what is saved is the student: by a callback, and in a checkpoint
    saved = keras.models.load_model(tmp_path / "best.keras", compile=False)
    assert isinstance(saved, GPTModel)
    np.testing.assert_allclose(saved(INPUTS), student(INPUTS), atol=1e-4)
    checkpoint = tf.train.Checkpoint(model=distiller, optimizer=distiller.optimizer)
    path = checkpoint.write(str(tmp_path / "checkpoint"))
    stored = sum(
        int(np.prod(shape)) for name, shape in tf.train.list_variables(path) if "OBJECT" not in name
    )
    assert stored < 3 * student.count_params() + 100  # weights and Adam's two moments


def test_teacher_runs_in_inference_mode_while_training(tiny_model: Callable) -> None:
    teacher, student = tiny_model(seed=1, dropout=0.5), tiny_model(num_layers=1)
    distiller = Distiller(student=student, teacher=teacher)
    distiller.compile(keras.optimizers.SGD(0.0), LOSS, run_eagerly=True)
    logs = distiller.fit(INPUTS, LABELS, verbose=0).history
    expected = kl(teacher(INPUTS).numpy(), student(INPUTS).numpy(), 2.0).mean()
    assert logs["distillation_loss"] == [pytest.approx(expected, rel=1e-4)]


def test_alpha_zero_is_plain_training(tiny_model: Callable) -> None:
    teacher = tiny_model(max_sequence_length=4)  # would refuse these inputs if it were run
    student = tiny_model(num_layers=1)
    alone = shrink(student, layers=1)
    distiller = Distiller(student=student, teacher=teacher, alpha=0.0)
    losses = []
    for model in (alone, distiller):
        model.compile(keras.optimizers.Adam(3e-3), LOSS)
        fit = model.fit(INPUTS, LABELS, batch_size=8, epochs=2, shuffle=False, verbose=0)
        losses.append(fit.history)
    assert losses[0] == losses[1]
    for weight, expected in zip(student.weights, alone.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), expected.numpy())


def test_a_pruned_student_keeps_its_zeros(tiny_model: Callable) -> None:
    student, teacher = pair(tiny_model)
    sparse = prune(student, PruneConfig(0.5, end_step=4, frequency=2))
    distiller = Distiller(student=sparse, teacher=teacher)
    distiller.compile(keras.optimizers.AdamW(3e-3), LOSS)
    fit = distiller.fit(
        INPUTS, LABELS, batch_size=4, epochs=2, verbose=0, callbacks=pruning_callbacks(sparse)
    )
    assert fit.history["sparsity"] == [0.5, 0.5]
    assert np.mean(sparse.base_layer("block_0_fc").layer.kernel.numpy() == 0) == 0.5
    assert sparsity(distiller.student)["total"] == 0.5


def test_float16_scales_the_loss(tiny_model: Callable) -> None:
    keras.mixed_precision.set_global_policy("mixed_float16")
    student, teacher = pair(tiny_model)
    keras.mixed_precision.set_global_policy("float32")
    distiller = Distiller(student=student, teacher=teacher)
    distiller.compile(keras.optimizers.Adam(1e-2), LOSS)
    assert isinstance(distiller.optimizer, keras.mixed_precision.LossScaleOptimizer)
    losses = distiller.fit(INPUTS, LABELS, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_two_replicas_learn_as_one(run_child: Callable) -> None:
    printed = run_child(
        """
        import numpy as np
        from tf_gptopt._keras import keras
        from tf_gptopt.compression.distillation.distiller import Distiller
        from tf_gptopt.compression.structured.shrinking import shrink
        from tf_gptopt.models.gpt import GPTModel

        ids = np.random.default_rng(0).integers(0, 31, (16, 9))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        ends = []
        for strategy in (tf.distribute.get_strategy(),
                         tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
            keras.utils.set_random_seed(1)
            with strategy.scope():
                teacher = GPTModel(31, 16, 2, 2, max_sequence_length=8)
                student = shrink(teacher, layers=1)
                for weight in student.trainable_weights:
                    weight.assign(weight * 1.5)
                distiller = Distiller(student=student, teacher=teacher, alpha=0.7)
                distiller.compile(keras.optimizers.SGD(1.0), loss)
            fit = distiller.fit(ids[:, :-1], ids[:, 1:], batch_size=8, epochs=3, shuffle=False,
                                verbose=0)
            ends.append((fit.history, student.get_weights()))
        (one, one_weights), (two, two_weights) = ends
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, err_msg=name)
        for a, b in zip(one_weights, two_weights):
            np.testing.assert_allclose(a, b, atol=1e-5)
        assert one["loss"][-1] < one["loss"][0]
        print("equal", sorted(one))
        """
    )
    assert printed.strip() == "equal ['distillation_loss', 'hard_loss', 'loss']"


def test_mistakes_are_explained(tiny_model: Callable) -> None:
    class Tokenizer:
        def __init__(self, fingerprint: str) -> None:
            self.fingerprint = fingerprint

    student, teacher = pair(tiny_model)
    with pytest.raises(UserError, match=r"one vocabulary.*Build the student with vocab_size=61"):
        Distiller(student=tiny_model(vocab_size=60), teacher=teacher)
    with pytest.raises(UserError, match="are one model"):
        Distiller(student=teacher, teacher=teacher)
    with pytest.raises(UserError, match="GPTModel is needed"):
        Distiller(student=student, teacher=keras.Sequential())
    student.tokenizer, teacher.tokenizer = Tokenizer("a" * 64), Tokenizer("b" * 64)
    with pytest.raises(UserError, match="different tokenizers"):
        Distiller(student=student, teacher=teacher)
    teacher.tokenizer = None  # nothing to compare
    Distiller(student=student, teacher=teacher)
    for values in ({"temperature": 0}, {"alpha": 1.1}, {"alpha": float("nan")}, {"alpha": "high"}):
        with pytest.raises(UserError, match=f"Received: {next(iter(values))}="):
            DistillConfig(**values)
        with pytest.raises(UserError, match=f"Received: {next(iter(values))}="):
            Distiller(student=student, teacher=teacher, **values)
