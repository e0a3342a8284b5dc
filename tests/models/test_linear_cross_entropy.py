"""The loss in chunks, from hidden states: the plain loss's value and gradients in less memory."""

import math
import textwrap

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._keras import keras
from tf_gptopt.models import linear_cross_entropy as module
from tf_gptopt.models.linear_cross_entropy import Head, linear_cross_entropy
from tf_gptopt.training.loss import NextTokenLoss

WIDTH = 6
PEAK = """
from pathlib import Path

def peak_kb():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
"""


def problem(batch, time, vocab, seed=0):
    rng = np.random.default_rng(seed)
    rows = tf.constant(rng.normal(size=(batch, time, WIDTH)), tf.float32)
    table = tf.constant(rng.normal(size=(vocab, WIDTH)), tf.float32)
    labels = tf.constant(rng.integers(0, vocab, (batch, time)), tf.int32)
    weights = tf.constant(rng.random((batch, time)) * (rng.random((batch, time)) < 0.7), tf.float32)
    return rows, table, labels, weights


def plain(rows, table, labels, weights):
    logits = tf.einsum("btw,vw->btv", rows, table)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_sum(losses * weights)


def with_gradients(function, rows, table, *rest):
    with tf.GradientTape() as tape:
        tape.watch([rows, table])
        loss = function(rows, table, *rest) / 3.0
    return loss, *tape.gradient(loss, [rows, table])


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 4),
    time=st.integers(1, 7),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 300),
    known=st.booleans(),
)
def test_any_chunk_gives_the_plain_loss_and_gradients(batch, time, vocab, chunk, known):
    inputs = problem(batch, time, vocab)
    ours = lambda rows, table, *rest: linear_cross_entropy(Head(rows, table, True), *rest, chunk)  # noqa: E731
    specs = [tf.TensorSpec(x.shape if known else [None] * len(x.shape), x.dtype) for x in inputs]
    specs[1] = tf.TensorSpec(inputs[1].shape)
    step = tf.function(lambda *a: with_gradients(ours, *a), input_signature=specs)
    for got, want in zip(step(*inputs), with_gradients(plain, *inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    rows, table, labels, weights = inputs
    untrained = linear_cross_entropy(Head(rows, table, False), labels, weights, chunk)
    np.testing.assert_allclose(untrained, plain(*inputs), rtol=2e-5, atol=2e-6)


def test_a_label_that_is_no_token_is_nan_unless_it_does_not_count():
    rows, table, labels, _ = problem(2, 3, 11)
    labels = tf.tensor_scatter_nd_update(labels, [[1, 2]], [11])
    weights = tf.ones([2, 3])
    assert math.isnan(float(linear_cross_entropy(Head(rows, table, True), labels, weights, 22)))
    weights = tf.tensor_scatter_nd_update(weights, [[1, 2]], [0.0])
    assert math.isfinite(float(linear_cross_entropy(Head(rows, table, True), labels, weights, 22)))


@pytest.mark.parametrize(
    ("policy", "tied"), [("float32", True), ("mixed_bfloat16", False), ("mixed_float16", True)]
)
def test_fit_and_evaluate_take_it(tiny_model, policy, tied, monkeypatch):
    keras.mixed_precision.set_global_policy(policy)
    monkeypatch.setattr(module, "CHUNK", 5 * 61)
    ids = np.random.default_rng(0).integers(0, 61, (4, 9))
    labels = np.where(np.random.default_rng(1).random((4, 8)) < 0.3, -1, ids[:, 1:])
    data = tf.data.Dataset.from_tensors((ids[:, :-1].astype("int32"), labels.astype("int32")))
    losses, weights = [], []
    for head in (True, False):
        model = tiny_model(tie_embeddings=tied)

        class Loss(NextTokenLoss):
            def __call__(self, y_true, y_pred, sample_weight=None, head=head):
                assert hasattr(y_pred, "head")
                return super().__call__(y_true, y_pred if head else tf.identity(y_pred))

        model.compile(keras.optimizers.SGD(0.1), Loss())
        losses.append(model.fit(data.repeat(3), verbose=0).history["loss"][0])
        losses.append(model.evaluate(data, verbose=0))
        weights.append(model.get_weights())
    tolerance = 1e-5 if policy == "float32" else 2e-2
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=tolerance)
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)


def test_peak_memory_does_not_grow_with_the_batch(run_child):
    """The plain loss holds 4,096 x 50,257 logits and more, 824 MB each; ours does not run them."""
    code = """
        import numpy as np
        from tf_gptopt._keras import keras
        from tf_gptopt.models.gpt import GPTModel
        from tf_gptopt.training.loss import NextTokenLoss
        plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        loss = NextTokenLoss() if {kind!r} == "ours" else plain
        model = GPTModel(50257, 32, 1, 2, max_sequence_length=256)
        model.compile(keras.optimizers.SGD(0.1), loss)
        ids = np.random.default_rng(0).integers(0, 50257, (16, 257))
        before = peak_kb()
        model.fit(ids[:, :-1], ids[:, 1:], batch_size=16, verbose=0)
        print((peak_kb() - before) // 1024)
    """
    ours, plain = (
        int(run_child(PEAK + textwrap.dedent(code).format(kind=kind), devices=1))
        for kind in ("ours", "plain")
    )
    assert ours < 500  # MB, of which some 250 are code that loads at the first step
    assert plain > ours + 400
