"""What the next gradient weighs, said by the loss and asked by the optimizer."""

from __future__ import annotations

import threading

import tensorflow as tf


class GradientWeight(threading.local):
    """The number of labels that a replica's next gradient is a mean over.

    Replicas run in threads of their own, and each has its own number. One that was said in another
    graph, by an evaluation for example, does not count.
    """

    _tokens: tf.Tensor | None = None

    def say(self, tokens: tf.Tensor) -> None:
        """Keep a float32 scalar for the gradient to come."""
        self._tokens = tokens

    def take(self) -> tf.Tensor | None:
        """What was said for this gradient, once; None if nothing was."""
        tokens, self._tokens = self._tokens, None
        if tokens is None or tf.is_symbolic_tensor(tokens) == tf.executing_eagerly():
            return None
        if tf.is_symbolic_tensor(tokens) and tokens.graph is not tf.compat.v1.get_default_graph():
            return None
        return tokens

    def __deepcopy__(self, memo: dict) -> GradientWeight:
        return GradientWeight()
