"""Quantization-aware training: train with the weights that the int8 file will hold.

```python
aware = quantize_aware(model, QuantConfig("int8"))
aware.compile(...); aware.fit(...)
plain = strip_quantization(aware)        # weights exactly on their int8 grid
```

A `.keras` file of such a model loads wherever this module has been imported: importing it registers
the layers' classes with Keras.

Only weights are put on their grid. The file's activations are quantized as well, each row by its
own range as it comes, but training does not imitate that: on a GPT of 0.4 M parameters it added
0.0001 to the loss whether training had seen it or not, and made a step a quarter longer if so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.quantizers import (
    Int8Weights,
    QuantizedLayer,
    WeightsOnlyScheme,
    quantization,
)
from tf_gptopt.models.checkpoints import assign_weights, named_weights, weight_shapes
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.models.gpt import GPTModel, require_gpt, wrap_graph
from tf_gptopt.models.layers import TokenEmbedding


def quantize_aware(model: GPTModel, config: QuantConfig | None = None) -> GPTModel:
    """A copy of `model` that computes with int8-grid weights and trains the float ones beneath.

    Each block's LayerNorm is folded into the Dense behind it and frozen at gamma 1 and beta 0,
    because the exported file folds it and per-channel scales have to fit the folded kernel. Weights
    that are exactly zero stay zero: a pruned model keeps its sparsity. Compile the result anew.

    Args:
        model: a plain model; it is not changed.
        config: what to quantize; default `QuantConfig("int8")`.

    Raises:
        UserError: for a model that still has pruning or quantization wrappers, a scheme that
            needs no training, and `float_layers` that match no layer or every layer.
    """
    config = QuantConfig("int8") if config is None else config
    weights = fold_layer_norms(named_weights(require_gpt(model)))
    names = _names_to_quantize(model, config)

    def annotate(layer: keras.layers.Layer) -> keras.layers.Layer:
        copy = _copy_layer(layer, dtype="float32")
        if copy.name not in names:
            return copy
        weight = "embeddings" if isinstance(copy, TokenEmbedding) else "kernel"
        has_zeros = not weights[f"{copy.name}/{weight}"].all()
        return quantization.quantize_annotate_layer(copy, Int8Weights(keep_zeros=has_zeros))

    def settle(layer: keras.layers.Layer) -> keras.layers.Layer:
        # our wrapper for tfmot's, and every layer in its own dtype again
        copy = _copy_layer(model.base_layer(_base_name(layer)))
        if isinstance(copy, keras.layers.LayerNormalization) and copy.name != "final_norm":
            copy.trainable = False
        if not isinstance(layer, quantization.QuantizeWrapperV2):
            return copy
        return QuantizedLayer(copy, layer.quantize_config, name=layer.name)

    with _scope_of(model):
        with _float32_policy():  # tfmot's own wrappers fail under mixed precision
            annotated = keras.models.clone_model(model, clone_function=annotate)
            wrapped = quantization.quantize_apply(annotated, scheme=WeightsOnlyScheme())
        aware = _as_gpt(keras.models.clone_model(wrapped, clone_function=settle), model)
    for name, variable in _named_variables(aware).items():
        if name.endswith("_mask"):
            variable.assign(weights[name.removesuffix("_mask")] != 0)
        elif name in weights:
            variable.assign(weights[name])
    return aware


def strip_quantization(model: GPTModel) -> GPTModel:
    """The plain model that a QAT model computes: float32 weights, exactly on their int8 grid.

    `max|w| / 127` per channel gives every scale again to the last bit, so an int8 export stores
    what training saw. `model` is not changed.

    Raises:
        UserError: when `model` does not come from `quantize_aware`.
    """
    if not is_quantization_aware(model):
        raise UserError(
            "The model has no quantization to strip: it does not come from quantize_aware, or "
            "was stripped before. Export or save it as it is."
        )
    with _scope_of(model):
        plain = _as_gpt(keras.models.clone_model(model, clone_function=_unwrap), model)
    trained = {name: variable.numpy() for name, variable in _named_variables(model).items()}
    # nothing to fold, unless somebody made the frozen norms trainable
    weights = fold_layer_norms({name: trained[name] for name in weight_shapes(model.config)})
    for layer in model.layers:
        if not isinstance(layer, QuantizedLayer):
            continue
        for variable, quantizer, state in layer.quantized_weights:
            name = f"{layer.layer.name}/{_last_name(variable)}"
            weights[name] = np.array(quantizer(weights[name], False, weights=state))
    assign_weights(plain, weights)
    return plain


def is_quantization_aware(model: Any) -> bool:
    """Whether `model` is a `GPTModel` that `quantize_aware` made and nobody stripped."""
    return any(isinstance(layer, QuantizedLayer) for layer in require_gpt(model).layers)


def _names_to_quantize(model: GPTModel, config: QuantConfig) -> set[str]:
    if config.weights != "int8":
        raise UserError(
            f"The weights {config.weights!r} need no quantization-aware training. "
            f"Expected: 'int8'. Export the model with QuantConfig({config.weights!r}) as it is."
        )
    names = {
        layer.name
        for layer in model.layers
        if isinstance(layer, (keras.layers.Dense, TokenEmbedding))
    }
    chosen = config.layers_to_quantize(names)
    if not chosen:
        raise UserError(
            f"float_layers={config.float_layers} keeps every layer float: nothing is left to "
            "quantize. Name fewer layers, or export with QuantConfig('float32')."
        )
    return chosen


def _scope_of(model: GPTModel) -> contextlib.AbstractContextManager:
    """The caller's distribution strategy, or else the one that `model` was made under."""
    if tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()


@contextlib.contextmanager
def _float32_policy() -> Iterator[None]:
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("float32")
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


def _as_gpt(functional: keras.Model, like: GPTModel) -> GPTModel:
    model = wrap_graph(functional, like.config, name=like.name)
    model.tokenizer, model.sampler = like.tokenizer, like.sampler
    return model


def _copy_layer(layer: keras.layers.Layer, **changes: Any) -> keras.layers.Layer:
    return type(layer).from_config({**layer.get_config(), **changes})


def _unwrap(layer: keras.layers.Layer) -> keras.layers.Layer:
    copy = _copy_layer(getattr(layer, "layer", layer))
    if isinstance(copy, keras.layers.LayerNormalization):
        copy.trainable = True  # quantize_aware froze it
    return copy


def _base_name(layer: keras.layers.Layer) -> str:
    return getattr(layer, "layer", layer).name


def _named_variables(model: GPTModel) -> dict[str, tf.Variable]:
    """`"block_0_qkv/kernel"` -> the variable, wrapped or not; `"block_0_qkv/kernel_mask"` too."""
    return {
        f"{_base_name(layer)}/{_last_name(variable)}": variable
        for layer in model.layers
        for variable in layer.weights
    }


def _last_name(variable: tf.Variable) -> str:
    return variable.name.rpartition("/")[2].partition(":")[0]
