"""QAT of activations and of the KV cache: the file's arithmetic, ranges that follow, and strip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.quantization import grids
from tf_gptopt.compression.quantization.activations import (
    activation_scale,
    fake_quantize_rows,
    fake_quantize_static,
    follow,
)
from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.compression.quantization.qat import quantize_aware, strip_quantization
from tf_gptopt.compression.quantization.ranges import calibrate_ranges
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.kv_cache import cached_forward, create_cache

IDS = np.random.default_rng(0).integers(0, 61, (16, 13)).astype("int32")
INPUTS, LABELS = IDS[:, :-1], IDS[:, 1:]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def train(model: keras.Model, epochs: int = 3) -> list[float]:
    model.compile(keras.optimizers.Adam(3e-3), LOSS)
    return model.fit(INPUTS, LABELS, batch_size=8, epochs=epochs, verbose=0).history["loss"]


def cached(model: GPTModel, prefill: int = 5) -> np.ndarray:
    cache = create_cache(model, len(IDS), IDS.shape[1])
    found, cache = cached_forward(model, IDS[:, :prefill], cache, np.zeros(len(IDS)))
    rest, _ = cached_forward(model, IDS[:, prefill:], cache, np.full(len(IDS), prefill))
    return np.concatenate([found, rest], 1)


# The arithmetic

bounds = st.floats(-100, 100, width=32) | st.just(0.0) | st.floats(-(2.0**-99), 2.0**-99, width=32)


@settings(max_examples=200, deadline=None)
@given(ends=st.tuples(bounds, bounds).map(sorted), symmetric=st.booleans())
def test_scales_and_zero_points_are_those_of_the_file(ends: Any, symmetric: bool) -> None:
    scale, zero_point = activation_scale(tf.constant(ends, tf.float32), symmetric)
    assert (float(scale), int(zero_point)) == grids.activation_scale(*ends, symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_static_rounding_and_its_gradient(symmetric: bool) -> None:
    known = tf.constant([-1.0, 3.0])
    scale, zero_point = grids.activation_scale(-1.0, 3.0, symmetric)
    # the last shape is large enough to be compiled
    for shape in ((50,), (300, 400)):
        x = tf.constant(np.random.default_rng(0).uniform(-5, 5, shape).astype(np.float32))

        def run(x: tf.Tensor = x) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = fake_quantize_static(x, known, symmetric)
            return y, tape.gradient(y, x, tf.ones_like(x) * 2.0)

        low = -127 if symmetric else -128
        integers = np.rint(x.numpy() / np.float32(scale)) + zero_point
        expected = (np.clip(integers, low, 127) - zero_point) * np.float32(scale)
        for y, slope in (run(), tf.function(run)()):
            np.testing.assert_array_equal(y, expected)
            np.testing.assert_array_equal(
                slope, np.where((integers >= low) & (integers <= 127), 2.0, 0.0)
            )


def test_rows_of_a_cache() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32)
    x[0, 0, 0] = 0
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    expected = np.rint(x / np.where(scale == 0, 1, scale)) * scale
    np.testing.assert_array_equal(fake_quantize_rows(tf.constant(x)), expected)
    half = fake_quantize_rows(tf.constant(x, tf.bfloat16))
    assert half.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(half, tf.float32), expected, rtol=0.02, atol=0.02)
    variable = tf.Variable(x)
    with tf.GradientTape() as tape:
        y = fake_quantize_rows(tf.convert_to_tensor(variable))
    np.testing.assert_array_equal(tape.gradient(y, variable, 3 * np.ones_like(x)), 3 + 0 * x)


def test_ranges_follow_and_survive_an_overflow() -> None:
    known = tf.zeros(2)
    for low in (-1.0, -2.0, -np.inf, np.nan):
        known = follow(known, tf.constant([low, 4.0]))
    np.testing.assert_allclose(known, [-1.01, 4.0], rtol=1e-6)


# The model


@pytest.mark.parametrize("tied", [True, False])
def test_static_training(tiny_model, tied: bool, tmp_path) -> None:
    config = QuantConfig(activations="static")
    model = tiny_model(num_layers=1, tie_embeddings=tied)
    plain = model(INPUTS).numpy()
    aware = quantize_aware(model, config)
    error = aware(INPUTS).numpy() - plain  # ranges not set: each batch has its own
    assert 0 < np.abs(error).mean() < 0.1 * np.abs(plain).mean()
    with pytest.raises(UserError, match=r"no range yet.*calibration text"):
        strip_quantization(aware)
    losses = train(aware)
    assert losses[-1] < losses[0]
    stripped = strip_quantization(aware)
    ranges = stripped.activation_ranges
    sides = [f"block_0_{x}/{s}" for x in ("qkv", "proj", "fc", "out") for s in ("input", "output")]
    assert list(ranges) == [*sides, "token_logits/input", "token_logits/output"]
    seen = calibrate_ranges(stripped, config, INPUTS)
    for name, (low, high) in ranges.items():  # a moving average lies within what has been seen
        assert low <= 0 <= high
        assert high - low == pytest.approx(seen[name][1] - seen[name][0], rel=0.4), name
    # logits have 256 values at most, and the head sees rounded numbers
    logits = aware(INPUTS).numpy()
    low, high = ranges["token_logits/output"]
    scale, _ = grids.activation_scale(low, high)
    np.testing.assert_allclose(np.rint(logits / scale) * scale, logits, atol=1e-4)
    assert np.abs(logits).max() <= max(-low, high) + scale
    np.testing.assert_allclose(cached(aware)[:, :-1], logits, atol=3 * scale)
    if not tied:
        return  # from disk, and on
    aware.save(tmp_path / "aware.keras")
    loaded = keras.models.load_model(tmp_path / "aware.keras")
    np.testing.assert_array_equal(loaded(INPUTS), logits)
    assert strip_quantization(loaded).activation_ranges == ranges
    train(loaded, epochs=1)
    assert strip_quantization(loaded).activation_ranges != ranges


def test_calibration_makes_a_fresh_model_complete(tiny_model) -> None:
    model = tiny_model(num_layers=1)
    for changes in ({"range": "percentile", "percentile": 99.0}, {"symmetric": True}):
        config = QuantConfig(activations="static", **changes)
        aware = quantize_aware(model, config, calibration=INPUTS)
        stripped = strip_quantization(aware)
        expected = quantize(model, config, INPUTS)
        for name, weight in named_weights(expected).items():
            np.testing.assert_array_equal(named_weights(stripped)[name], weight)
        for name, ends in expected.activation_ranges.items():
            np.testing.assert_allclose(stripped.activation_ranges[name], ends, rtol=1e-6)
        # and a quantized model brings its ranges along
        again = strip_quantization(quantize_aware(expected, config)).activation_ranges
        for name, ends in expected.activation_ranges.items():
            np.testing.assert_allclose(again[name], ends, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(activations="static", smoothing=0.5, quantize_adds=True),
        QuantConfig(smoothing=0.7),
    ],
)
def test_smoothing_and_int8_adds(tiny_model, config) -> None:
    model = tiny_model(num_layers=1)
    with pytest.raises(UserError, match=r"smoothing measures activations.*calibration="):
        quantize_aware(model, config)
    aware = quantize_aware(model, config, calibration=INPUTS)
    gamma = aware.base_layer("block_0_attention_norm").weights[0].numpy()
    assert np.abs(gamma - 1).max() > 0.1
    train(aware, epochs=1)
    stripped = strip_quantization(aware)
    np.testing.assert_array_equal(named_weights(stripped)["block_0_attention_norm/gamma"], gamma)
    if config.quantize_adds:
        streams = {
            "position_embedding/output",
            "block_0_attention_add/output",
            "block_0_mlp_add/output",
        }
        assert streams <= set(stripped.activation_ranges)
    # smoothed and rounded already: another round begins there
    again = strip_quantization(quantize_aware(stripped, config))
    for name, weight in named_weights(stripped).items():
        np.testing.assert_array_equal(named_weights(again)[name], weight)


def test_an_int8_cache(tiny_model) -> None:
    model = tiny_model(num_layers=2, num_heads=(2, 3), head_dim=8)
    plain = model(IDS).numpy()
    aware = quantize_aware(model, QuantConfig("float32", kv_cache="int8"))
    logits = aware(IDS).numpy()
    assert 0 < np.abs(logits - plain).mean() < 0.02 * np.abs(plain).mean()
    np.testing.assert_allclose(cached(aware), logits, atol=1e-4)
    in_graph = tf.function(lambda: aware(INPUTS, training=True))()  # attention in blocks
    np.testing.assert_allclose(in_graph, logits[:, :-1], atol=1e-4)
    train(aware, epochs=1)
    stripped = strip_quantization(aware)
    assert stripped.activation_ranges is None
    assert stripped.base_layer("block_0_attention").round_cache is None
    assert np.abs(stripped(IDS).numpy() - aware(IDS).numpy()).max() > 0
