"""Copies of a model, layer by layer, with masks applied to what is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.wrapper import TfmotPruneLowMagnitude
from tf_gptopt.models.gpt import GPTModel, wrap_graph


def copy_model(model: GPTModel, layer_fn: Callable[[keras.layers.Layer], Any]) -> GPTModel:
    """Rebuild `model` from `layer_fn` of each layer, with its weights, masks applied."""
    graph = keras.models.clone_model(model, clone_function=layer_fn)
    copy = wrap_graph(graph, model.config, name=model.name)
    copy.tokenizer, copy.sampler = model.tokenizer, model.sampler
    for layer in model.layers:
        weights = masked_weights(layer)
        if weights:
            copy.base_layer(unwrap(layer).name).set_weights(weights)
    return copy


def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A new layer like this one, without the pruning wrapper if it has one."""
    base = unwrap(layer)
    return type(base).from_config(base.get_config())


def unwrap(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The layer itself, or the one that a pruning wrapper holds; other wrappers are refused."""
    if isinstance(layer, TfmotPruneLowMagnitude):
        return layer.layer
    if isinstance(layer, keras.layers.Wrapper):
        raise UserError(
            f"The layer {layer.name!r} is wrapped by {type(layer).__name__}. Take the wrappers off "
            "first: strip_quantization is the way back from quantize_aware."
        )
    return layer


def masked_weights(layer: keras.layers.Layer) -> list[np.ndarray]:
    """The layer's own weights; a wrapper's mask is applied, with +0.0 where it is zero."""
    weights = unwrap(layer).get_weights()
    if isinstance(layer, TfmotPruneLowMagnitude):
        mask = layer.pruning_vars[0][1].numpy()
        weights[0] = np.where(mask != 0, weights[0], np.zeros_like(weights[0]))
    return weights
