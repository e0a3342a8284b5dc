"""What a QAT model knows of itself: its bits, its ranges, and the config that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.quantizers import GridQuantizer
from tf_gptopt.compression.quantization.ranges import (
    Ranges,
    choose_ranges,
    observe_activations,
)
from tf_gptopt.compression.quantization.wrapping import QuantizedLayer
from tf_gptopt.models.gpt import GPTModel, require_gpt

# Bits


def final_config(aware: GPTModel) -> QuantConfig:
    """The `QuantConfig` to export a QAT model with: what it was made with, and for layers whose
    bits have changed since (`BitSchedule`, `AdaptiveBits`) the bits of now.

    Raises:
        UserError: for a model that is not quantization-aware.
    """
    config, changed = first_config(aware), {}
    for layer in quantized_layers(aware):
        name = layer.layer.name
        bits = layer_bits([layer])[name]
        if BITS[config.weights_of(name)] != bits:
            group = layer.quantized_weights[0][1].layout.group_at(bits)
            changed[name] = f"int{bits}:{'tensor' if group == 'global' else group}"
    rest = {pattern: kind for pattern, kind in config.layers.items() if pattern not in changed}
    return dataclasses.replace(config, layers={**changed, **rest})


def first_config(aware: GPTModel) -> QuantConfig:
    """What `quantize_aware` was given."""
    for layer in require_gpt(aware).layers:
        if isinstance(layer, QuantizedLayer):
            return layer.quantize_config.quantization
    raise UserError(
        "The model is not quantization-aware, or was stripped before. Make one with "
        "quantize_aware(model)."
    )


def quantized_layers(aware: GPTModel) -> list[QuantizedLayer]:
    """The wrappers of a QAT model that hold weights on a grid, in its order."""
    wrappers = [layer for layer in aware.layers if isinstance(layer, QuantizedLayer)]
    return [
        layer
        for layer in wrappers
        if any(isinstance(q, GridQuantizer) for _, q, _ in layer.quantized_weights)
    ]


def layer_bits(layers: Iterable[QuantizedLayer]) -> dict[str, int]:
    """The bits of quantized weights, now, by the names of their layers."""
    return {
        layer.layer.name: int(layer.quantized_weights[0][2]["bits"].numpy()) for layer in layers
    }


def set_bits(
    layer: QuantizedLayer,
    bits: int,
    range: str | None = None,
    peaks: dict[int, float] | None = None,
) -> None:
    """Let the weights of a layer have so many bits from now on, and find their range.

    Args:
        layer: one of `quantized_layers`.
        bits: 8 or 4.
        range: `"minmax"`, `"percentile"` or `"mse"`; None takes the config's.
        peaks: `shared_peaks`, for granularity "global"; without them each layer has its own.
    """
    weight, quantizer, state = layer.quantized_weights[0]
    config = layer.quantize_config.quantization
    peak = (peaks or {}).get(bits) if quantizer.layout.group == "global" else None
    quantizer.start(weight, state, bits, range or config.range, config.percentile, peak)


# Ranges of static activations


def activation_ranges(aware: GPTModel) -> Ranges | None:
    """As `GPTModel.activation_ranges`; None where activations are not static.

    Raises:
        UserError: where neither a batch nor calibration has set one.
    """
    ranges = {}
    for name, state in _range_states(aware).items():
        known = state["range"].numpy()
        if not known[0] < known[1]:
            raise UserError(
                f"The activations {name!r} have no range yet. Train the model for a few steps, or "
                "give quantize_aware calibration text."
            )
        low, high = (known * state["clip"].numpy()).tolist()
        ranges[name] = low, high
    return ranges or None


def calibrate(aware: GPTModel, plain: GPTModel, config: QuantConfig, token_ids: np.ndarray) -> None:
    """Set the ranges of a QAT model to those of what it computes, `plain`, on some text."""
    seen = observe_activations(plain, config, token_ids)
    # training can follow extremes alone: other ranges are a share of them
    whole = choose_ranges(seen, dataclasses.replace(config, range="minmax"))
    set_ranges(aware, choose_ranges(seen, config), whole)


def set_ranges(aware: GPTModel, used: Ranges, whole: Ranges | None = None) -> None:
    """Begin with the ranges `used`, as shares of `whole`, which training follows; default all."""
    for name, state in _range_states(aware).items():
        if name in used:
            extremes, ones = np.float32((whole or used)[name]), np.ones(2, np.float32)
            state["range"].assign(extremes)
            state["clip"].assign(np.divide(used[name], extremes, out=ones, where=extremes != 0))


def _range_states(aware: GPTModel) -> dict[str, dict[str, tf.Variable]]:
    return {
        f"{layer.layer.name}/{side}": state
        for layer in aware.layers
        if isinstance(layer, QuantizedLayer)
        for side, (_, state) in layer.ranges.items()
    }
