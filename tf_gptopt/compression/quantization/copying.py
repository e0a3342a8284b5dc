"""Copies of a model for quantization: layer by layer, under the right strategy and policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel, wrap_graph


def scope_of(model: GPTModel) -> contextlib.AbstractContextManager:
    """The caller's distribution strategy, or else the one that `model` was made under."""
    if tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()


def copy_layer(layer: keras.layers.Layer, **changes: Any) -> keras.layers.Layer:
    """A new layer like this one, with `changes` to its config."""
    return type(layer).from_config({**layer.get_config(), **changes})


def rebuild(
    graph: keras.Model, like: GPTModel, layer_fn: Callable[[keras.layers.Layer], Any]
) -> GPTModel:
    """`graph` from `layer_fn` of each layer, with new weights, as the `GPTModel` that `like` is."""
    model = wrap_graph(
        keras.models.clone_model(graph, clone_function=layer_fn), like.config, name=like.name
    )
    model.tokenizer, model.sampler = like.tokenizer, like.sampler
    return model


def plain_copy(model: GPTModel, dtype: str | None = None) -> GPTModel:
    """A plain model like this one with new weights, not compiled, in its own dtype policy or
    another."""
    changes = {} if dtype is None else {"dtype": dtype}
    with scope_of(model):
        return rebuild(model, model, lambda layer: copy_layer(layer, **changes))
