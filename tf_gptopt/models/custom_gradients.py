"""Gradients of one's own that go with the graph that they were made in.

`tf.custom_gradient` writes each one that it traces into a registry of TensorFlow's, for ever, and
with it the tensors that it closes over and so their graph: some 8 MB for each new model's `fit`.
Here the graph keeps its gradients, and the registry finds them for as long as the graph is there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops

_ENTRIES: dict[str, dict[str, Any]] = ops.gradient_registry._registry
_KEPT = "_tf_gptopt_gradients"  # where a graph keeps its own


def custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """`tf.custom_gradient`, without the registry that keeps every graph."""
    with_gradient = tf.custom_gradient(function)

    @tf.autograph.experimental.do_not_convert
    @functools.wraps(function)
    def of_a_graph(*args: Any) -> Any:
        results = with_gradient(*args)
        if not tf.executing_eagerly():
            _leave_to(tf.compat.v1.get_default_graph())
        return results

    return of_a_graph


def _leave_to(graph: Any) -> None:
    """Hand the gradient that was registered last to `graph`."""
    name = next(reversed(_ENTRIES))
    gradient = _ENTRIES[name]["type"]
    if not hasattr(graph, _KEPT):
        setattr(graph, _KEPT, [])
    getattr(graph, _KEPT).append(gradient)
    known = weakref.ref(gradient, lambda _: _ENTRIES.pop(name, None))
    _ENTRIES[name]["type"] = lambda op, *upstream: known()(op, *upstream)
