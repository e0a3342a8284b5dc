"""Shrinking a model's depth: which blocks stay, and that everything else is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity
from tf_gptopt.compression.structured.shrinking import evenly_spaced, shrink
from tf_gptopt.models.gpt import GPTModel

IDS = np.random.default_rng(0).integers(0, 61, (2, 9))
UNEVEN = {
    "num_layers": 3,
    "num_heads": (1, 2, 3),
    "head_dim": 5,
    "intermediate_dim": (40, 17, 31),
}


def test_evenly_spaced_is_the_choice_of_distilgpt2() -> None:
    assert evenly_spaced(6, 12) == (0, 2, 4, 7, 9, 11)
    assert evenly_spaced(2, 4) == (0, 3)
    assert evenly_spaced(1, 5) == (0,)
    for blocks in range(2, 30):
        for keep in range(2, blocks + 1):
            chosen = evenly_spaced(keep, blocks)
            assert (chosen[0], chosen[-1], len(set(chosen))) == (0, blocks - 1, keep)


@pytest.mark.parametrize("tied", [True, False])
def test_without_a_block_that_adds_nothing_the_logits_are_the_same(
    tiny_model: Callable, tied: bool
) -> None:
    model = tiny_model(**UNEVEN, tie_embeddings=tied)
    model.tokenizer = object()
    for name in ("block_1_proj", "block_1_out"):
        for weight in model.base_layer(name).weights:
            weight.assign(np.zeros(weight.shape))
    before = [w.numpy() for w in model.weights]
    small = shrink(model, layers=[0, 2])
    assert isinstance(small, GPTModel)
    assert (small.config.num_layers, small.config.num_heads) == (2, (1, 3))
    assert (small.config.intermediate_dim, small.config.head_dim) == ((40, 31), 5)
    assert small.tokenizer is model.tokenizer
    np.testing.assert_allclose(small(IDS), model(IDS), atol=1e-5)
    np.testing.assert_allclose(shrink(model, layers=2)(IDS), model(IDS), atol=1e-5)
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)


def test_keeps_all_blocks_and_shares_no_weight(tiny_model: Callable) -> None:
    model = tiny_model(**UNEVEN)
    copy = shrink(model, layers=3)
    np.testing.assert_array_equal(copy(IDS), model(IDS))
    copy.base_layer("block_1_fc").kernel.assign(np.zeros((24, 17)))
    assert model.base_layer("block_1_fc").kernel.numpy().any()


def test_dtype_policy_is_the_models(tiny_model: Callable) -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = tiny_model()
    keras.mixed_precision.set_global_policy("float32")
    assert shrink(model, layers=1).base_layer("block_0_fc").dtype_policy.name == "mixed_bfloat16"
    assert keras.mixed_precision.global_policy().name == "float32"


@pytest.mark.filterwarnings("error")
def test_a_model_in_pruning_shrinks_with_its_zeros(tiny_model: Callable) -> None:
    pruned = prune(tiny_model(), PruneConfig(0.5, schedule="constant"))
    small = shrink(pruned, layers=[1])
    assert sparsity(small)["total"] == 0.5
    assert type(small.base_layer("block_0_fc")) is keras.layers.Dense


@pytest.mark.parametrize("layers", [0, 3, True, "1", 1.5, [], [1, 0], [0, 0], [-1], [2], [0.5]])
def test_impossible_choices_are_explained(tiny_model: Callable, layers: Any) -> None:
    with pytest.raises(UserError, match=r"Received: layers="):
        shrink(tiny_model(), layers=layers)


def test_only_gpt_models_shrink() -> None:
    with pytest.raises(UserError, match="GPTModel is needed"):
        shrink(keras.Sequential([keras.layers.Dense(2)]), layers=1)
