"""SparseGPT: the paper's algorithm exactly, exact counts in every pattern, and better models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from least_squares import problem

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.compression.hessian import inverse_factor
from tf_gptopt.compression.pruning.config import PruneConfig
from tf_gptopt.compression.pruning.pruner import prune, sparsity, strip_pruning
from tf_gptopt.compression.pruning.sparsegpt import prune_kernel, solve
from tf_gptopt.models.checkpoints import load_checkpoint
from tf_gptopt.models.gpt import GPTModel

IDS = np.random.default_rng(1).integers(0, 61, (9, 14))


def once(**arguments: Any) -> PruneConfig:
    return PruneConfig(schedule="constant", score="sparsegpt", **arguments)


def slow_sparsegpt(
    kernel: np.ndarray, hessian: np.ndarray, config: PruneConfig, stretch: int
) -> np.ndarray:
    """The paper's algorithm 1, an output and an input at a time, with the inverse Hessian of the
    inputs that are left taken anew at every step; N:M and unstructured."""
    n, outputs = kernel.shape
    hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(n)
    inverses = [np.linalg.inv(hessian[i:, i:]) for i in range(n)]
    w, mask = kernel.copy(), np.ones(kernel.shape, bool)
    keep = max(1, round(kernel.size * (1 - config.sparsity)))
    size = config.n_of_m[1] if config.n_of_m else stretch
    kept = 0
    for i in range(n):
        if i % size == 0:
            rows = range(i, min(i + size, n))
            saliency = np.array(
                [[w[r, j] ** 2 / inverses[r][0, 0] for j in range(outputs)] for r in rows]
            )
            if config.n_of_m:
                for j in range(outputs):
                    best = np.argsort(-saliency[:, j])[: config.n_of_m[0]]
                    mask[i : i + size, j] = False
                    mask[i + best, j] = True
            else:
                share = int(keep * (rows[-1] + 1) / n + 0.5) - kept
                kept += share
                flat = np.zeros(saliency.size, bool)
                flat[np.argsort(-saliency.ravel())[:share]] = True
                mask[i : i + size] = flat.reshape(saliency.shape)
        for j in range(outputs):
            if not mask[i, j]:
                w[i:, j] -= w[i, j] / inverses[i][0, 0] * inverses[i][:, 0]
                w[i, j] = 0.0
    return w


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 23),
    outputs=st.integers(1, 6),
    stretch=st.integers(1, 9),
    pattern=st.sampled_from(["unstructured", "2:4", "1:3"]),
    fraction=st.floats(0.0, 0.95),
    seed=st.integers(0, 99),
)
def test_it_is_the_papers_algorithm(
    inputs: int, outputs: int, stretch: int, pattern: str, fraction: float, seed: int
) -> None:
    _, kernel, hessian = problem(inputs, outputs, seed)
    config = once(pattern=pattern) if ":" in pattern else once(sparsity=fraction)
    expected = slow_sparsegpt(kernel, hessian, config, stretch)
    found = prune_kernel(kernel, hessian, config, stretch)
    np.testing.assert_array_equal(found != 0, expected != 0)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, _, hessian = problem(17, 1, 0)
    factor, unseen = inverse_factor(hessian)
    dampened = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(17)
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(dampened), rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(factor, np.triu(factor))
    assert not unseen.any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x4"])
def test_the_error_is_below_wandas_below_magnitudes_below_chances(pattern: str) -> None:
    x, kernel, hessian = problem(192, 48, seed=3)
    config = once(pattern=pattern)

    def error(pruned: np.ndarray) -> float:
        return np.linalg.norm(x @ (kernel - pruned)) / np.linalg.norm(x @ kernel)

    def masked(score: np.ndarray) -> np.ndarray:
        from tf_gptopt.compression.pruning.masks import choose

        alive = np.ones(kernel.shape, bool)
        kept = choose(tf.constant(score, tf.float32), tf.constant(alive), 0.5, pattern)
        return np.where(kept.numpy(), kernel, 0.0)

    solved = prune_kernel(kernel, hessian, config)
    norms = np.linalg.norm(x, axis=0)[:, None]
    errors = [
        error(solved),
        error(np.where(solved != 0, kernel, 0.0)),  # its mask alone, without the update
        error(masked(np.abs(kernel) * norms)),
        error(masked(np.abs(kernel))),
        error(masked(np.random.default_rng(0).random(kernel.shape))),
    ]
    assert errors[0] < 0.95 * min(errors[1:])
    assert errors[2] < errors[3] < errors[4]


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 11),
    stretch=st.integers(1, 40),
    pattern=st.sampled_from(["unstructured", "2:4", "3:7", "4x4", "1x3", "16x1"]),
    scope=st.sampled_from(["layer", "output"]),
    fraction=st.floats(0.0, 0.97),
    zeros=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
def test_counts_are_exact_and_zeros_stay(
    inputs: int,
    outputs: int,
    stretch: int,
    pattern: str,
    scope: str,
    fraction: float,
    zeros: float,
    seed: int,
) -> None:
    _, kernel, hessian = problem(inputs, outputs, seed)
    kernel = np.where(np.random.default_rng(seed).random(kernel.shape) < zeros, 0.0, kernel)
    config = once(
        pattern=pattern, **({} if ":" in pattern else {"sparsity": fraction}), scope=scope
    )
    found = prune_kernel(kernel.astype(np.float32), hessian, config, stretch)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert not found[kernel == 0].any()
    assert not np.signbit(found[found == 0]).any()
    if config.n_of_m:
        n, m = config.n_of_m
        for start in range(0, inputs, m):
            present = np.count_nonzero(kernel[start : start + m], axis=0)
            kept = np.count_nonzero(found[start : start + m], axis=0)
            np.testing.assert_array_equal(kept, np.minimum(present, n))
        return
    height, width = config.block
    before, after = (
        np.array(
            [
                [
                    np.count_nonzero(w[i : i + height, j : j + width])
                    for j in range(0, outputs, width)
                ]
                for i in range(0, inputs, height)
            ]
        )
        for w in (kernel, found)
    )
    np.testing.assert_array_equal(after[after > 0], before[after > 0])  # blocks go as a whole
    axis = 0 if scope == "output" else None
    units = before.shape[0] if scope == "output" else before.size
    keep = max(1, round(units * (1 - fraction)))
    np.testing.assert_array_equal(
        np.count_nonzero(after, axis), np.minimum(np.count_nonzero(before, axis), keep)
    )


def test_inputs_that_are_always_zero_lose_their_weights_first() -> None:
    x, kernel, _ = problem(40, 8, 0)
    x[:, 5:15] = 0.0
    found = prune_kernel(kernel, x.T @ x, once(sparsity=0.25))
    assert not found[5:15].any()
    np.testing.assert_array_equal(found[:5], kernel[:5])  # and nothing else was touched
    np.testing.assert_array_equal(found[15:], kernel[15:])
    assert np.count_nonzero(prune_kernel(kernel, 0 * x.T @ x, once())) == kernel.size / 2


def test_a_kernel_of_zeros_stays_as_it_is() -> None:
    _, kernel, hessian = problem(8, 4, 0)
    assert not prune_kernel(0 * kernel, hessian, once()).any()


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    _, kernel, hessian = problem(30, 5, 0)
    a, b = (prune_kernel(kernel, scale * hessian, once()) for scale in (1.0, 1e-6))
    np.testing.assert_allclose(a, b, rtol=1e-9)


# Models


def sample(model: GPTModel, first: int, examples: int, length: int) -> np.ndarray:
    """What `model` itself writes."""
    rng, ids = np.random.default_rng(0), np.full((examples, 1), first, np.int32)
    spec = tf.TensorSpec([None, None], tf.int32)
    last = tf.function(lambda x: model(x, training=False)[:, -1], input_signature=[spec])
    while ids.shape[1] < length:
        logits = last(tf.constant(ids)).numpy()
        chosen = np.argmax(logits + rng.gumbel(size=logits.shape), 1)
        ids = np.append(ids, chosen[:, None].astype(np.int32), 1)
    return ids


def loss_of(model: GPTModel, ids: np.ndarray) -> float:
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(ids[:, 1:], model(ids[:, :-1]))
    return float(tf.reduce_mean(losses))


def test_a_trained_model_suffers_in_the_papers_order(shared_data: Path) -> None:
    model = load_checkpoint(shared_data / "gpt" / "chemts_gpt2_0.5m")
    ids = sample(model, 13, 144, 24)  # 13 begins a molecule
    ids, held_out = ids[:96], ids[96:]
    losses = [loss_of(model, held_out)]
    for score in ("sparsegpt", "wanda", "magnitude", "random"):
        scope = "output" if score == "wanda" else "layer"
        config = PruneConfig(0.5, schedule="constant", score=score, scope=scope)
        pruned = strip_pruning(prune(model, config, ids))
        assert sparsity(pruned)["block_1_out"] == 0.5
        losses.append(loss_of(pruned, held_out))
    rises = np.diff(losses)
    assert rises[0] < 0.7 * sum(rises[:2])  # SparseGPT costs well below what Wanda costs
    assert (rises > 0).all(), losses


def test_solve_changes_the_chosen_kernels_alone_and_repeats(tiny_model: Callable) -> None:
    shape = {"num_heads": (2, 3), "head_dim": 5, "intermediate_dim": (40, 17)}
    chosen = ["block_0_fc", "block_1_qkv", "token_logits"]
    models = [tiny_model(**shape, tie_embeddings=False) for _ in range(3)]
    calls: list[tuple] = []
    for model in models[:2]:
        solve(model, once(), IDS, chosen, lambda *call: calls.append(call))
    for layer, again, before in zip(*(m.layers for m in models), strict=True):
        for a, b, old in zip(*(la.get_weights() for la in (layer, again, before)), strict=True):
            np.testing.assert_array_equal(a, b)
            if layer.name in chosen and a.ndim == 2:
                assert np.mean(a == 0) == 0.5
                assert np.mean(a == old) < 0.1  # what stays has adapted
            else:
                np.testing.assert_array_equal(a, old)
    assert calls[-1][0] == calls[-1][1]


def test_later_layers_are_solved_for_what_pruned_blocks_hand_on(tiny_model: Callable) -> None:
    model, half = tiny_model(), tiny_model()
    blocks = [f"block_0_{part}" for part in ("qkv", "proj", "fc", "out")]
    solve(half, once(), IDS, blocks)
    solve(half, once(), IDS, ["block_1_qkv"])  # on a model whose block 0 is pruned already
    solve(model, once(), IDS, [*blocks, "block_1_qkv"])
    for name in [*blocks, "block_1_qkv"]:
        a, b = (m.base_layer(name).kernel.numpy() for m in (model, half))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_mixed_precision_gives_masks_in_float32(tiny_model: Callable) -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    pruned = prune(tiny_model(), once(pattern="2:4"), IDS)
    kernel = strip_pruning(pruned).base_layer("block_1_fc").kernel
    assert kernel.dtype == tf.float32
    assert (np.count_nonzero(kernel.numpy().reshape(-1, 4, kernel.shape[1]), axis=1) == 2).all()


def test_mistakes(tiny_model: Callable) -> None:
    with pytest.raises(UserError, match="cannot compare"):
        once(scope="global")
    with pytest.raises(UserError, match="one shot"):
        PruneConfig(score="sparsegpt")
    with pytest.raises(UserError, match="no Dense layer"):
        solve(tiny_model(), once(), IDS, ["fc"])
    with pytest.raises(UserError, match="0 to 60"):
        solve(tiny_model(), once(), IDS + 60, ["block_0_fc"])
