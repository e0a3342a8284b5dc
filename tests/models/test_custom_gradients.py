"""Gradients of one's own work wherever TensorFlow's do, and go with the graph that they are of."""

import gc

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import ops
from tensorflow.python.framework.func_graph import FuncGraph

from tf_gptopt.compression.distillation.distiller import Distiller
from tf_gptopt.models.custom_gradients import custom_gradient
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw


@custom_gradient
def tripled(x):
    """Its slope is 5, which only a gradient of one's own says."""
    return 3.0 * x, lambda upstream: 5.0 * upstream


def slope(function, x=2.0):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    gc.collect()  # what goes with a graph is there as long as the graph is
    return float(y), float(tape.gradient(y, x))


def repeated(x):
    return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, tripled(y)), (0, x))[1]


def test_gradients_eagerly_in_a_function_and_through_loops_and_branches():
    assert slope(tripled) == (6.0, 5.0)
    assert slope(tf.function(tripled)) == (6.0, 5.0)
    assert slope(tf.function(lambda x: tripled(tripled(x)))) == (18.0, 25.0)
    assert slope(tf.function(repeated)) == (54.0, 125.0)
    branch = tf.function(lambda x: tf.cond(x > 0.0, lambda: tripled(x), lambda: x))
    assert slope(branch) == (6.0, 5.0)
    inner = tf.function(tripled)
    assert slope(tf.function(lambda x: inner(inner(x)))) == (18.0, 25.0)
    concrete = tf.function(repeated).get_concrete_function(tf.TensorSpec([]))
    gc.collect()
    assert slope(concrete) == (54.0, 125.0)


def test_gradients_inside_a_function_with_a_tape_of_its_own():
    @tf.function
    def of(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = repeated(x)
        return tape.gradient(y, x)

    assert float(of(tf.constant(2.0))) == 125.0


def live():
    gc.collect()
    graphs = sum(isinstance(value, FuncGraph) for value in gc.get_objects())
    return graphs, len(ops.gradient_registry.list())


def test_a_model_that_is_gone_leaves_no_graph_behind():
    ids = np.random.default_rng(0).integers(0, 31, (4, 9))

    def train(taught):
        model = GPTModel(31, 16, 1, 2, max_sequence_length=8)
        if taught:
            model = Distiller(model, GPTModel(31, 16, 1, 2, max_sequence_length=8))
        model.compile(adamw(9, accumulate=2), NextTokenLoss())
        model.fit(ids[:, :-1], ids[:, 1:], batch_size=2, verbose=0)

    for taught in (False, True):
        train(taught)
        before = live()
        train(taught)
        assert live() == before
