"""Cached decoding says what the uncached forward pass says, at every position of every model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.kv_cache import cache_spec, cached_forward, create_cache, grow_cache

Build = Callable[..., GPTModel]


def uncached(model: GPTModel, ids: np.ndarray) -> np.ndarray:
    return np.asarray(model(ids, training=False))


def decoded(model: GPTModel, ids: np.ndarray, prefill: int, capacity: int) -> np.ndarray:
    """Logits of every position: a prefill, then one token a call."""
    cache = create_cache(model, len(ids), capacity)
    logits, cache = cached_forward(model, ids[:, :prefill], cache, np.zeros(len(ids)))
    found = [logits]
    for t in range(prefill, ids.shape[1]):
        logits, cache = cached_forward(model, ids[:, t : t + 1], cache, np.full(len(ids), t))
        found.append(logits)
    return np.concatenate(found, axis=1)


def token_ids(model: GPTModel, batch: int, time: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, time))


SHAPES = [
    {},
    {"tie_embeddings": False, "dropout": 0.2},
    {"num_heads": 1, "num_layers": 1},
    {"num_layers": 3, "num_heads": (1, 4, 2), "head_dim": 5, "intermediate_dim": (7, 30, 11)},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefill", [1, 5, 16])
def test_equals_the_uncached_forward(
    tiny_model: Build, shape: dict[str, Any], prefill: int
) -> None:
    model = tiny_model(max_sequence_length=16, **shape)
    ids = token_ids(model, 3, 16)
    np.testing.assert_allclose(decoded(model, ids, prefill, 16), uncached(model, ids), atol=2e-5)


def pruned(model: GPTModel) -> GPTModel:
    pruner = pytest.importorskip("tf_gptopt.compression.pruning.pruner")
    config = pytest.importorskip("tf_gptopt.compression.pruning.config")
    return pruner.prune(model, config.PruneConfig(sparsity=0.5, schedule="constant"))


def quantized(model: GPTModel) -> GPTModel:
    qat = pytest.importorskip("tf_gptopt.compression.quantization.qat")
    return qat.quantize_aware(model)


def pruned_and_quantized(model: GPTModel) -> GPTModel:
    pruner = pytest.importorskip("tf_gptopt.compression.pruning.pruner")
    return quantized(pruner.strip_pruning(pruned(model)))


@pytest.mark.parametrize("wrap", [pruned, quantized, pruned_and_quantized])
@pytest.mark.parametrize("shape", [{}, {"num_heads": (3, 1), "head_dim": 8}])
def test_wrapped_models(
    tiny_model: Build, wrap: Callable[[GPTModel], GPTModel], shape: dict[str, Any]
) -> None:
    dense = tiny_model(max_sequence_length=12, **shape)
    model = wrap(dense)
    ids = token_ids(model, 2, 12)
    assert np.abs(uncached(model, ids) - uncached(dense, ids)).max() > 1e-3  # it is another model
    np.testing.assert_allclose(decoded(model, ids, 4, 12), uncached(model, ids), atol=5e-5)


@pytest.mark.parametrize(("policy", "atol"), [("mixed_bfloat16", 0.1), ("mixed_float16", 0.02)])
def test_mixed_precision(tiny_model: Build, policy: str, atol: float) -> None:
    keras.mixed_precision.set_global_policy(policy)
    model = tiny_model(max_sequence_length=12)
    ids = token_ids(model, 2, 12)
    expected = uncached(model, ids)
    assert create_cache(model, 1, 4)[0].keys.dtype == policy.removeprefix("mixed_")
    found = decoded(model, ids, 4, 12)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=atol * np.abs(expected).max())


def test_ragged_prompts_share_a_batch(tiny_model: Build) -> None:
    model = tiny_model()
    ids = token_ids(model, 4, 20)
    lengths = np.array([1, 3, 8, 8])
    padded = np.where(np.arange(8) < lengths[:, None], ids[:, :8], 60)
    cache = create_cache(model, 4, 20)
    logits, cache = cached_forward(model, padded, cache, np.zeros(4), logits_at=lengths - 1)
    expected = uncached(model, ids)
    np.testing.assert_allclose(logits, expected[np.arange(4), lengths - 1], atol=2e-5)
    for step in range(12):
        at = lengths + step
        logits, cache = cached_forward(model, ids[np.arange(4), at][:, None], cache, at)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(4), at], atol=2e-5)


def test_a_prompt_in_pieces(tiny_model: Build) -> None:
    model = tiny_model()
    ids = token_ids(model, 2, 32)
    cache, found = create_cache(model, 2, 8), []
    for start, stop in [(0, 3), (3, 8), (8, 9), (9, 32)]:  # over the edge of the capacity too
        if stop > cache[0].keys.shape[2]:
            cache = grow_cache(cache, 32)
        logits, cache = cached_forward(model, ids[:, start:stop], cache, np.full(2, start))
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1), uncached(model, ids), atol=2e-5)


def test_one_trace_serves_all_sizes(tiny_model: Build) -> None:
    model = tiny_model()
    many = tf.TensorSpec([None], tf.int32)

    @tf.function(
        input_signature=[tf.TensorSpec([None, None], tf.int32), cache_spec(model), many, many]
    )
    def step(ids: Any, cache: Any, positions: Any, logits_at: Any) -> Any:
        return cached_forward(model, ids, cache, positions, logits_at)

    for batch, time, capacity in [(1, 1, 4), (3, 7, 8), (2, 32, 32)]:
        ids = token_ids(model, batch, time)
        start, last = np.zeros(batch, np.int32), np.full(batch, time - 1, np.int32)
        logits, cache = step(
            ids.astype(np.int32), create_cache(model, batch, capacity), start, last
        )
        np.testing.assert_allclose(logits, uncached(model, ids)[:, -1], atol=2e-5)
        assert cache[1].values.shape == (batch, 3, capacity, 8)
    assert step.experimental_get_tracing_count() == 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="beyond the cache"):
        step(ids.astype(np.int32), create_cache(model, 2, 31), start, last)


def test_the_layout_is_as_documented(tiny_model: Build) -> None:
    model = tiny_model(num_layers=3, num_heads=(1, 4, 2), head_dim=5)
    cache = create_cache(model, 2, 7)
    assert [block.keys.shape for block in cache] == [(2, h, 7, 5) for h in (1, 4, 2)]
    ids = token_ids(model, 2, 2)
    _, new = cached_forward(model, ids, cache, np.array([0, 3]))
    written = np.abs(new[1].keys).sum((1, 3)) > 0  # (batch, capacity)
    np.testing.assert_array_equal(written, [[1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]])
    assert not np.any(cache[1].keys)  # the old cache is not changed


def test_rows_beyond_the_length_do_not_count(tiny_model: Build) -> None:
    model = tiny_model()
    ids = token_ids(model, 1, 6)
    clean = create_cache(model, 1, 16)
    dirty = [type(block)(block.keys + 50.0, block.values - 99.0) for block in clean]
    expected, _ = cached_forward(model, ids, clean, [0])
    found, _ = cached_forward(model, ids, dirty, [0])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("time", "position"), [(5, 0), (1, 4), (2, 3), (1, -1)])
def test_overrun(tiny_model: Build, time: int, position: int) -> None:
    model = tiny_model()
    cache = create_cache(model, 1, 4)
    with pytest.raises(UserError, match="do not fit into a cache of 4"):
        cached_forward(model, np.zeros((1, time)), cache, [position])


@pytest.mark.parametrize("capacity", [0, 33])
def test_impossible_capacity(tiny_model: Build, capacity: int) -> None:
    with pytest.raises(UserError, match=f"1 to 32 tokens.*capacity={capacity}"):
        create_cache(tiny_model(), 1, capacity)
