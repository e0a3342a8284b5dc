"""Taking units out, and gates that compute what would be left: the same function, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt._keras import keras
from tf_gptopt.compression.structured.gates import GatedGPT, open_gates
from tf_gptopt.compression.structured.importance import importance
from tf_gptopt.compression.structured.surgery import Units, all_units, extract, shape_of
from tf_gptopt.models.checkpoints import named_weights
from tf_gptopt.models.counting import token_flops, weight_count
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.kv_cache import cached_forward, create_cache

IDS = np.random.default_rng(0).integers(0, 61, (3, 9)).astype(np.int32)
UNEVEN = {
    "num_layers": 3,
    "num_heads": (1, 2, 3),
    "head_dim": 5,
    "intermediate_dim": (40, 17, 31),
}


def weights_of(model: GPTModel, name: str) -> list[Any]:
    return model.base_layer(name).weights


def loss_of(model: GPTModel) -> float:
    losses = keras.losses.sparse_categorical_crossentropy(
        IDS[:, 1:], model(IDS)[:, :-1], from_logits=True
    )
    return float(tf.reduce_sum(losses))


def gated_loss(model: GPTModel, gates: Units) -> float:
    gpt = GatedGPT(named_weights(model), model.config)
    x = gpt.embed(IDS)
    for i in range(model.config.num_layers):
        x, _ = gpt.block(i, x, gates)
    return float(gpt.loss(x, IDS, gates)[0])


def dead_units(model: GPTModel) -> None:
    """Head 1 of block 2, neuron 3 of block 1, channel 4 and block 0 of `UNEVEN` do nothing."""

    def clear(name: str, weight: int, index: Any) -> None:
        array = weights_of(model, name)[weight].numpy()
        array[index] = 0.0
        weights_of(model, name)[weight].assign(array)

    clear("block_2_proj", 0, slice(5, 10))
    for weight in (0, 1):  # its values too: activation must see it
        clear("block_2_qkv", weight, (..., slice(30 + 5, 30 + 10)))
        clear("block_1_fc", weight, (..., 3))
        clear("block_0_proj", weight, ...)
        clear("block_0_out", weight, ...)
    clear("block_1_out", 0, 3)
    names = {layer.name for layer in model.layers if "norm" in layer.name}
    for name in names:
        clear(name, 0, 4)
        clear(name, 1, 4)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_keeping_everything_in_any_order_changes_nothing(tiny_model: Callable, data: Any) -> None:
    layers = data.draw(st.integers(1, 2))

    def per_block(most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(1, most), min_size=layers, max_size=layers)))

    model = tiny_model(
        embedding_dim=data.draw(st.integers(4, 21)),
        num_layers=layers,
        num_heads=per_block(4),
        intermediate_dim=per_block(19),
        head_dim=data.draw(st.integers(1, 7)),
        tie_embeddings=data.draw(st.booleans()),
    )
    kept = all_units(model.config)
    shuffle = np.random.default_rng(data.draw(st.integers(0, 99))).permutation
    kept = Units(
        kept.layers,
        [shuffle(heads) for heads in kept.heads],
        [shuffle(neurons) for neurons in kept.neurons],
        shuffle(kept.channels),
    )
    same = extract(model, kept)
    assert same.config == model.config
    np.testing.assert_allclose(same(IDS), model(IDS), atol=2e-4)
    for name in ("block_0_qkv", "block_0_fc"):  # and the order is what was asked for
        if kept.channels[0] != 0:
            assert not np.allclose(*(m.base_layer(name).kernel[0] for m in (same, model)))


@pytest.mark.parametrize("tied", [True, False])
def test_gates_compute_what_is_left(tiny_model: Callable, tied: bool) -> None:
    model = tiny_model(**UNEVEN, tie_embeddings=tied)
    assert gated_loss(model, open_gates(model.config)) == pytest.approx(loss_of(model), rel=1e-5)
    kept = Units(
        np.array([0, 2]),
        [np.array([0]), np.array([], int), np.array([0, 2])],
        [np.arange(3, 30), np.array([], int), np.array([1, 4, 30])],
        np.array([i for i in range(24) if i not in (0, 7, 8, 23)]),
    )
    small = extract(model, kept)
    config = small.config
    assert (config.num_layers, config.embedding_dim, config.head_dim) == (2, 20, 5)
    assert (config.num_heads, config.intermediate_dim) == ((1, 2), (27, 3))
    gates = open_gates(model.config)
    gates.layers[0, 1] = 0
    gates.heads[2][0, 1] = 0
    gates.neurons[0][0, :3] = gates.neurons[0][0, 30:] = 0
    gates.neurons[2][:] = 0
    gates.neurons[2][0, kept.neurons[2]] = 1
    gates.channels[0, [0, 7, 8, 23]] = 0
    assert gated_loss(model, gates) == pytest.approx(loss_of(small), rel=1e-5)
    assert abs(loss_of(small) - loss_of(model)) > 0.1
    # what the shape says, and what there is
    assert config == shape_of(model.config, kept)
    assert small.count_params() == weight_count(config)
    assert token_flops(model.config, 8) > token_flops(config, 8)


def test_dead_heads_and_neurons_are_not_missed(tiny_model: Callable) -> None:
    model = tiny_model(**UNEVEN)
    dead_units(model)
    kept = all_units(model.config)
    kept.heads[2], kept.neurons[1] = np.array([0, 2]), np.delete(kept.neurons[1], 3)
    small = extract(model, kept._replace(layers=np.array([1, 2])))
    np.testing.assert_allclose(small(IDS), model(IDS), atol=1e-5)
    assert (small.config.num_heads, small.config.intermediate_dim) == (2, (16, 31))


@pytest.mark.parametrize("kind", ["activation", "taylor"])
def test_dead_units_are_the_least_important(tiny_model: Callable, kind: str) -> None:
    model = tiny_model(**UNEVEN)
    dead_units(model)
    gpt = GatedGPT(named_weights(model), model.config)
    told: list = []
    scores = importance(gpt, IDS, kind, lambda *what: told.append(what))
    assert told == [(3, 3, f"{kind} importance")]
    assert int(np.argmin(scores.layers)) == 0
    assert int(np.argmin(scores.heads[2])) == 1
    assert int(np.argmin(scores.neurons[1])) == 3
    assert int(np.argmin(scores.channels)) == 4
    for group in tf.nest.flatten(scores):
        assert np.isfinite(group).all()
        assert (group >= 0).all()
    if kind == "taylor":  # |sum of w dL/dw| over the weights that read the unit, by example
        by_hand = []
        for row in IDS:
            with tf.GradientTape() as tape:
                losses = keras.losses.sparse_categorical_crossentropy(
                    row[None, 1:], model(row[None])[:, :-1], from_logits=True
                )
                loss = tf.reduce_mean(losses)
            kernels = [model.base_layer(name).kernel for name in ("block_1_out", "block_2_proj")]
            slopes = [
                (kernel * slope).numpy().sum(1)
                for kernel, slope in zip(kernels, tape.gradient(loss, kernels), strict=True)
            ]
            by_hand.append(np.abs(np.r_[slopes[0], slopes[1].reshape(3, 5).sum(1)]))
        expected = np.mean(by_hand, 0)
        np.testing.assert_allclose(np.r_[scores.neurons[1], scores.heads[2]], expected, atol=1e-5)


def test_scores_do_not_depend_on_batches_or_dtype(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(gpt: GatedGPT) -> list[np.ndarray]:
        return [
            score
            for kind in ("activation", "taylor")
            for score in tf.nest.flatten(importance(gpt, IDS, kind))
        ]

    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = tiny_model(head_dim=4, intermediate_dim=10)
    keras.mixed_precision.set_global_policy("float32")
    gpt = GatedGPT(named_weights(model), model.config)
    whole = scores(gpt)
    monkeypatch.setattr(
        "tf_gptopt.compression.structured.importance.BATCH_TOKENS", 2 * IDS.shape[1]
    )  # batches of 2 and 1 examples
    for a, b in zip(scores(gpt), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_cached_decoding_is_the_uncached_forward_pass(tiny_model: Callable) -> None:
    model = tiny_model(**UNEVEN)
    kept = all_units(model.config)
    kept.heads[2], kept.neurons[0] = np.array([2]), np.arange(7)
    small = extract(model, kept._replace(channels=np.arange(1, 24, 2)))
    expected, cache = small(IDS), create_cache(small, 3, 9)
    for t in range(IDS.shape[1]):
        logits, cache = cached_forward(small, IDS[:, t : t + 1], cache, np.full(3, t))
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-4)
