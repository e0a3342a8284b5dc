"""Computing on named devices, with gradients that are computed where the values were.

Three operations make up a tensor-parallel model:

- `on(device, function, *inputs)`: compute there;
- `broadcast(value, home, count)`: one value for many readers; its gradient is their sum, at home;
- `all_reduce(values, devices)`: the sum of all values, on every device; its gradient is another.

`beside_inputs()` is for code that knows nothing of devices, an optimizer's.

TensorFlow places an operation of the backward pass wherever it likes, most often on the first
device, unless told otherwise. Here each operation carries its own gradient, which names its device.
What is left to the caller's tape is adding up the gradients of a tensor that several others read,
and that would happen on the first device again. So give every tensor one reader: `broadcast` it, or
pass it through.

Copies from one device to another are TensorFlow's own sends and receives inside one graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tf_gptopt.models.custom_gradients import custom_gradient


def on(device: str, function: Callable[..., Any], *inputs: tf.Tensor) -> Any:
    """`function(*inputs)` on `device`, and its gradient there too.

    Args:
        device: name of a device.
        function: from float tensors to one, or to a tuple of them. What it needs beside them
            (integers, random seeds) it takes from its closure, and gets no gradient.
        inputs: tensors, on whichever device.
    """

    @custom_gradient
    def run(*inputs: tf.Tensor) -> tuple[Any, Callable]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
        many = isinstance(outputs, tuple)

        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
            with tf.device(device):
                slopes = tape.gradient(
                    list(outputs) if many else outputs,
                    list(inputs),
                    list(upstream) if many else upstream[0],
                    tf.UnconnectedGradients.ZERO,
                )
                return [tf.convert_to_tensor(slope) for slope in slopes]  # a gather's are sparse

        return outputs, gradient

    with tf.device(device):
        return run(*inputs)


def on_each(devices: Sequence[str], functions: Sequence[Callable], *inputs: Sequence) -> Any:
    """On every device its function with its inputs; `inputs` are lists with one item per device.

    Returns a list with one result per device, or a tuple of such lists for functions that return
    tuples.
    """
    calls = zip(devices, functions, *inputs, strict=True)
    results = [on(device, function, *given) for device, function, *given in calls]
    if isinstance(results[0], tuple):
        return tuple(map(list, zip(*results, strict=True)))
    return results


def broadcast(value: tf.Tensor, home: str, count: int) -> list[tf.Tensor]:
    """`value` for `count` readers; each gets it to its own device by reading it there."""
    if count == 1:
        return [value]

    @custom_gradient
    def run(value: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Callable]:
        def gradient(*upstream: tf.Tensor) -> tf.Tensor:
            with tf.device(home):
                return tf.add_n(upstream)

        return (value,) * count, gradient

    with tf.device(home):
        return list(run(value))


def all_reduce(values: Sequence[tf.Tensor], devices: Sequence[str]) -> list[tf.Tensor]:
    """The sum of `values`, of which each device has one, on every device."""
    if len(devices) == 1:
        return list(values)
    copies = [
        broadcast(value, device, len(devices))
        for value, device in zip(values, devices, strict=True)
    ]
    readers = zip(devices, *copies, strict=True)
    return [on(device, _add, *terms) for device, *terms in readers]


def _add(*terms: tf.Tensor) -> tf.Tensor:
    return tf.add_n(terms)


@contextlib.contextmanager
def beside_inputs() -> Iterator[None]:
    """Inside the block an operation that names no device runs where its first input that has one
    lies: what an optimizer does to a gradient (norms, clipping, accumulation) stays beside it.

    For code that is being traced into a graph; eagerly it changes nothing.
    """
    if tf.executing_eagerly():
        yield
        return
    with tf.compat.v1.device(lambda op: op.device or _first_device(op.inputs)):
        yield


def _first_device(tensors: Sequence[tf.Tensor]) -> str:
    return next(filter(None, map(_device_of, tensors)), "")


def _device_of(tensor: tf.Tensor) -> str:
    if tensor.device or tensor.op.type != "Placeholder":
        return tensor.device
    captures = getattr(tensor.graph, "captures", ())  # of a branch of tf.cond, from around it
    return next((_device_of(outer) for outer, inner in captures if inner is tensor), "")
