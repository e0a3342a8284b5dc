"""Invariant 1: cached decoding is the uncached forward pass, however the text is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.tflite.runtime import TFLiteGPT


@pytest.mark.parametrize(("scheme", "most"), [("float32", 1e-4), ("float16", 1e-4), ("int8", 0.02)])
def test_decoding_agrees_with_keras_at_every_position(exported, scheme, most, some_ids):
    """140 positions: across the capacities 64, 128 and 140."""
    model, runtime = exported(scheme, max_sequence_length=140)
    ids = some_ids(140)
    whole = runtime.logits(ids)
    if scheme == "float32":
        np.testing.assert_allclose(whole, model(ids[None])[0], atol=1e-4)
    for position in range(140):
        np.testing.assert_allclose(runtime.decode(ids[position]), whole[position], atol=most)


def test_an_int8_cache_decodes_what_it_prefills_at_every_position(exported, some_ids):
    """Across the capacities 64, 128 and 140, and in pieces of every size."""
    exact = QuantConfig(activations="float", kv_cache="int8")  # no other rounding hides a mistake
    model, runtime = exported(exact, max_sequence_length=140, num_heads=(1, 4), head_dim=8)
    ids = some_ids(140)
    whole = runtime.logits(ids)
    near = model(ids[None])[0].numpy()
    assert 1e-4 < np.abs(whole - near).max() < 0.1  # rounded, and not by much
    for position in range(140):
        np.testing.assert_allclose(runtime.decode(ids[position]), whole[position], atol=1e-4)
    for cut in (1, 17, 63, 64, 65, 100, 128, 139):
        runtime.reset()
        runtime.prefill(ids[:cut])
        np.testing.assert_allclose(runtime.prefill(ids[cut:]), whole[-1], atol=1e-4)


def test_an_int8_cache_takes_a_quarter_and_its_scales(exported, some_ids):
    sizes = {}
    for cache in ("float32", "int8"):
        _, runtime = exported(QuantConfig(kv_cache=cache), num_heads=16, head_dim=8)
        runtime.prefill(some_ids(20))
        sizes[cache] = runtime._cache.nbytes
    rows = 2 * 2 * 16 * 32  # of keys and of values, in two blocks of sixteen heads
    assert sizes == {"float32": rows * 8 * 4, "int8": rows * (8 + 4)}


def test_integers_in_and_out_mean_the_same_numbers(exported, tiny_model, some_ids):
    calibration = np.stack([some_ids(32, seed=seed) for seed in range(4)])
    files = {}
    for io in ("float32", "int8"):
        config = QuantConfig(activations="static", io=io)
        _, files[io] = exported(config, calibration=calibration, num_heads=8, head_dim=8)
    ids = some_ids(32)
    np.testing.assert_array_equal(files["int8"].logits(ids), files["float32"].logits(ids))
    assert files["int8"].generate(ids[:5], 20) == files["float32"].generate(ids[:5], 20)
    cache, logits = (files["int8"].metadata[part] for part in ("cache", "logits"))
    assert (cache["dtype"], cache["scales"], logits["dtype"]) == ("int8", False, "int8")
    assert files["int8"]._cache.nbytes * 4 == files["float32"]._cache.nbytes
    steps = files["int8"].decode(3) / logits["scale"] + logits["zero_point"]
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_heads": (1, 4), "intermediate_dim": (5, 50), "head_dim": 8},
        {"tie_embeddings": False},
    ],
)
def test_decoding_agrees_for_other_models(exported, shape, some_ids):
    model, runtime = exported("float32", **shape)
    ids = some_ids(32)
    expected = model(ids[None])[0]
    runtime.prefill(ids[:5])
    for position in range(5, 32):
        np.testing.assert_allclose(runtime.decode(ids[position]), expected[position], atol=1e-4)


def test_heads_in_groups_agree(exported, some_ids):
    """At capacity 1,100 five heads of 64 are done two, two and one at a time."""
    model, runtime = exported(
        "float32",
        num_layers=1,
        num_heads=5,
        head_dim=64,
        max_sequence_length=1100,
        prefill_lengths=[256],
        decode_capacities=[1100],
    )
    ids = some_ids(1000)
    expected = model(ids[None])[0]
    runtime.prefill(ids[:998])
    np.testing.assert_allclose(runtime.decode(ids[998]), expected[998], atol=1e-4)
    np.testing.assert_allclose(runtime.decode(ids[999]), expected[999], atol=1e-4)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, 149), max_size=6, unique=True), one=st.booleans())
def test_reading_in_pieces_agrees(exported, cuts, one, some_ids):
    _, runtime = exported("float32", max_sequence_length=150)
    ids = some_ids(150)
    whole = runtime.logits(ids)
    start = 0
    for end in [*sorted(cuts), 150]:
        logits = runtime.decode(ids[start]) if one else None
        if not one or end > start + 1:
            logits = runtime.prefill(ids[start + one : end])
        np.testing.assert_allclose(logits, whole[end - 1], atol=1e-4)
        start = end
        assert runtime.length == end


def test_a_shorter_text_after_a_longer_one_is_not_disturbed(exported, some_ids):
    _, runtime = exported("float32", max_sequence_length=140)
    ids = some_ids(140)
    runtime.prefill(ids)
    runtime.reset()
    expected = runtime.logits(ids[:9])
    runtime.prefill(ids[:8])
    np.testing.assert_allclose(runtime.decode(ids[8]), expected[-1], atol=1e-4)


def test_any_choice_of_signatures_gives_the_same_logits(exported, some_ids):
    ids = some_ids(30)
    expected = None
    for options in (
        {},
        {"prefill_lengths": [1], "decode_capacities": [32]},
        {"prefill_lengths": [7], "decode_capacities": [3, 5, 32]},
        {"prefill_lengths": [32], "decode_capacities": [1]},
    ):
        _, runtime = exported("float32", **options)
        logits = runtime.logits(ids)
        expected = logits if expected is None else expected
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        runtime.prefill(ids[:12])
        np.testing.assert_allclose(runtime.decode(ids[12]), expected[12], atol=1e-4)


def test_threads_do_not_change_the_result(exported, tmp_path, some_ids):
    _, runtime = exported("int8")
    two = TFLiteGPT(runtime.path, threads=2)
    assert (runtime.threads, two.threads) == (1, 2)
    np.testing.assert_allclose(two.logits(some_ids(32)), runtime.logits(some_ids(32)), atol=1e-5)
