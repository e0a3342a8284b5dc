"""Post-training quantization: exact grids on every kind of model, and what each option promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity, strip_pruning
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.grids import LIMITS, find_grid, quantize_matrix
from tf_gptopt.compression.quantization.ptq import quantize
from tf_gptopt.compression.quantization.qat import quantize_aware
from tf_gptopt.compression.quantization.rounding import (
    POSITIONS,
    matrix_rows,
    quantizable_layers,
)
from tf_gptopt.models.checkpoints import assign_weights, load_model, named_weights, save_model
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.models.gpt import GPTModel

IDS = np.random.default_rng(1).integers(0, 61, (9, 14))
ON_TEXT = [
    QuantConfig("int4", rounding="gptq", range="mse"),
    QuantConfig("int4", granularity="global", rounding="gptq", bias_correction=True),
    QuantConfig("int8", bias_correction=True, layers={"*_fc": "int4:32", "*_out": "float16"}),
    QuantConfig(activations="static", smoothing=0.5, rounding="gptq", float_layers="*_proj"),
    QuantConfig("int4", smoothing=0.7),
]


def assert_same_bits(a: GPTModel, b: GPTModel) -> None:
    ours, theirs = named_weights(a), named_weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name].view(np.int32), theirs[name].view(np.int32), name)


def assert_on_grids(model: GPTModel, config: QuantConfig) -> None:
    weights = named_weights(model)
    for layer, name in quantizable_layers(weights).items():
        rows = matrix_rows(name, weights[name])
        if config.keeps_float(layer):
            continue
        bits, group = BITS[config.weights_of(layer)], config.group_of(layer, rows.shape[1])
        grid = find_grid(rows, bits, group)
        assert grid is not None, name
        np.testing.assert_array_equal(grid.values(), rows)


# Grids


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tied=st.booleans(),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    neurons=st.tuples(st.integers(3, 40), st.sampled_from([32, 64])),
    width=st.sampled_from([24, 32]),
    zeros=st.sampled_from([0.0, 0.5]),
    config=st.builds(
        QuantConfig,
        st.just("int4"),
        granularity=st.sampled_from(["global", "tensor", "channel", 32]),
        range=st.sampled_from(["minmax", "percentile", "mse"]),
        layers=st.sampled_from([{}, {"block_1_*": "int8", "token_embedding": "float16"}]),
        float_layers=st.sampled_from([(), ("block_0_out", "block_1_qkv")]),
    ),
)
def test_every_matrix_lies_on_its_grid(
    tiny_model: Any, tied: bool, heads: Any, neurons: Any, width: int, zeros: float, config: Any
) -> None:
    model = tiny_model(
        tie_embeddings=tied,
        num_heads=heads,
        head_dim=8,
        intermediate_dim=neurons,
        embedding_dim=width,
    )
    weights = named_weights(model)
    rng = np.random.default_rng(0)
    for name in quantizable_layers(weights).values():
        weights[name][rng.random(weights[name].shape) < zeros] = 0
    assign_weights(model, weights)
    quantized = quantize(model, config)
    assert_on_grids(quantized, config)
    assert_same_bits(quantize(quantized, config), quantized)
    folded, found = fold_layer_norms(weights), named_weights(quantized)
    for layer, name in quantizable_layers(weights).items():
        assert not found[name][weights[name] == 0].any()
        if config.weights_of(layer) == "float32":
            np.testing.assert_array_equal(found[name], folded[name])
        elif config.weights_of(layer) == "float16":
            np.testing.assert_array_equal(found[name], folded[name].astype(np.float16))
    if config.weights_of("position_embedding") == "int4":  # as in the file
        folded[POSITIONS] = quantize_matrix(folded[POSITIONS]).values()
    else:
        folded[POSITIONS] = folded[POSITIONS].astype(np.float16).astype(np.float32)
    for name in folded.keys() - set(quantizable_layers(weights).values()):
        np.testing.assert_array_equal(found[name], folded[name])
    for name, before in weights.items():  # the model itself is as it was
        np.testing.assert_array_equal(named_weights(model)[name], before)


@pytest.mark.parametrize("config", ON_TEXT, ids=lambda config: config.name)
def test_with_calibration_too(tiny_model: Any, config: QuantConfig) -> None:
    tied = config is not ON_TEXT[-1]
    shape = {"num_heads": (3, 1), "head_dim": 8, "intermediate_dim": (40, 64), "embedding_dim": 32}
    model = tiny_model(tie_embeddings=tied, **shape)
    weights = named_weights(model)
    weights["block_0_fc/kernel"][::3] = 0
    weights["block_1_qkv/kernel"][:, ::2] = 0
    weights["token_embedding/embeddings"][:, 5] = 0
    assign_weights(model, weights)
    quantized = quantize(model, config, IDS)
    assert_on_grids(quantized, config)
    assert_same_bits(again := quantize(quantized, config, IDS), quantized)
    assert again.activation_ranges == quantized.activation_ranges
    assert (quantized.activation_ranges is not None) == (config.activations == "static")
    for name, array in named_weights(quantized).items():
        assert not array[weights[name] == 0].any() or name.endswith(("bias", "beta")), name
    for name, before in weights.items():
        np.testing.assert_array_equal(named_weights(model)[name], before)


def test_global_is_one_scale_for_all(tiny_model: Any) -> None:
    weights = named_weights(quantize(tiny_model(), QuantConfig(granularity="global")))
    rows = {n: matrix_rows(n, weights[n]) for n in quantizable_layers(weights).values()}
    peak = max(np.abs(matrix).max() for matrix in rows.values())
    scale = np.float32(peak / LIMITS[8][1])
    for matrix in rows.values():
        np.testing.assert_array_equal(np.rint(matrix / scale) * scale, matrix)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_every_dtype_policy(tiny_model: Any, policy: str) -> None:
    config = QuantConfig("int4", rounding="gptq", bias_correction=True, granularity="channel")
    plain = tiny_model()
    keras.mixed_precision.set_global_policy(policy)
    mixed = tiny_model()
    quantized = quantize(mixed, config, IDS)
    assert quantized.base_layer("block_0_fc").dtype_policy.name == policy
    assert all(weight.dtype == tf.float32 for weight in quantized.weights)
    assert_on_grids(quantized, config)
    keras.mixed_precision.set_global_policy("float32")
    assert_same_bits(quantize(plain, config, IDS), quantized)  # the file computes in float32


def test_a_pruned_and_a_saved_model(tiny_model: Any, tmp_path: Path) -> None:
    pruned = strip_pruning(
        prune(tiny_model(), PruneConfig(sparsity=0.5, schedule="constant", min_weights=1))
    )
    config = QuantConfig("int8", activations="static", smoothing=0.5, bias_correction=True)
    pruned.sampler = "top_k"
    quantized = quantize(pruned, config, IDS)
    before, after = sparsity(pruned), sparsity(quantized)
    assert before["total"] > 0.4
    assert all(after[name] >= before[name] for name in before)
    assert quantized.sampler == "top_k"
    save_model(quantized, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert_same_bits(loaded, quantized)
    assert loaded.activation_ranges == quantized.activation_ranges
    assert_same_bits(quantize(loaded, config, IDS), quantized)


def test_the_tokenizer_goes_along(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model(vocab_size=320)
    model.tokenizer = tiny_tokenizer
    assert quantize(model).tokenizer is tiny_tokenizer


# Quality


def test_biases_take_back_the_mean_error(tiny_model: Any) -> None:
    model = tiny_model()
    outputs = {}
    for correction in (False, True):
        config = QuantConfig("int4", granularity="tensor", bias_correction=correction)
        quantized = quantize(model, config, IDS)
        tap = keras.Model(quantized.inputs, quantized.base_layer("block_0_qkv").input)
        x = tap(IDS).numpy().reshape(-1, 24).astype(np.float64)
        weights, folded = named_weights(quantized), fold_layer_norms(named_weights(model))
        wanted = x @ folded["block_0_qkv/kernel"] + folded["block_0_qkv/bias"]
        found = x @ weights["block_0_qkv/kernel"] + weights["block_0_qkv/bias"]
        outputs[correction] = np.abs((wanted - found).mean(0)).max()
    assert outputs[True] < 1e-5
    assert outputs[False] > 1e-2


def sample_ids(model: GPTModel, start: int, examples: int, length: int, seed: int) -> np.ndarray:
    """Text as the model writes it."""
    ids = np.full((examples, 1), start, np.int32)
    forward = tf.function(model, reduce_retracing=True)
    for step in range(length):
        drawn = tf.random.stateless_categorical(forward(ids)[:, -1], 1, [seed, step], tf.int32)
        ids = np.concatenate([ids, drawn.numpy()], axis=1)
    return ids


def test_gptq_is_nearer_to_a_real_model(shared_data: Path) -> None:
    from tf_gptopt.evaluation.quality import measure_quality
    from tf_gptopt.models.checkpoints import load_checkpoint

    model = load_checkpoint(shared_data / "gpt" / "chemts_gpt2_0.5m")
    calibration, held_out = (sample_ids(model, 13, 48, 30, seed) for seed in (0, 1))
    batches = [(held_out[:, :-1], held_out[:, 1:])]

    def distance(**options: Any) -> float:
        config = QuantConfig("int4", range="mse", **options)
        return measure_quality(quantize(model, config, calibration), batches, model).kl

    rounded, solved = distance(), distance(rounding="gptq")
    assert solved < 0.7 * rounded


# The call


def test_progress_goes_from_start_to_end(tiny_model: Any) -> None:
    config = QuantConfig(activations="static", smoothing=0.5, rounding="gptq")
    seen: list[tuple[int, int, str]] = []
    quantize(tiny_model(), config, IDS, on_progress=lambda *report: seen.append(report))
    done, totals, words = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    assert 0 < done[0] < done[-1] / 4
    assert "block 1" in words


def test_several_devices_give_the_same_weights(run_child: Callable[..., str]) -> None:
    code = """
        import numpy as np
        import tensorflow as tf
        from tf_gptopt.compression.quantization.config import QuantConfig
        from tf_gptopt.compression.quantization.ptq import quantize
        from tf_gptopt.models.checkpoints import assign_weights, named_weights
        from tf_gptopt.models.gpt import GPTModel

        ids = np.random.default_rng(1).integers(0, 61, (9, 14))
        config = QuantConfig(activations="static", smoothing=0.5, rounding="gptq")
        alone = GPTModel(61, 32, 2, 2, max_sequence_length=16)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            model = GPTModel(61, 32, 2, 2, max_sequence_length=16)
        assign_weights(model, named_weights(alone))
        expected = quantize(alone, config, ids)
        found = quantize(model, config, ids)
        assert found.distribute_strategy is strategy
        assert found.activation_ranges == expected.activation_ranges
        for name, array in named_weights(expected).items():
            np.testing.assert_array_equal(named_weights(found)[name], array)
        print("the same")
    """
    assert "the same" in run_child(code, devices=2)


def test_mistakes_are_explained(tiny_model: Any) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="strip_pruning"):
        quantize(prune(model, PruneConfig(min_weights=1)))
    with pytest.raises(UserError, match="strip_quantization"):
        quantize(quantize_aware(model))
    with pytest.raises(UserError, match="GPTModel is needed"):
        quantize(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(UserError, match="looks at text: give quantize"):
        quantize(model, QuantConfig("int4", rounding="gptq"))
    with pytest.raises(UserError, match="token ids 0 to 60"):
        quantize(model, QuantConfig(bias_correction=True), IDS + 20)
    with pytest.raises(UserError, match="matches no layer"):
        quantize(model, QuantConfig(float_layers="block_7_*"))
    weights = named_weights(model)
    weights["block_1_fc/bias"][3] = np.nan
    assign_weights(model, weights)
    with pytest.raises(UserError, match="block_1_fc/bias"):
        quantize(model)
    weights["block_1_fc/bias"][3] = 0
    weights["block_1_fc/kernel"][3] = 1e6
    assign_weights(model, weights)
    with pytest.raises(UserError, match="65504"):
        quantize(model, QuantConfig("float16"))
    with pytest.raises(UserError, match="too large for blocks"):
        quantize(scaled(tiny_model(num_heads=2, embedding_dim=32), 1e7), QuantConfig("int4"))


def scaled(model: GPTModel, factor: float) -> GPTModel:
    weights = named_weights(model)
    for name in quantizable_layers(weights).values():
        weights[name] *= np.float32(factor)
    assign_weights(model, weights)
    return model
