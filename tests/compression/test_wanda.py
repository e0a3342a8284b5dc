"""Wanda: norms of the original inputs, held against a GPT written out in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, strip_pruning
from tf_gptopt.compression.pruning.wanda import input_norms
from tf_gptopt.models.checkpoints import named_weights

UNEVEN = {"num_heads": (2, 3), "head_dim": 5, "intermediate_dim": (40, 17)}
IDS = np.random.default_rng(1).integers(0, 61, (9, 14))
PARTS = ("qkv", "proj", "fc", "out")


def inputs_in_torch(model: Any, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """The input `(rows, in)` of each Dense layer of a plain model, float64."""
    w = {name: torch.tensor(np.float64(value)) for name, value in named_weights(model).items()}
    seen: dict[str, torch.Tensor] = {}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        gamma, beta = w[f"{name}/gamma"], w[f"{name}/beta"]
        return F.layer_norm(x, x.shape[-1:], gamma, beta, model.config.layer_norm_epsilon)

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        seen[name] = x.flatten(0, 1)
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    x = w["token_embedding/embeddings"][torch.tensor(ids)]
    x = x + w["position_embedding/embeddings"][: ids.shape[1]]
    for i, heads in enumerate(model.config.block_heads):
        qkv = dense(norm(x, f"block_{i}_attention_norm"), f"block_{i}_qkv")
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + dense(y, f"block_{i}_proj")
        y = F.gelu(dense(norm(x, f"block_{i}_mlp_norm"), f"block_{i}_fc"), approximate="tanh")
        x = x + dense(y, f"block_{i}_out")
    return seen


def oracle(model: Any) -> dict[str, np.ndarray]:
    seen = inputs_in_torch(model, IDS)
    return {name: torch.linalg.vector_norm(x, dim=0).numpy() for name, x in seen.items()}


def kernels(model: Any) -> dict[str, np.ndarray]:
    names = [f"block_{i}_{part}" for i in range(model.config.num_layers) for part in PARTS]
    return {name: model.base_layer(name).kernel.numpy() for name in names}


def test_norms_are_those_of_torch(tiny_model: Callable) -> None:
    model = tiny_model(**UNEVEN)
    expected = oracle(model)
    found = input_norms(model, IDS, expected.keys())
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], norm, rtol=1e-5)
    few = input_norms(model, IDS, ["block_1_fc"])
    assert few.keys() == {"block_1_fc"}
    np.testing.assert_array_equal(few["block_1_fc"], found["block_1_fc"])


def test_bfloat16_norms_are_near(tiny_model: Callable) -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = tiny_model()
    expected = oracle(model)
    found = input_norms(model, IDS, expected.keys())
    for name, norm in expected.items():
        np.testing.assert_allclose(found[name], norm, rtol=0.05)


def test_a_wrapped_model_counts_as_its_masks_leave_it(tiny_model: Callable) -> None:
    pruned = prune(tiny_model(), PruneConfig(0.7, schedule="constant"))
    expected = oracle(strip_pruning(pruned))
    for name, norm in input_norms(pruned, IDS, expected.keys()).items():
        np.testing.assert_allclose(norm, expected[name], rtol=1e-5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_masks_compare_the_weights_of_an_output(tiny_model: Callable, pattern: str) -> None:
    model = tiny_model(**UNEVEN)
    before, norms = kernels(model), oracle(model)
    config = PruneConfig(schedule="constant", score="wanda", scope="output", pattern=pattern)
    after = kernels(strip_pruning(prune(model, config, IDS)))
    for name, kernel in before.items():  # block 1 too: by the inputs that the dense block 0 makes
        score = np.abs(kernel) * norms[name][:, None]
        for j in range(kernel.shape[1]):
            groups = [np.arange(len(kernel))]
            if pattern == "2:4":
                groups = [np.arange(i, min(i + 4, len(kernel))) for i in range(0, len(kernel), 4)]
            for group in groups:
                keep = 2 if pattern == "2:4" else round(len(kernel) / 2)
                kept = group[np.argsort(-score[group, j])[:keep]]
                expected = np.zeros(len(group))
                expected[kept - group[0]] = kernel[kept, j]
                np.testing.assert_array_equal(after[name][group, j], expected)


def test_wanda_keeps_what_a_small_weight_multiplies_a_lot_with(tiny_model: Callable) -> None:
    model = tiny_model()
    gamma = model.base_layer("block_0_attention_norm").gamma
    gamma.assign(np.where(np.arange(24) < 12, 0.01, 10.0))
    kept = {}
    for score in ("magnitude", "wanda"):
        config = PruneConfig(0.5, schedule="constant", score=score, layers="block_0_qkv")
        pruned = prune(model, config, IDS)
        kept[score] = np.count_nonzero(pruned.base_layer("block_0_qkv").layer.kernel, axis=1)
    assert kept["wanda"][12:].sum() > 0.9 * kept["wanda"].sum()
    assert 0.4 < kept["magnitude"][12:].sum() / kept["magnitude"].sum() < 0.6


def test_unknown_layers_and_foreign_tokens(tiny_model: Callable) -> None:
    with pytest.raises(UserError, match="no Dense layer"):
        input_norms(tiny_model(), IDS, ["block_7_fc"])
    with pytest.raises(UserError, match="0 to 60"):
        input_norms(tiny_model(), IDS + 60, ["block_0_fc"])
