"""Masks: exact counts in every pattern and scope, for any shape, over whatever is zero already."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt.compression.pruning.config import block_of, n_of_m
from tf_gptopt.compression.pruning.masks import choose, largest

UNITS = st.floats(0, 3.0, width=32) | st.sampled_from([0.0, 0.5, 1e-40, 3e38])
SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 9))
PATTERNS = st.sampled_from(
    ["unstructured", "2:4", "1:4", "3:5", "4:8", "4x4", "16x1", "1x3", "2x5"]
)
SCOPES = st.sampled_from(["layer", "output"])
ANY = settings(deadline=None, max_examples=50)


def kernel(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties and zeros, and which weights are alive."""
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.0, 0.25, 0.5, 1.0, 3.0], shape).astype(np.float32)
    return scores, rng.random(shape) < rng.choice([0.4, 1.0])


def groups_of(mask: np.ndarray, m: int) -> np.ndarray:
    """How many are kept in every group of m rows of each column."""
    padded = np.pad(mask, [(0, -len(mask) % m), (0, 0)])
    return padded.reshape(-1, m, mask.shape[1]).sum(1)


def blocks_of(mask: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """How many are kept in every block."""
    padded = np.pad(mask, [(0, -mask.shape[i] % block[i]) for i in (0, 1)])
    down, across = padded.shape[0] // block[0], padded.shape[1] // block[1]
    return padded.reshape(down, block[0], across, block[1]).sum((1, 3))


@given(scores=st.lists(UNITS, min_size=1, max_size=60), columns=st.integers(1, 4), data=st.data())
@ANY
def test_largest_keeps_exactly_the_largest_of_each_column(
    scores: list[float], columns: int, data: Any
) -> None:
    rows = len(scores)
    keep = data.draw(st.integers(0, rows))
    rng = np.random.default_rng(rows)
    table = np.stack([rng.permutation(scores) for _ in range(columns)], 1).astype(np.float32)
    ranks = table.view(np.int32) + 1
    expected = np.zeros_like(ranks, bool)
    for column in range(columns):
        expected[np.argsort(-table[:, column], kind="stable")[:keep], column] = True
    np.testing.assert_array_equal(largest(tf.constant(ranks), tf.constant(keep)), expected)


@given(shape=SHAPES, seed=st.integers(0, 99), scope=SCOPES, fraction=st.floats(0, 0.999))
@ANY
def test_unstructured_counts_are_exact(
    shape: tuple[int, int], seed: int, scope: str, fraction: float
) -> None:
    scores, alive = kernel(shape, seed)
    mask = choose(scores, alive, fraction, scope=scope).numpy()
    assert not mask[~alive].any()
    axis = 0 if scope == "output" else None
    weights = shape[0] if scope == "output" else scores.size
    keep = max(1, round(weights * (1 - fraction)))
    np.testing.assert_array_equal(mask.sum(axis), np.minimum(keep, alive.sum(axis)))
    if scope == "layer" and (alive & ~mask).any() and mask.any():
        assert scores[mask].min() >= scores[alive & ~mask].max()


@given(
    shape=SHAPES, seed=st.integers(0, 99), scope=SCOPES, n=st.integers(1, 4), more=st.integers(1, 4)
)
@ANY
def test_n_of_m_holds_for_any_shape_and_keeps_the_largest(
    shape: tuple[int, int], seed: int, scope: str, n: int, more: int
) -> None:
    m = n + more
    scores, alive = kernel(shape, seed)
    mask = choose(scores, alive, 1 - n / m, f"{n}:{m}", scope).numpy()
    # as many as the pattern allows, in the group of the last rows as well
    np.testing.assert_array_equal(groups_of(mask, m), np.minimum(n, groups_of(alive, m)))
    for start in range(0, shape[0], m):
        rows = slice(start, start + m)
        for column in range(shape[1]):
            kept = scores[rows, column][mask[rows, column]]
            gone = scores[rows, column][(alive & ~mask)[rows, column]]
            assert not gone.size or not kept.size or kept.min() >= gone.max()


@given(shape=SHAPES, seed=st.integers(0, 99), fraction=st.floats(0, 0.999))
@pytest.mark.parametrize("pattern", ["4x4", "16x1", "1x3"])
@settings(deadline=None, max_examples=25)
def test_whole_blocks_go_by_their_mean(
    shape: tuple[int, int], seed: int, fraction: float, pattern: str
) -> None:
    block = block_of(pattern)
    scores, alive = kernel(shape, seed)
    mask = choose(scores, alive, fraction, pattern).numpy()
    kept, there = blocks_of(mask, block), blocks_of(alive, block)
    assert set(np.unique(kept[kept > 0] == there[kept > 0])) <= {True}  # all of it, or nothing
    keep = max(1, round(kept.size * (1 - fraction)))
    assert np.count_nonzero(kept) == min(keep, np.count_nonzero(there))
    sums = blocks_of(np.where(alive, scores, 0), block)
    means = sums / blocks_of(np.ones(shape), block)
    gone = (kept == 0) & (there > 0)
    if gone.any() and kept.any():
        assert means[kept > 0].min() >= means[gone].max() - 1e-6


@given(shape=SHAPES, seed=st.integers(0, 99), pattern=PATTERNS, scope=SCOPES, data=st.data())
@ANY
def test_masks_are_nested_while_sparsity_rises(
    shape: tuple[int, int], seed: int, pattern: str, scope: str, data: Any
) -> None:
    scores, alive = kernel(shape, seed)
    n, m = n_of_m(pattern) or (0, 1)
    path = sorted(data.draw(st.lists(st.floats(0, 0.99 * (1 - n / m)), max_size=3)))
    path = [*path, 1 - n / m] if n else path
    mask = alive
    for fraction in path:
        fresh = choose(scores, alive, fraction, pattern, scope).numpy()
        before, mask = mask, choose(scores, mask, fraction, pattern, scope).numpy()
        assert not (mask & ~before).any()
        assert mask.sum() == fresh.sum()  # the way there changes no count
    if n and path:
        assert groups_of(mask, m).max() <= n


def test_an_unfinished_n_of_m_has_taken_only_what_it_will_take_anyway() -> None:
    scores, alive = np.random.default_rng(0).random((12, 5), np.float32), np.ones((12, 5), bool)
    half_way = choose(scores, alive, 0.25, "2:4").numpy()
    whole = choose(scores, alive, 0.5, "2:4").numpy()
    assert (half_way.sum(), whole.sum()) == (45, 30)
    assert not (whole & ~half_way).any()
    # of 14 inputs the last two stay, so the way is no longer
    scores, alive = np.ones((14, 5), np.float32), np.ones((14, 5), bool)
    assert choose(scores, alive, 0.25, "2:4").numpy().sum() == 55
