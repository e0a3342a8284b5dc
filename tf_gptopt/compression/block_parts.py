"""Compiled pieces of a GPT that calibration runs one at a time.

A piece begins at the residual stream in front of a block and ends at the inputs of Dense layers, or
behind the block. Pieces share the model's variables, so they compute with the weights of now.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel

HEAD = "token_logits"

Part = Callable[[Any], list[tf.Tensor]]

# Made once for a model: who measures every hundred steps shall not trace the same graphs again
_PARTS: weakref.WeakKeyDictionary[GPTModel, dict[Any, Part]] = weakref.WeakKeyDictionary()


def front_part(model: GPTModel) -> Part:
    """Token ids -> the residual stream in front of block 0."""
    parts = _PARTS.setdefault(model, {})
    if "front" not in parts:
        parts["front"] = _compiled(keras.Model(model.inputs[0], _stream(model, 0)))
    return parts["front"]


def block_part(model: GPTModel, index: int, names: Sequence[str], end: bool = False) -> Part:
    """The residual stream in front of block `index` -> the inputs of the layers `names`, as
    float32 rows, and the stream behind the block where `end`; it computes nothing else."""
    parts, key = _PARTS.setdefault(model, {}), (index, *names, end)
    if key not in parts:
        inputs = [model.base_layer(name).input for name in names]
        inputs = [x[0] if isinstance(x, (list, tuple)) else x for x in inputs]  # tied: [x, table]
        ends = [_stream(model, index + 1)] if end else []
        start = _stream(model, index)
        # Keras cannot cut a graph out whose output is its input
        outputs = [tf.identity(x) if x is start else x for x in inputs + ends]
        part = keras.Model(start, outputs)
        parts[key] = _compiled(part, len(names))
    return parts[key]


def _compiled(part: keras.Model, rows: int = 0) -> Part:
    """`part` as a graph, which takes a third less time, its first `rows` outputs as rows."""

    def run(x: tf.Tensor) -> list[tf.Tensor]:
        outputs = tf.nest.flatten(part(x, training=False))  # Keras unpacks a list of one
        seen = [tf.cast(tf.reshape(y, [-1, y.shape[-1]]), tf.float32) for y in outputs[:rows]]
        return seen + outputs[rows:]

    anything = tf.TensorSpec(part.inputs[0].shape, part.inputs[0].dtype)
    return tf.function(run, autograph=False).get_concrete_function(anything)


def _stream(model: GPTModel, index: int) -> Any:
    """The residual stream in front of block `index`, as the model's own symbolic tensor."""
    last = index == model.config.num_layers
    return model.base_layer("final_norm" if last else f"block_{index}_attention_norm").input


def dense_names(model: GPTModel, index: int) -> tuple[str, ...]:
    """Names of the Dense layers of block `index` without wrappers; the head's after the last."""
    if index == model.config.num_layers:
        return (HEAD,)
    bases = [getattr(layer, "layer", layer) for layer in model.layers]
    return tuple(
        base.name
        for base in bases
        if isinstance(base, keras.layers.Dense) and base.name.startswith(f"block_{index}_")
    )


def norm_names(model: GPTModel, index: int) -> tuple[str, ...]:
    """Names of the LayerNorms that read the residual stream in block `index`, or the head."""
    if index == model.config.num_layers:
        return ("final_norm",)
    return f"block_{index}_attention_norm", f"block_{index}_mlp_norm"


def stream_dtype(model: GPTModel) -> Any:
    """NumPy's dtype of the residual stream: the model's compute dtype."""
    return tf.as_dtype(_stream(model, 0).dtype).as_numpy_dtype
