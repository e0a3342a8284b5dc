"""Quantization-aware training: train with the numbers that the file will hold.

```python
aware = quantize_aware(model, QuantConfig("int4"))
aware.compile(...); aware.fit(...)
plain = strip_quantization(aware)        # weights exactly on their grid
export_tflite(plain, "model.tflite", final_config(aware))
```

A `.keras` file of such a model loads wherever this module has been imported: importing it registers
the layers' classes with Keras.

With dynamic activations weights alone are put on their grid. The file's activations are quantized
as well, each row by its own range as it comes, but training does not imitate that: on a GPT of
0.4 M parameters it added 0.0001 to the loss whether training had seen it or not, and made a step a
quarter longer if so. Static activations and an int8 cache are imitated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.calibration_text import calibration_ids, check_ids
from tf_gptopt.compression.quantization.aware_state import (
    activation_ranges,
    calibrate,
    first_config,
    quantized_layers,
    set_bits,
    set_ranges,
)
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.copying import (
    copy_layer,
    plain_copy,
    rebuild,
    scope_of,
)
from tf_gptopt.compression.quantization.rounding import (
    is_rounded,
    quantizable_layers,
    shared_peaks,
)
from tf_gptopt.compression.quantization.smoothing import smooth
from tf_gptopt.compression.quantization.wrapping import (
    STREAMS,
    LayerScheme,
    QuantizedLayer,
    WhatIsAnnotated,
    quantization,
)
from tf_gptopt.models.checkpoints import assign_weights, named_weights, weight_shapes
from tf_gptopt.models.finite import check_finite
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.models.gpt import GPTModel, require_gpt
from tf_gptopt.models.layers import (
    CausalSelfAttention,
    PositionEmbedding,
    TokenEmbedding,
    TokenLogits,
)
from tf_gptopt.models.policies import policy_scope


def quantize_aware(
    model: GPTModel,
    config: QuantConfig | None = None,
    *,
    calibration: Any = None,
    learned_ranges: bool = False,
) -> GPTModel:
    """A copy of `model` that computes with quantized numbers and trains the float ones beneath.

    Each block's LayerNorm is folded into the Dense behind it and frozen at gamma 1 and beta 0 (or
    where smoothing puts them), because the exported file folds it and scales have to fit the folded
    kernel. Weights that are exactly zero stay zero: a pruned model keeps its sparsity. Weights that
    lie on such a grid already, as GPTQ leaves them, begin on that grid. Compile the result anew.

    Ranges of weights: min-max follows the largest weights. A percentile and the least squared error
    are found at the start, as fractions of the largest weights, which are then followed; a global
    range stays where it starts. Ranges of static activations: a moving average of each batch's
    smallest and largest number; calibration says where it begins, and for a percentile or the least
    squared error which fraction of it is used.

    Args:
        model: a plain model; it is not changed.
        config: what to quantize; default `QuantConfig("int8")`. `rounding` and `bias_correction`
            are for quantization after training, and do nothing here.
        calibration: text for the ranges of static activations: anything that `calibration_ids`
            takes. With it the result needs no training step. Without it ranges begin as
            `model.activation_ranges` says, which `quantize` sets, or else with the first batch.
        learned_ranges: whether the scales of weights are trained as well (LSQ, Esser et al. 2019,
            arXiv:1902.08153), from the config's range on.

    Raises:
        UserError: for a model that still has pruning or quantization wrappers, a scheme that
            needs no training, patterns that match no layer, `float_layers` that match all of them,
            and smoothing without calibration.
    """
    config = QuantConfig() if config is None else config
    weights = named_weights(require_gpt(model))
    check_finite(weights)
    names = _names_to_quantize(weights, config)
    config = config.for_model(model.config)
    if learned_ranges and any(config.group_of(name) == "global" for name in names):
        raise UserError(
            "A range that all of the model shares is not learned. Received: learned_ranges=True "
            'with granularity="global". Take "tensor", "channel" or a block.'
        )
    if calibration is not None:
        calibration = check_ids(model, calibration_ids(calibration))
    if config.smoothing:
        weights = _smoothed(model, weights, config, calibration)
    else:
        weights = fold_layer_norms(weights)

    def scheme_of(layer: keras.layers.Layer) -> LayerScheme | None:
        if layer.name in names:
            has_zeros = not weights[quantizable_layers(weights)[layer.name]].all()
            return LayerScheme(config, has_zeros, learned_ranges)
        is_tied = isinstance(layer, TokenLogits) and "token_embedding" in names
        has_matrix = isinstance(layer, (keras.layers.Dense, TokenEmbedding, PositionEmbedding))
        is_quantized = (
            (has_matrix and config.weights_of(layer.name) != "float32")  # float16
            or (is_tied and config.activations == "static")
            or (isinstance(layer, CausalSelfAttention) and config.kv_cache == "int8")
            or (isinstance(layer, STREAMS) and config.quantize_adds)
        )
        return LayerScheme(config) if is_quantized else None

    def annotate(layer: keras.layers.Layer) -> keras.layers.Layer:
        copy, scheme = copy_layer(layer, dtype="float32"), scheme_of(layer)
        return quantization.quantize_annotate_layer(copy, scheme) if scheme else copy

    def settle(layer: keras.layers.Layer) -> keras.layers.Layer:
        # our wrapper for tfmot's, and every layer in its own dtype again
        copy = copy_layer(model.base_layer(_base_name(layer)))
        if isinstance(copy, keras.layers.LayerNormalization) and copy.name != "final_norm":
            copy.trainable = False
        if not isinstance(layer, quantization.QuantizeWrapperV2):
            return copy
        return QuantizedLayer(copy, layer.quantize_config, name=layer.name)

    with scope_of(model):
        with policy_scope("float32"):  # tfmot's own wrappers fail under mixed precision
            annotated = keras.models.clone_model(model, clone_function=annotate)
            wrapped = quantization.quantize_apply(annotated, scheme=WhatIsAnnotated())
        aware = rebuild(wrapped, model, settle)
    for name, variable in _named_variables(aware).items():
        if name.endswith("_mask"):
            variable.assign(weights[name.removesuffix("_mask")] != 0)
        elif name in weights:
            variable.assign(weights[name])
    peaks = shared_peaks(weights, config)
    for layer in quantized_layers(aware):
        set_bits(layer, BITS[config.weights_of(layer.layer.name)], peaks=peaks)
    if config.activations == "static":
        if calibration is not None:
            calibrate(aware, _strip(aware), config, calibration)
        elif model.activation_ranges:
            set_ranges(aware, model.activation_ranges)
    return aware


def strip_quantization(model: GPTModel) -> GPTModel:
    """The plain model that a QAT model computes: float32 weights, exactly on their grid.

    Every scale can be found again from the weights to the last bit (`grids.find_grid`), so an
    export stores what training saw. Ranges of static activations become `activation_ranges`. An
    int8 cache is the file's: the plain model has a float one. `model` is not changed.

    Raises:
        UserError: when `model` does not come from `quantize_aware`, or has static activations whose
            ranges no batch and no calibration has set.
    """
    if not is_quantization_aware(model):
        raise UserError(
            "The model has no quantization to strip: it does not come from quantize_aware, or "
            "was stripped before. Export or save it as it is."
        )
    plain = _strip(model)
    plain.activation_ranges = activation_ranges(model)
    return plain


def _strip(model: GPTModel) -> GPTModel:
    with scope_of(model):
        plain = rebuild(model, model, _unwrap)
    trained = {name: variable.numpy() for name, variable in _named_variables(model).items()}
    weights = {name: trained[name] for name in weight_shapes(model.config)}
    if not first_config(model).smoothing:
        # nothing to fold, unless somebody made the frozen norms trainable
        weights = fold_layer_norms(weights)
    for layer in model.layers:
        for variable, quantizer, state in getattr(layer, "quantized_weights", ()):
            name = f"{layer.layer.name}/{_last_name(variable)}"
            weights[name] = np.array(quantizer(weights[name], False, weights=state))
    assign_weights(plain, weights)
    return plain


def is_quantization_aware(model: Any) -> bool:
    """Whether `model` is a `GPTModel` that `quantize_aware` made and nobody stripped."""
    return any(isinstance(layer, QuantizedLayer) for layer in require_gpt(model).layers)


def _smoothed(
    model: GPTModel, weights: dict[str, np.ndarray], config: QuantConfig, token_ids: Any
) -> dict[str, np.ndarray]:
    """SmoothQuant's weights of the folded model; its norms then have gammas of their own."""
    if is_rounded(weights, config):
        return weights  # smoothed and rounded already: folding would take both back
    if token_ids is None:
        raise UserError(
            "smoothing measures activations. Received: no calibration text. Give "
            "quantize_aware(model, config, calibration=...), or take smoothing=0."
        )

    smoothed = plain_copy(model, "float32")
    assign_weights(smoothed, fold_layer_norms(weights))
    smooth(smoothed, config, token_ids)
    return named_weights(smoothed)


def _names_to_quantize(weights: dict[str, np.ndarray], config: QuantConfig) -> set[str]:
    chosen = config.layers_to_quantize(quantizable_layers(weights))
    if chosen or config.kv_cache == "int8":
        return chosen
    if config.float_layers:
        raise UserError(
            f"float_layers={config.float_layers} keeps every layer float: nothing is left to "
            "quantize. Name fewer layers, or export with QuantConfig('float32')."
        )
    raise UserError(
        f"The weights {config.weights!r} need no quantization-aware training. "
        f"Expected: 'int8' or 'int4'. Export the model with QuantConfig({config.weights!r}) as it "
        "is."
    )


def _unwrap(layer: keras.layers.Layer) -> keras.layers.Layer:
    copy = copy_layer(getattr(layer, "layer", layer))
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
