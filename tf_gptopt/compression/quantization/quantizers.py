"""The int8 grid, and the tfmot parts that hold a layer's weights on it while they train.

A weight `w` of a channel with scale `s` is used as `round(w / s) * s`, and its gradient passes as
if nothing had happened (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). The scale
is `max|w| / 127` of the weights as they are now, so nothing is ever clipped and no gradient is cut.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras, tfmot
from tf_gptopt.models.layers import TokenEmbedding

register = keras.utils.register_keras_serializable(package="tf_gptopt")
quantization = tfmot.quantization.keras

INT8_MAX = 127  # narrow range: -128 is not used, so that the grid is symmetric
SMALLEST_SCALE = 1e-32  # a channel that would need a smaller one becomes zero, with scale 1

# The arithmetic


def int8_scales(weights: tf.Tensor, channel_axis: int) -> tf.Tensor:
    """One scale per channel: `max|w| / 127`, of which the 17 leading bits are kept.

    127 has 7 bits, so every `q * scale` fits the 24 bits of a float32 exactly. Whoever takes
    `max|w| / 127` of weights on this grid then finds the same scale to the last bit and the same
    integers. With all 24 bits kept, one channel in 128 would come back with a neighbouring scale.

    Args:
        weights: float32, rank 2.
        channel_axis: 1 for a Dense kernel `(in, out)`, 0 for the rows of a token table.

    Returns:
        float32 `(1, channels)` or `(channels, 1)`; 1 for a channel without weights to scale.
    """
    largest = tf.reduce_max(tf.abs(weights), axis=1 - channel_axis, keepdims=True)
    bits = tf.bitcast(largest / INT8_MAX, tf.int32)
    scales = tf.bitcast(tf.bitwise.bitwise_and(bits, ~0x7F), tf.float32)
    return tf.where(scales < SMALLEST_SCALE, 1.0, scales)


def int8_fake_quantize(
    weights: tf.Tensor, channel_axis: int, mask: tf.Tensor | None = None
) -> tf.Tensor:
    """`weights` on their int8 grid, as float32; the gradient passes straight through.

    Args:
        weights: float32, rank 2.
        channel_axis: as in `int8_scales`.
        mask: bool, of the same shape: where it is False the result and the gradient are zero.
    """

    @tf.custom_gradient
    def on_grid(weights: tf.Tensor) -> Any:
        kept = weights if mask is None else tf.where(mask, weights, 0.0)
        scales = int8_scales(kept, channel_axis)

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            return upstream if mask is None else tf.where(mask, upstream, 0.0)

        # no clip: max|w| / scale exceeds 127 by less than 0.002, which rounding takes away
        return tf.round(kept / scales) * scales, gradient

    return on_grid(tf.convert_to_tensor(weights))


# What tfmot asks for


@register
class Int8Quantizer(quantization.quantizers.Quantizer):
    """Puts one weight on its int8 grid.

    Args:
        channel_axis: the axis with one scale per entry.
        keep_zeros: whether to hold a mask, so that pruned weights stay zero whatever the optimizer
            does. The mask is a bool variable beside the weight, all True until it is assigned.
    """

    def __init__(self, channel_axis: int, keep_zeros: bool = False) -> None:
        self.channel_axis = channel_axis
        self.keep_zeros = keep_zeros

    def build(self, tensor_shape: Any, name: str, layer: keras.layers.Layer) -> dict[str, Any]:
        if not self.keep_zeros:
            return {}
        mask = layer.add_weight(
            f"{name}_mask", tensor_shape, tf.bool, keras.initializers.Ones(), trainable=False
        )
        return {"mask": mask}

    def __call__(self, inputs: Any, training: Any, weights: dict[str, Any], **kwargs: Any) -> Any:
        mask = tf.convert_to_tensor(weights["mask"]) if self.keep_zeros else None
        return int8_fake_quantize(inputs, self.channel_axis, mask)

    def get_config(self) -> dict[str, Any]:
        return {"channel_axis": self.channel_axis, "keep_zeros": self.keep_zeros}


@register
class NoQuantizer(quantization.quantizers.Quantizer):
    """Leaves a weight as it is. The weight is only listed so that it is cast with the others."""

    def build(self, tensor_shape: Any, name: str, layer: keras.layers.Layer) -> dict[str, Any]:
        return {}

    def __call__(self, inputs: Any, training: Any, weights: dict[str, Any], **kwargs: Any) -> Any:
        # a tensor always: with a variable among them Keras would track it in a second place
        return tf.convert_to_tensor(inputs)

    def get_config(self) -> dict[str, Any]:
        return {}


@register
class Int8Weights(quantization.QuantizeConfig):
    """int8 weights for a Dense (per output channel) or a TokenEmbedding (per row); no activations.

    Args:
        keep_zeros: as in `Int8Quantizer`.
    """

    def __init__(self, keep_zeros: bool = False) -> None:
        self.keep_zeros = keep_zeros

    def get_weights_and_quantizers(self, layer: keras.layers.Layer) -> list[tuple[Any, Any]]:
        if isinstance(layer, TokenEmbedding):
            return [(layer.embeddings, Int8Quantizer(0, self.keep_zeros))]
        weights = [(layer.kernel, Int8Quantizer(1, self.keep_zeros))]
        return weights + ([(layer.bias, NoQuantizer())] if layer.use_bias else [])

    def set_quantize_weights(self, layer: keras.layers.Layer, quantize_weights: list[Any]) -> None:
        # the grid is computed in float32 under every policy, and used in the layer's own dtype
        weights = [tf.cast(weight, layer.compute_dtype) for weight in quantize_weights]
        if isinstance(layer, TokenEmbedding):
            (layer.embeddings,) = weights
        else:
            layer.kernel = weights[0]
            layer.bias = weights[1] if layer.use_bias else None

    def get_activations_and_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return []

    def set_quantize_activations(
        self, layer: keras.layers.Layer, quantize_activations: Any
    ) -> None:
        pass

    def get_output_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return []

    def get_config(self) -> dict[str, Any]:
        return {"keep_zeros": self.keep_zeros}


@register
class QuantizedLayer(quantization.QuantizeWrapperV2):
    """tfmot's wrapper, which here sees float32 weights under every policy and obeys `trainable`."""

    def __init__(self, layer: keras.layers.Layer, quantize_config: Any, **kwargs: Any) -> None:
        # the policy is the wrapper's alone: the layer inside keeps its own and casts its inputs
        super().__init__(layer, quantize_config, **{**kwargs, "dtype": "float32"}, autocast=False)

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        # around a layer that is built already (as loading makes it) tfmot lists weights twice
        self._trainable_weights = self._dedup_weights(self._trainable_weights)

    @property
    def trainable_weights(self) -> list[Any]:
        return super().trainable_weights if self.trainable else []

    @property
    def non_trainable_weights(self) -> list[Any]:
        frozen = [] if self.trainable else super().trainable_weights
        return self._dedup_weights(frozen + super().non_trainable_weights)

    @property
    def quantized_weights(self) -> list[tuple[tf.Variable, Any, dict[str, Any]]]:
        """The trained variable, its quantizer and the quantizer's own variables, for each."""
        return list(self._weight_vars)


class WeightsOnlyScheme(quantization.QuantizeScheme):
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
