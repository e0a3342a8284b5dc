"""Distillation between whole models: every kind of student, of teacher, and of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.compression.distillation.losses import (
    AttentionMaps,
    HiddenStates,
    Relations,
    SoftLabels,
)
from tf_gptopt.compression.distillation.teachers import as_teachers
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.models.checkpoints import named_weights, save_checkpoint
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw
from tf_gptopt.training.trainer import fit

IDS = np.random.default_rng(0).integers(0, 61, (8, 9)).astype("int32")
INPUTS, LABELS = IDS[:, :-1], IDS[:, 1:].copy()
LABELS[0, 2:] = -1  # padding
ALL = [SoftLabels(2.0), HiddenStates(), AttentionMaps(heads="average"), Relations()]


def parts(distiller: Distiller, inputs: Any = INPUTS, labels: Any = LABELS) -> dict[str, float]:
    """Each part of the loss, by `compute_loss` itself."""
    if not distiller._is_compiled:
        distiller.compile("sgd", NextTokenLoss())
    for metric in distiller._means:
        metric.reset_state()
    distiller.compute_loss(tf.constant(inputs), tf.constant(labels), distiller(inputs))
    return {metric.name: float(metric.result()) for metric in distiller._means}


def small_student(tiny_model: Callable, **overrides: Any) -> GPTModel:
    """Another width, and blocks of different sizes, as structured pruning leaves them."""
    shape = {
        "embedding_dim": 16,
        "num_heads": (1, 2),
        "intermediate_dim": (24, 40),
        "head_dim": 8,
        "num_layers": 2,
    }
    return tiny_model(**{**shape, **overrides})


def test_features_are_those_of_the_named_blocks(tiny_model: Callable) -> None:
    teacher, student = tiny_model(seed=1, num_layers=3), tiny_model(seed=2)
    losses = [HiddenStates(((0, 2), (1, 0)), normalize=True)]
    found = parts(Distiller(student, teacher, losses=losses))["hidden_states_loss"]

    def stream(model: GPTModel, block: int) -> np.ndarray:
        tap = keras.Model(model.inputs, model.base_layer(f"block_{block}_mlp_add").output)
        x = tap(INPUTS).numpy().astype(np.float64)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def distance(s: int, t: int) -> np.ndarray:
        return np.sum((stream(student, s) - stream(teacher, t)) ** 2, -1)[LABELS >= 0].mean()

    assert found == pytest.approx((distance(0, 2) + distance(1, 0)) / 2, rel=1e-4)


def test_what_is_padding_counts_in_no_loss(tiny_model: Callable) -> None:
    teacher, student = tiny_model(seed=1), small_student(tiny_model)
    distiller = Distiller(student, teacher, losses=ALL)
    before = parts(distiller)
    other = INPUTS.copy()
    other[0, 2:] = (other[0, 2:] + 7) % 61  # under the padding
    assert parts(distiller, other) == pytest.approx(before, rel=1e-5)
    other[0, 1] = (other[0, 1] + 7) % 61
    after = parts(distiller, other)
    assert all(abs(after[name] - before[name]) > 1e-5 * before[name] for name in before)


def test_every_loss_at_once_falls_and_the_student_comes_out_clean(
    tiny_model: Callable, tmp_path: Path
) -> None:
    teacher, student = tiny_model(seed=1), small_student(tiny_model)
    shapes = [tuple(w.shape) for w in student.weights]
    distiller = Distiller(student, teacher, alpha=0.9, losses=ALL)
    distiller.compile(adamw(steps=60, learning_rate=1e-2), NextTokenLoss())
    start = parts(distiller)
    history = distiller.fit(INPUTS, LABELS, epochs=30, verbose=0).history
    names = ["loss", *(loss.NAME for loss in ALL), "hard_loss"]
    assert list(history) == names
    end = parts(distiller)
    assert all(end[name] < start[name] for name in names[1:])
    (projection,) = distiller.projections
    assert any(projection.kernel is w for w in distiller.trainable_variables)
    assert len(distiller.weights) == len(shapes) + 1 + 2 * len(distiller._means)
    assert [tuple(w.shape) for w in distiller.student.weights] == shapes
    distiller.save(tmp_path / "student.keras")
    loaded = keras.models.load_model(tmp_path / "student.keras", compile=False)
    np.testing.assert_allclose(loaded(INPUTS), student(INPUTS), atol=1e-4)
    assert len(named_weights(loaded)) == len(shapes)


class Batches:
    sequence_length = 8

    def batches(self, split: str, batch_size: int, seed: int = 0, start_step: int = 0) -> Any:
        def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            shape = [batch_size, 9]
            ids = tf.random.stateless_uniform(shape, [seed, step], maxval=61, dtype=tf.int32)
            return ids[:, :-1], ids[:, 1:]

        return tf.data.Dataset.range(start_step, 2**40).map(batch)


def test_a_resumed_run_has_the_same_student_and_projections(
    tiny_model: Callable, tmp_path: Path
) -> None:
    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 5:
                raise InterruptedError

    def build(seed: int) -> Distiller:
        keras.utils.set_random_seed(seed)  # other projections to begin with
        losses = [HiddenStates("last"), Relations()]
        return Distiller(small_student(tiny_model), tiny_model(seed=1), losses=losses)

    def silent(report: Any) -> None:
        pass

    config = TrainConfig(steps=8, batch_size=4, accumulate=2, log_every=2, checkpoint_every=1e-9)
    whole = build(3)
    fit(whole, Batches(), config, None, [], silent)
    with pytest.raises(InterruptedError):
        fit(build(3), Batches(), config, tmp_path, [Crash()], silent)
    resumed = build(4)
    first = resumed.projections[0].kernel.numpy()
    fit(resumed, Batches(), config, tmp_path, [], silent)
    for a, b in zip(resumed.weights, whole.weights, strict=True):
        if "mean" not in a.name and "_loss" not in a.name:
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.name)
    assert np.abs(resumed.projections[0].kernel.numpy() - first).max() > 1e-3


def test_a_recomputing_student_learns_the_same(tiny_model: Callable) -> None:
    teacher, ends = tiny_model(seed=1), []
    losses = [SoftLabels(), HiddenStates(), Relations()]  # of both kinds of taps
    for recompute in (False, True):
        keras.utils.set_random_seed(0)
        student = small_student(tiny_model)
        distiller = Distiller(student, teacher, losses=losses)
        student.recompute = recompute
        distiller.compile(keras.optimizers.SGD(0.5), NextTokenLoss())
        history = distiller.fit(INPUTS, LABELS, epochs=2, verbose=0, shuffle=False).history
        ends.append((history, student.get_weights()))
    for name, values in ends[0][0].items():
        np.testing.assert_allclose(ends[1][0][name], values, rtol=1e-5, err_msg=name)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_sparse_and_quantization_aware_students_keep_their_promise(tiny_model: Callable) -> None:
    from tf_gptopt.compression.pruning.callbacks import pruning_callbacks
    from tf_gptopt.compression.pruning.pruner import prune, strip_pruning

    teacher = tiny_model(seed=1)
    sparse = prune(small_student(tiny_model), PruneConfig(0.5, end_step=4, frequency=2))
    distiller = Distiller(sparse, teacher, losses=ALL)
    distiller.compile(adamw(steps=6, learning_rate=1e-2), NextTokenLoss())
    distiller.fit(
        INPUTS, LABELS, epochs=6, verbose=0, callbacks=pruning_callbacks(distiller.student)
    )
    plain = strip_pruning(distiller.student)
    kernel = named_weights(plain)["block_0_fc/kernel"]
    assert np.mean(kernel == 0) == 0.5

    aware = quantize_aware(plain)
    distiller = Distiller(aware, teacher, losses=ALL)
    distiller.compile(adamw(steps=4, learning_rate=1e-2), NextTokenLoss())
    history = distiller.fit(INPUTS, LABELS, epochs=4, verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())
    stripped = strip_quantization(distiller.student)
    final = named_weights(stripped)["block_0_fc/kernel"]
    np.testing.assert_array_equal(final[kernel == 0], 0)
    steps = final / (np.abs(final).max(0) / 127)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert np.abs(final - kernel).max() > 1e-3  # it has trained
    np.testing.assert_allclose(stripped(INPUTS), aware(INPUTS), atol=1e-3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(tiny_model: Callable, policy: str) -> None:
    def build() -> Distiller:
        keras.utils.set_random_seed(0)
        return Distiller(small_student(tiny_model), tiny_model(seed=1), losses=ALL)

    exact = parts(build())
    keras.mixed_precision.set_global_policy(policy)
    distiller = build()
    keras.mixed_precision.set_global_policy("float32")
    (projection,) = distiller.projections
    assert projection.dtype_policy.name == policy
    distiller.compile(keras.optimizers.Adam(1e-2), NextTokenLoss())
    scaled = isinstance(distiller.optimizer, keras.mixed_precision.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    for name, value in parts(distiller).items():
        assert value == pytest.approx(exact[name], rel=0.05), name
    losses = distiller.fit(INPUTS, LABELS, epochs=12, verbose=0, shuffle=False).history["loss"]
    assert losses[-1] < losses[0]


def test_teachers_of_other_houses_say_what_they_said(tiny_model: Callable, tmp_path: Path) -> None:
    keras_nlp = pytest.importorskip("keras_nlp")
    import torch
    import transformers

    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=61,
        num_layers=2,
        num_heads=3,
        hidden_dim=24,
        intermediate_dim=50,
        max_sequence_length=32,
    )
    rng = np.random.default_rng(1)
    for weight in backbone.weights:
        noise = rng.normal(0, 0.2, weight.shape)
        weight.assign(noise + 1.0 if "gamma" in weight.path else noise)
    theirs = keras_nlp.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    expected = theirs({"token_ids": INPUTS, "padding_mask": np.ones_like(INPUTS)})
    for given in (theirs, backbone):
        (ours,) = as_teachers(given)
        np.testing.assert_allclose(ours(INPUTS), np.asarray(expected), atol=1e-4)

    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3)
    ).eval()
    gpt2.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = gpt2(torch.tensor(INPUTS, dtype=torch.long)).logits.numpy()
    student = tiny_model(num_layers=1)
    save_checkpoint(ours, tmp_path / "ours")
    teachers = [str(tmp_path / "theirs"), tmp_path / "ours", ours]
    distiller = Distiller(student, teachers, 1.0, 1.0, teacher_weights=[2, 1, 1])
    np.testing.assert_allclose(distiller.teachers[0](INPUTS), logits, atol=1e-4)
    np.testing.assert_allclose(distiller.teachers[1](INPUTS), ours(INPUTS), atol=1e-5)

    def softmax(x: np.ndarray) -> np.ndarray:
        p = np.exp(np.float64(x) - np.max(x, -1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    p = (softmax(logits) + softmax(ours(INPUTS).numpy())) / 2
    q = softmax(student(INPUTS).numpy())
    kl = np.sum(p * np.log(p / q), -1)[LABELS >= 0].mean()
    assert parts(distiller)["distillation_loss"] == pytest.approx(kl, rel=1e-4)


def test_two_replicas_learn_every_loss_as_one(run_child: Callable) -> None:
    printed = run_child(
        """
        import numpy as np
        from tf_gptopt._keras import keras
        from tf_gptopt.compression.distillation.distiller import Distiller
        from tf_gptopt.compression.distillation.losses import (
            AttentionMaps, HiddenStates, Relations, SoftLabels)
        from tf_gptopt.models.gpt import GPTModel
        from tf_gptopt.training.loss import NextTokenLoss
        from tf_gptopt.training.optimizer import adamw

        ids = np.random.default_rng(0).integers(0, 31, (16, 9)).astype("int32")
        inputs, labels = ids[:, :-1], ids[:, 1:].copy()
        labels[:4, 3:] = -1  # more on the first replica
        losses = [SoftLabels(2.0, "js"), HiddenStates(), AttentionMaps(), Relations()]
        ends = []
        for strategy in (tf.distribute.get_strategy(),
                         tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
            keras.utils.set_random_seed(1)
            with strategy.scope():
                teachers = [GPTModel(31, 16, 2, 2, max_sequence_length=8) for _ in range(2)]
                student = GPTModel(31, 12, 1, 2, max_sequence_length=8)
            # the distiller finds the scope of its student
            distiller = Distiller(student, teachers, alpha=0.7, losses=losses)
            with strategy.scope():
                for weight in distiller.trainable_weights:
                    weight.assign(weight * 1.5)
                optimizer = adamw(steps=4, learning_rate=1e-2, accumulate=2)
                distiller.compile(optimizer, NextTokenLoss())
            fit = distiller.fit(inputs, labels, batch_size=8, epochs=3, shuffle=False, verbose=0)
            kernel = distiller.projections[0].kernel
            assert len(strategy.experimental_local_results(kernel)) == strategy.num_replicas_in_sync
            ends.append((fit.history, [*student.get_weights(), kernel.numpy()]))
        (one, one_weights), (two, two_weights) = ends
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, err_msg=name)
        for a, b in zip(one_weights, two_weights):
            np.testing.assert_allclose(a, b, atol=2e-5)
        assert one["loss"][-1] < one["loss"][0]
        print("equal", len(one))
        """
    )
    assert printed.strip().splitlines()[-1] == "equal 6"


def test_mistakes_are_explained(tiny_model: Callable) -> None:
    teacher, student = tiny_model(seed=1), tiny_model(num_layers=1, num_heads=2)

    def make(*losses: Any, **options: Any) -> Distiller:
        return Distiller(student, teacher, losses=losses, **options)

    with pytest.raises(UserError, match="one of a kind"):
        make()
    with pytest.raises(UserError, match="one of a kind"):
        make(SoftLabels(1.0), SoftLabels(2.0))
    with pytest.raises(UserError, match=r"losses are SoftLabels.*Received: 'hidden'"):
        make("hidden")
    with pytest.raises(
        UserError, match=r"student has 2 heads and block 2 of the teacher 3"
    ) as info:
        Distiller(student, tiny_model(num_layers=3), losses=[AttentionMaps()])
    assert "heads='average'" in str(info.value)
    with pytest.raises(
        UserError, match=r"5 does not divide 24.*These do: 1, 2, 3, 4, 6, 8, 12, 24"
    ):
        make(Relations(heads=5))
    with pytest.raises(UserError, match="the teacher 2"):
        make(HiddenStates(((0, 2),)))
    with pytest.raises(UserError, match="a positive number for each of 1 teachers"):
        make(SoftLabels(), teacher_weights=[1, 2])
    with pytest.raises(UserError, match=r"teacher=\[\]"):
        Distiller(student, [])
    with pytest.raises(UserError, match="does not exist"):
        Distiller(student, "no/such/folder")
