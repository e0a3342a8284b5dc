"""tfmot's quantizers for a GPT: weights on their grid, activations in fixed ranges.

All that they remember lies in variables of the layer's wrapper: bits and ranges can change while a
model trains, nothing is traced again, and checkpoints hold them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._keras import keras, tfmot
from tf_gptopt.compression.quantization.activations import (
    batch_range,
    fake_quantize_static,
    follow,
)
from tf_gptopt.compression.quantization.fake_quantize import Layout, fake_quantize, start_ranges
from tf_gptopt.models.custom_gradients import custom_gradient

register = keras.utils.register_keras_serializable(package="tf_gptopt")
Quantizer = tfmot.quantization.keras.quantizers.Quantizer
State = dict[str, tf.Variable]


@register
class GridQuantizer(Quantizer):
    """Puts one weight on its grid.

    Variables: `bits`; `clip`, the scales relative to their reach, trained with learned ranges;
    `reach`, where it does not follow the weights; and `mask`, where zeros are kept.

    Args:
        bits: at the start, 8 or 4.
        channel_axis, group: see `Layout`.
        keep_zeros: whether to hold a mask, so that pruned weights stay zero whatever the optimizer
            does: a bool variable, all True until it is assigned.
        learned: whether scales are trained (LSQ).
    """

    def __init__(
        self,
        bits: int,
        channel_axis: int,
        group: str | int,
        keep_zeros: bool = False,
        learned: bool = False,
    ) -> None:
        self.bits, self.keep_zeros, self.learned = bits, keep_zeros, learned
        self.layout = Layout(channel_axis, group)
        self.fixed_reach = learned or group == "global"

    def build(self, tensor_shape: Any, name: str, layer: keras.layers.Layer) -> State:
        groups = int(np.prod(self.layout.groups(tensor_shape)))

        def add(what: str, shape: Any, value: float, dtype: Any, trainable: bool = False) -> Any:
            start = keras.initializers.Constant(value)
            return layer.add_weight(f"{name}_{what}", shape, dtype, start, trainable=trainable)

        state = {
            "bits": add("bits", (), self.bits, tf.float32),
            # one axis: optimizers that decay matrices let it be
            "clip": add("clip", (groups,), 1.0, tf.float32, trainable=self.learned),
        }
        if self.fixed_reach:
            state["reach"] = add("reach", (groups,), 1.0, tf.float32)
        if self.keep_zeros:
            state["mask"] = add("mask", tensor_shape, True, tf.bool)
        return state

    def __call__(self, inputs: Any, training: Any, weights: State, **kwargs: Any) -> tf.Tensor:
        mask = weights.get("mask")
        return fake_quantize(
            inputs,
            tf.convert_to_tensor(weights["bits"]),
            weights["clip"],
            self.layout,
            tf.convert_to_tensor(weights["reach"]) if self.fixed_reach else None,
            mask if mask is None else tf.convert_to_tensor(mask),
        )

    def start(self, weight: tf.Variable, state: State, bits: int, *ranges: Any) -> None:
        """Begin with so many bits at the range that `start_ranges(..., *ranges)` finds."""
        values = weight.numpy()
        if "mask" in state:
            values = np.where(state["mask"].numpy(), values, np.float32(0))
        clip, reach = start_ranges(values, bits, self.layout, *ranges)
        state["bits"].assign(bits)
        if self.fixed_reach:
            state["reach"].assign(reach)
            clip = np.ones_like(clip)
        state["clip"].assign(clip)

    def get_config(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "channel_axis": self.layout.channel_axis,
            "group": self.layout.group,
            "keep_zeros": self.keep_zeros,
            "learned": self.learned,
        }


@register
class FloatQuantizer(Quantizer):
    """Leaves a weight as it is. The weight is only listed so that it is cast with the others."""

    def build(self, tensor_shape: Any, name: str, layer: keras.layers.Layer) -> State:
        return {}

    def __call__(self, inputs: Any, training: Any, weights: State, **kwargs: Any) -> tf.Tensor:
        # a tensor always: with a variable among them Keras would track it in a second place
        return tf.convert_to_tensor(inputs)

    def get_config(self) -> dict[str, Any]:
        return {}


@register
class HalfQuantizer(FloatQuantizer):
    """Rounds a weight to float16, which is how the file holds it."""

    def __call__(self, inputs: Any, training: Any, weights: State, **kwargs: Any) -> tf.Tensor:
        @custom_gradient
        def rounded(x: tf.Tensor) -> Any:
            return tf.cast(tf.cast(x, tf.float16), tf.float32), lambda upstream: upstream

        return rounded(tf.convert_to_tensor(inputs))


@register
class RowQuantizer(FloatQuantizer):
    """Puts the position table on int8, a scale for each position, whatever other weights do."""

    def build(self, tensor_shape: Any, name: str, layer: keras.layers.Layer) -> State:
        bits = keras.initializers.Constant(8)
        return {"bits": layer.add_weight(f"{name}_bits", (), tf.float32, bits, trainable=False)}

    def __call__(self, inputs: Any, training: Any, weights: State, **kwargs: Any) -> tf.Tensor:
        inputs, bits = map(tf.convert_to_tensor, (inputs, weights["bits"]))
        return fake_quantize(inputs, bits, tf.ones(inputs.shape[0]), Layout(0, "channel"))


@register
class StaticQuantizer(Quantizer):
    """Rounds activations to int8 in a range that follows those seen in training.

    The range is the moving average of each batch's smallest and largest number, which begins with
    the first batch's, or where calibration put it. `clip` is how much of it is used: 1 for a range
    by min-max, less where calibration found a narrower one to be better. A range that was never
    set is each batch's own.

    Under a distribution strategy each replica follows its own part of the batch; what is read, and
    saved, is their mean.

    Args:
        symmetric: whether zero lies in the middle.
    """

    def __init__(self, symmetric: bool = False) -> None:
        self.symmetric = symmetric

    def build(self, tensor_shape: Any, name: str, layer: keras.layers.Layer) -> State:
        def add(what: str, value: float) -> tf.Variable:
            return layer.add_weight(
                f"{name}_{what}",
                (2,),
                tf.float32,
                keras.initializers.Constant(value),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.MEAN,
            )

        return {"range": add("range", 0.0), "clip": add("clip", 1.0)}

    def __call__(self, inputs: Any, training: Any, weights: State, **kwargs: Any) -> tf.Tensor:
        known = tf.convert_to_tensor(weights["range"])
        if training is True:
            known = follow(known, batch_range(inputs))
            weights["range"].assign(known)
        else:
            known = tf.cond(is_set(known), lambda: known, lambda: batch_range(inputs))
        return fake_quantize_static(inputs, known * weights["clip"], self.symmetric)

    def get_config(self) -> dict[str, Any]:
        return {"symmetric": self.symmetric}


def is_set(known: tf.Tensor) -> tf.Tensor:
    """Whether a range has been seen, or calibrated."""
    return known[1] > known[0]
