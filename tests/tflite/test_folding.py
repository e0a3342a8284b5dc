"""Folding LayerNorms changes the numbers and not the function."""

from __future__ import annotations

import numpy as np

from tf_gptopt.models.checkpoints import assign_weights, named_weights
from tf_gptopt.models.folding import fold_layer_norms

SHAPE = {"num_heads": (1, 3), "intermediate_dim": (7, 40), "head_dim": 8, "num_layers": 2}


def test_the_function_stays_the_same(tiny_model):
    for tied in (True, False):
        model = tiny_model(tie_embeddings=tied, **SHAPE)
        ids = np.arange(20)[None]
        before = model(ids)
        weights = named_weights(model)
        folded = fold_layer_norms(weights)
        assert folded.keys() == weights.keys()
        assign_weights(model, folded)
        np.testing.assert_allclose(model(ids), before, atol=2e-5)


def test_only_the_last_norm_keeps_gamma_and_beta(tiny_model):
    weights = named_weights(tiny_model(**SHAPE))
    folded = fold_layer_norms(weights)
    for name, array in folded.items():
        if name.startswith("final_norm"):
            np.testing.assert_array_equal(array, weights[name])
        elif name.endswith("gamma"):
            np.testing.assert_array_equal(array, 1.0)
        elif name.endswith("beta"):
            np.testing.assert_array_equal(array, 0.0)


def test_folding_twice_is_folding_once_and_changes_no_argument(tiny_model):
    weights = named_weights(tiny_model(**SHAPE))
    kept = {name: array.copy() for name, array in weights.items()}
    folded = fold_layer_norms(weights)
    again = fold_layer_norms(folded)
    for name in weights:
        np.testing.assert_array_equal(weights[name], kept[name])
        np.testing.assert_array_equal(again[name], folded[name])


def test_zeros_stay_zeros(tiny_model):
    weights = named_weights(tiny_model(**SHAPE))
    mask = np.random.default_rng(0).random(weights["block_1_fc/kernel"].shape) < 0.5
    weights["block_1_fc/kernel"] *= mask
    assert not fold_layer_norms(weights)["block_1_fc/kernel"][~mask].any()
