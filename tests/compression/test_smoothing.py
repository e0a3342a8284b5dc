"""SmoothQuant keeps the function and evens out channels; ranges are what was seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.grids import activation_scale
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.compression.quantization.ranges import Histogram, calibrate_ranges
from tf_gptopt.compression.quantization.smoothing import smooth
from tf_gptopt.models.checkpoints import assign_weights, named_weights
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.models.gpt import GPTModel

IDS = np.random.default_rng(1).integers(0, 61, (9, 14))
STATIC = QuantConfig(activations="static", smoothing=0.5)


@pytest.fixture
def spiky_model(tiny_model: Callable[..., GPTModel]) -> Callable[..., GPTModel]:
    """A model, its LayerNorms folded, of which a few channels are far larger than the rest."""

    def build(**shape: Any) -> GPTModel:
        model = tiny_model(**shape)
        weights = named_weights(model)
        for name in weights:
            if name.endswith("gamma"):
                weights[name][::7] *= 30
        weights["block_0_qkv/kernel"][:, -5] *= 40
        if "token_logits/kernel" in weights:
            weights["final_norm/gamma"][3] = 50
        assign_weights(model, fold_layer_norms(weights))
        return model

    return build


# Smoothing


@pytest.mark.parametrize(("tied", "alpha"), [(True, 0.5), (False, 0.3), (False, 1.0)])
def test_the_function_stays(spiky_model: Any, tied: bool, alpha: float) -> None:
    model = spiky_model(tie_embeddings=tied, num_heads=(3, 1), intermediate_dim=(40, 9), head_dim=8)
    before, weights = model(IDS).numpy(), named_weights(model)
    smooth(model, QuantConfig(activations="static", smoothing=alpha), IDS)
    np.testing.assert_allclose(model(IDS).numpy(), before, atol=2e-5 * np.abs(before).max())
    after = named_weights(model)
    changed = {name for name in after if (after[name] != weights[name]).any()}
    expected = {f"block_{i}_{name}_norm/gamma" for i in (0, 1) for name in ("attention", "mlp")}
    expected |= {f"block_{i}_{name}/kernel" for i in (0, 1) for name in ("qkv", "proj", "fc")}
    expected |= {f"block_{i}_qkv/bias" for i in (0, 1)}
    if not tied:
        expected |= {"final_norm/gamma", "final_norm/beta", "token_logits/kernel"}
    assert changed == expected


def test_with_alpha_one_all_channels_reach_equally_far(spiky_model: Any) -> None:
    model = spiky_model(tie_embeddings=False)
    smooth(model, QuantConfig(activations="static", smoothing=1.0), IDS)
    for name in ("block_0_qkv", "block_1_proj", "block_1_fc", "token_logits"):
        most = np.abs(inputs_of(model, name)).max((0, 1))
        np.testing.assert_allclose(most, 1.0, rtol=1e-4)


def test_channels_come_nearer_to_each_other(spiky_model: Any) -> None:
    model = spiky_model()

    def spread(name: str) -> float:
        most = np.abs(inputs_of(model, name)).max((0, 1))
        return most.max() / np.median(most)

    before = spread("block_0_proj")
    smooth(model, STATIC, IDS)
    assert spread("block_0_proj") < 0.5 * before


def test_zeros_and_what_stays_float_are_left_alone(spiky_model: Any) -> None:
    model = spiky_model()
    weights = named_weights(model)
    weights["block_0_fc/kernel"][5] = 0  # an input that nobody reads
    weights["block_1_qkv/kernel"][:, 2:9] = 0
    weights["block_1_qkv/bias"][-3:] = 0
    weights["block_1_qkv/kernel"][:, -3:] = 0  # values that are always zero
    assign_weights(model, weights)
    before = model(IDS).numpy()
    config = QuantConfig(activations="static", smoothing=0.7, float_layers="block_0_qkv")
    smooth(model, config, IDS)
    after = named_weights(model)
    np.testing.assert_array_equal(after["block_0_attention_norm/gamma"], 1)
    assert all(((array == 0) == (after[name] == 0)).all() for name, array in weights.items())
    assert all(np.isfinite(array).all() for array in after.values())
    np.testing.assert_allclose(model(IDS).numpy(), before, atol=2e-5 * np.abs(before).max())


def inputs_of(model: GPTModel, layer: str) -> np.ndarray:
    return keras.Model(model.inputs, model.base_layer(layer).input)(IDS).numpy()


# How values are distributed

VALUES = st.tuples(st.integers(0, 999), st.integers(1, 400), st.integers(-30, 20), st.booleans())


def sample(seed: int, size: int, exponent: int, positive: bool) -> np.ndarray:
    values = np.random.default_rng(seed).standard_t(3, size) * 2.0**exponent
    return (np.abs(values) if positive else values).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(VALUES, min_size=1, max_size=4), share=st.floats(0.01, 0.99))
def test_a_histogram_knows_its_quantiles(parts: list[Any], share: float) -> None:
    histogram = Histogram()
    for part in parts:
        histogram.observe(tf.constant(sample(*part)))
    values = np.concatenate([sample(*part) for part in parts])
    assert histogram.counts.sum() == len(values)
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert histogram.limit / 2 < np.abs(values).max() <= histogram.limit
    wide = 2.5 * histogram.limit / 4096  # a bin, and what a doubling may put into the next one
    for found, sorted_values in (
        (histogram.quantile(share), np.sort(values)),
        (histogram.magnitude(share), np.sort(np.abs(values))),
    ):
        place = share * (len(values) - 1)
        low = sorted_values[max(0, int(place) - 1)]
        high = sorted_values[min(len(values) - 1, int(place) + 2)]
        assert low - wide <= found <= high + wide


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_the_range_of_least_error_has_the_least_error(symmetric: bool, positive: bool) -> None:
    values = sample(3, 20_000, 1, positive)
    histogram = Histogram()
    histogram.observe(tf.constant(values))

    def error(low: float, high: float) -> float:
        scale, zero = activation_scale(low, high, symmetric)
        integers = np.clip(np.rint(values / scale) + zero, -127 if symmetric else -128, 127)
        return float(np.mean(((integers - zero) * scale - values) ** 2))

    found = error(*histogram.least_error(symmetric))
    assert found < error(float(values.min()), float(values.max()))
    tried = np.linspace(0.02, 1, 50)
    least = min(
        error(float(min(values.min(), 0)) * a, float(values.max()) * b)
        for a in tried
        for b in tried[:: 1 if not symmetric and not positive else 50]
    )
    assert found <= 1.03 * least


# Ranges


@pytest.mark.parametrize("tied", [True, False])
def test_the_least_and_the_largest_of_every_product(tiny_model: Any, tied: bool) -> None:
    model = tiny_model(tie_embeddings=tied)
    config = QuantConfig(activations="static", quantize_adds=True)
    quantized = quantize(model, config, IDS)
    layers = [f"block_{i}_{name}" for i in (0, 1) for name in ("qkv", "proj", "fc", "out")]
    expected = {}
    for name in [*layers, "token_logits"]:
        layer = quantized.base_layer(name)
        inputs = layer.input[0] if tied and name == "token_logits" else layer.input
        expected[f"{name}/input"] = inputs
        expected[f"{name}/output"] = layer.output
    for name in ("attention_add", "mlp_add"):
        for i in (0, 1):
            expected[f"block_{i}_{name}/output"] = quantized.base_layer(f"block_{i}_{name}").output
    expected["position_embedding/output"] = quantized.base_layer("position_embedding").output
    values = keras.Model(quantized.inputs, expected)(IDS)
    ranges = quantized.activation_ranges
    assert ranges.keys() == expected.keys()
    for name, x in values.items():
        np.testing.assert_allclose(ranges[name], (x.numpy().min(), x.numpy().max()), rtol=1e-4)
    assert all(type(end) is float for pair in ranges.values() for end in pair)


@pytest.mark.parametrize("range", ["minmax", "percentile", "mse"])
def test_symmetric_ranges_and_narrower_ones(tiny_model: Any, range: str) -> None:
    model = tiny_model()
    config = QuantConfig(activations="static", range=range, percentile=98)
    widest = calibrate_ranges(model, QuantConfig(activations="static"), IDS)
    found = calibrate_ranges(model, config, IDS)
    assert found.keys() == widest.keys()
    for name, (low, high) in found.items():
        assert widest[name][0] <= low <= 0 <= high <= widest[name][1]
    assert (found == widest) == (range == "minmax")
    assert found["token_logits/output"] == widest["token_logits/output"]  # the likeliest tokens
    for low, high in calibrate_ranges(
        model, QuantConfig(activations="static", range=range, symmetric=True), IDS
    ).values():
        assert low == -high


def test_layers_that_stay_float_have_no_ranges(tiny_model: Any) -> None:
    config = QuantConfig(activations="static", float_layers=("token_embedding", "*_proj"))
    names = {name.partition("/")[0] for name in calibrate_ranges(tiny_model(), config, IDS)}
    assert names == {f"block_{i}_{name}" for i in (0, 1) for name in ("qkv", "fc", "out")}


def test_calibration_text_that_does_not_fit(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="token ids 0 to 60"):
        calibrate_ranges(tiny_model(), STATIC, IDS + 10)
    with pytest.raises(UserError, match="calibration"):
        quantize(tiny_model(), STATIC)
