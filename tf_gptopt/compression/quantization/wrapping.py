"""How tfmot wraps the layers of a GPT: which of their numbers are quantized, and by whom."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras, tfmot
from tf_gptopt.compression.quantization.activations import fake_quantize_rows
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.quantizers import (
    FloatQuantizer,
    GridQuantizer,
    HalfQuantizer,
    RowQuantizer,
    StaticQuantizer,
)
from tf_gptopt.models.layers import (
    CausalSelfAttention,
    PositionEmbedding,
    TokenEmbedding,
    TokenLogits,
)

register = keras.utils.register_keras_serializable(package="tf_gptopt")
quantization = tfmot.quantization.keras

STREAMS = (PositionEmbedding, keras.layers.Add)  # their outputs are the residual stream


@register
class LayerScheme(quantization.QuantizeConfig):
    """What a `QuantConfig` means for one layer.

    - Dense: kernel, and with static activations its input and output;
    - TokenEmbedding: the table; PositionEmbedding: its table, as `rounding.round_positions`;
    - TokenLogits: with static activations its input and output (its table is quantized already);
    - CausalSelfAttention: keys and values, as an int8 cache rounds them;
    - PositionEmbedding and Add: their output, the residual stream, with `quantize_adds`.

    Args:
        config: a `QuantConfig`, or its `to_dict()`.
        keep_zeros, learned: as in `GridQuantizer`.
    """

    def __init__(
        self, config: QuantConfig | dict[str, Any], keep_zeros: bool = False, learned: bool = False
    ) -> None:
        self.quantization = (
            config if isinstance(config, QuantConfig) else QuantConfig.from_dict(config)
        )
        self.keep_zeros, self.learned = keep_zeros, learned

    # Weights

    def get_weights_and_quantizers(self, layer: keras.layers.Layer) -> list[tuple[Any, Any]]:
        if isinstance(layer, (TokenEmbedding, PositionEmbedding)):
            return [(layer.embeddings, self._quantizer(layer, layer.embeddings, 0))]
        if isinstance(layer, keras.layers.Dense):
            weights = [(layer.kernel, self._quantizer(layer, layer.kernel, 1))]
            return weights + ([(layer.bias, FloatQuantizer())] if layer.use_bias else [])
        return []

    def _quantizer(self, layer: Any, weight: tf.Variable, channel_axis: int) -> Any:
        kind = self.quantization.weights_of(layer.name)
        if kind == "float32":
            return FloatQuantizer()
        if kind == "float16" or isinstance(layer, PositionEmbedding):
            return RowQuantizer() if kind == "int4" else HalfQuantizer()
        bits = BITS[kind]
        group = self.quantization.group_of(layer.name, weight.shape[1 - channel_axis])
        return GridQuantizer(bits, channel_axis, group, self.keep_zeros, self.learned)

    def set_quantize_weights(self, layer: keras.layers.Layer, quantize_weights: list[Any]) -> None:
        # the grid is computed in float32 under every policy, and used in the layer's own dtype
        weights = [tf.cast(weight, layer.compute_dtype) for weight in quantize_weights]
        if isinstance(layer, (TokenEmbedding, PositionEmbedding)):
            (layer.embeddings,) = weights
        elif isinstance(layer, keras.layers.Dense):
            layer.kernel = weights[0]
            layer.bias = weights[1] if layer.use_bias else None

    # Activations

    def get_range_quantizers(self, layer: keras.layers.Layer) -> dict[str, StaticQuantizer]:
        """Of `"input"` and `"output"`; tfmot itself knows outputs alone."""
        config, sides = self.quantization, ()
        if config.activations == "static":
            weights = "token_embedding" if isinstance(layer, TokenLogits) else layer.name
            if isinstance(layer, (keras.layers.Dense, TokenLogits)):
                sides = () if config.keeps_float(weights) else ("input", "output")
            elif isinstance(layer, STREAMS) and config.quantize_adds:
                sides = ("output",)
        return {side: StaticQuantizer(self.quantization.symmetric) for side in sides}

    def prepare(self, layer: keras.layers.Layer) -> None:
        """What must be there whenever the layer's parts are used, also without the wrapper."""
        if isinstance(layer, CausalSelfAttention):
            layer.round_cache = fake_quantize_rows

    def get_activations_and_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return []

    def set_quantize_activations(
        self, layer: keras.layers.Layer, quantize_activations: Any
    ) -> None:
        pass

    def get_output_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return []

    def get_config(self) -> dict[str, Any]:
        return {
            "config": self.quantization.to_dict(),
            "keep_zeros": self.keep_zeros,
            "learned": self.learned,
        }


@register
class QuantizedLayer(quantization.QuantizeWrapperV2):
    """tfmot's wrapper, which here sees float32 weights under every policy, obeys `trainable`, and
    quantizes inputs as well.

    Attributes:
        ranges: quantizer and variables of the `"input"` and the `"output"`, where they have a
            static range.
    """

    def __init__(self, layer: keras.layers.Layer, quantize_config: Any, **kwargs: Any) -> None:
        # the policy is the wrapper's alone: the layer inside keeps its own and casts its inputs
        super().__init__(layer, quantize_config, **{**kwargs, "dtype": "float32"}, autocast=False)
        quantize_config.prepare(layer)

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        # around a layer that is built already (as loading makes it) tfmot lists weights twice
        self._trainable_weights = self._dedup_weights(self._trainable_weights)
        quantizers = self.quantize_config.get_range_quantizers(self.layer)
        self.ranges = {
            side: (quantizer, quantizer.build(None, side, self))
            for side, quantizer in quantizers.items()
        }

    def call(self, inputs: Any, training: Any = None, **kwargs: Any) -> Any:
        if isinstance(self.layer, TokenLogits):  # the second is the table
            inputs = [self._rounded("input", inputs[0], training), *inputs[1:]]
        else:
            inputs = self._rounded("input", inputs, training)
        outputs = super().call(inputs, training=training, **kwargs)
        return self._rounded("output", outputs, training)

    def _rounded(self, side: str, x: Any, training: Any) -> Any:
        if side not in self.ranges:
            return x
        quantizer, state = self.ranges[side]
        return quantizer(x, training, state)

    @property
    def trainable_weights(self) -> list[Any]:
        return super().trainable_weights if self.trainable else []

    @property
    def non_trainable_weights(self) -> list[Any]:
        frozen = [] if self.trainable else super().trainable_weights
        return self._dedup_weights(frozen + super().non_trainable_weights)

    @property
    def quantized_weights(self) -> list[tuple[tf.Variable, Any, dict[str, Any]]]:
        """The trained variable, its quantizer and the quantizer's own variables, for each; the
        first is the matrix."""
        return list(self._weight_vars)


class WhatIsAnnotated(quantization.QuantizeScheme):
    """Nothing but what is annotated: tfmot's default scheme would quantize the token ids too."""

    class Layout(quantization.QuantizeLayoutTransform):
        def apply(self, model: keras.Model, layer_quantize_map: dict[str, Any]) -> Any:
            return model, layer_quantize_map

    class Registry(quantization.QuantizeRegistry):
        def supports(self, layer: keras.layers.Layer) -> bool:
            return False

        def get_quantize_config(self, layer: keras.layers.Layer) -> None:
            return None

    def get_layout_transformer(self) -> Layout:
        return self.Layout()

    def get_quantize_registry(self) -> Registry:
        return self.Registry()
