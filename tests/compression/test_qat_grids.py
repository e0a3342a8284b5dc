"""The arithmetic of QAT's weights: NumPy's grids to the last bit, found again from the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tf_gptopt.compression.quantization import fake_quantize as module
from tf_gptopt.compression.quantization.fake_quantize import Layout, fake_quantize, start_ranges
from tf_gptopt.compression.quantization.grids import LIMITS, Grid, find_grid, quantize_matrix

GROUPS = ["tensor", "channel", 32, 64]
SCHEMES = [(bits, group) for bits in (8, 4) for group in GROUPS if bits == 4 or group != 64]
MINMAX = ("minmax", 99.9, None)


def started(
    weights: np.ndarray, bits: int, layout: Layout, ranges: Any = MINMAX, learned: bool = False
) -> dict[str, Any]:
    """The arguments of `fake_quantize` behind the weights."""
    clip, reach = start_ranges(weights, bits, layout, *ranges)
    if learned:
        return {"bits": float(bits), "clip": np.ones_like(clip), "layout": layout, "reach": reach}
    return {"bits": float(bits), "clip": clip, "layout": layout}


def grid_of(values: Any, bits: int, layout: Layout) -> Grid:
    grid = find_grid(layout.matrix(np.asarray(values)), bits, layout.group_at(bits))
    assert grid is not None
    low, high = LIMITS[bits]
    assert low <= grid.integers.min()
    assert grid.integers.max() <= high
    np.testing.assert_array_equal(grid.values(), layout.matrix(np.asarray(values)))
    return grid


numbers = st.floats(-(2.0**12), 2.0**12, width=32) | st.floats(-1, 1, width=32) | st.just(0.0)


@example(  # a percentile that leaves nothing of the largest weight
    weights=np.float32([[1.0, 1.2e-23, 0, 0, 0, 0, 0, 0]]),
    scheme=(8, "tensor"),
    ranges=("percentile", 80.0, None),
    axis=0,
    learned=False,
)
@settings(max_examples=120, deadline=None)
@given(
    # rows of 64 that repeat a few numbers: hypothesis shrinks those far faster
    weights=st.integers(1, 3).flatmap(
        lambda n: arrays.arrays(np.float32, (n, 8), elements=numbers)
    ),
    scheme=st.sampled_from(SCHEMES),
    ranges=st.sampled_from([MINMAX, ("percentile", 80.0, None), ("mse", 99.9, None)]),
    axis=st.integers(0, 1),
    learned=st.booleans(),
)
def test_the_grid_is_numpys_and_comes_back(
    weights: np.ndarray, scheme: Any, ranges: Any, axis: int, learned: bool
) -> None:
    bits, group = scheme
    matrix = np.tile(weights, 8) * np.repeat(np.float32([1, 0.3]), 32)
    layout, weights = Layout(axis, group), matrix if axis == 0 else matrix.T
    start = started(weights, bits, layout, ranges, learned)
    values = fake_quantize(weights, **start).numpy()
    if find_grid(matrix, bits, layout.group_at(bits)) is None:
        expected = quantize_matrix(matrix, bits, layout.group_at(bits), *ranges[:2])
        np.testing.assert_array_equal(layout.matrix(values), expected.values())
    else:
        np.testing.assert_array_equal(values, weights)
    grid_of(values, bits, layout)
    # later, whatever the weights have become
    moved = weights * np.float32(1.25) + np.float32(0.01) * np.abs(weights).max()
    moved[weights == 0] = 0
    later = fake_quantize(moved, **start).numpy()
    grid_of(later, bits, layout)
    # and who starts again starts from there
    again = started(later, bits, layout, ranges, learned)
    np.testing.assert_array_equal(fake_quantize(later, **again), later)


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_many_weights_come_back_exactly(bits: int, group: str | int) -> None:
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.integers(-20, 8, (1, 2_000)))
    weights = (rng.normal(size=(64, 2_000)) * spread).astype(np.float32)
    clips = rng.uniform(0.3, 1.0, 2_000 * 64).astype(np.float32)
    for axis, matrix in ((1, weights), (0, weights.T.copy())):
        layout = Layout(axis, group)
        count = np.prod(layout.groups(matrix.shape))
        values = fake_quantize(matrix, float(bits), clips[:count], layout).numpy()
        grid = grid_of(values, bits, layout)
        assert len(np.unique(grid.scales)) > min(count, 2_000) * 0.7  # many scales were tried


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
@pytest.mark.parametrize("learned", [False, True])
def test_compiled_loops_give_the_same_bits(bits: int, group: Any, learned: bool) -> None:
    rng = np.random.default_rng(1)
    weights = tf.Variable(rng.normal(size=(64, 1100)).astype(np.float32))
    mask = tf.constant(rng.random((64, 1100)) > 0.2)
    start = started(weights.numpy(), bits, Layout(1, group), ("mse", 99.9, None), learned)
    clip, start["bits"] = tf.Variable(start.pop("clip")), tf.Variable(float(bits))
    upstream = tf.constant(rng.normal(size=(64, 1100)).astype(np.float32))

    def run() -> Any:
        with tf.GradientTape() as tape:
            bits_now = {"bits": tf.convert_to_tensor(start["bits"])}
            values = fake_quantize(weights, clip=clip, mask=mask, **{**start, **bits_now})
        watched = [weights, clip] if learned else [weights]
        return values, *tape.gradient(values, watched, upstream)

    ours, compiled = run(), tf.function(run)()
    for a, b in zip(ours[:2], compiled[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(ours[2:], compiled[2:], strict=True):  # sums, in another order
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_stay_zero_and_finite() -> None:
    weights = np.zeros((32, 4), np.float32)
    weights[0] = [0, 1, 1e-38, -3]
    for bits, group in SCHEMES:
        if group != 64:
            layout = Layout(1, group)
            values = fake_quantize(weights, **started(weights, bits, layout)).numpy()
            assert not values[1:].any()
            assert not values[0, [0, 2]].any()
            assert values[0, 3] == pytest.approx(-3, abs=0.01)


def test_a_larger_weight_than_float16_scales_hold_stays_finite() -> None:
    clip = np.ones(1, np.float32)
    values = fake_quantize(np.full((32, 1), 1e7, np.float32), 4.0, clip, Layout(1, 32))
    np.testing.assert_array_equal(values, np.full((32, 1), 7 * 65504.0))


# Gradients


def test_gradients_pass_straight_through_and_stop_at_masks_and_clips() -> None:
    weights = tf.Variable(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    factors = tf.reshape(tf.range(12.0) - 5.0, (4, 3))
    mask = tf.reshape(tf.range(12), (4, 3)) % 3 != 0
    layout = Layout(1, "channel")
    for clip in (1.0, 0.5):
        for used in (None, mask):
            clips = np.full(3, clip, np.float32)
            with tf.GradientTape() as tape:
                result = fake_quantize(weights, 8.0, clips, layout, mask=used)
                loss = tf.reduce_sum(result * factors)
            kept = weights.numpy() * (1 if used is None else used.numpy())
            inside = np.abs(kept) <= clip * np.abs(kept).max(0) * 1.001
            assert inside.all() == (clip == 1)
            expected = np.where(inside, factors, 0) * (1 if used is None else used.numpy())
            np.testing.assert_array_equal(tape.gradient(loss, weights), expected)
            if used is not None:
                np.testing.assert_array_equal(result.numpy() != 0, mask)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_learned_scales_get_the_gradient_of_lsq(axis: int, bits: int, group: Any) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(3, 64)) * [[1], [2], [3]]).astype(np.float32)
    layout = Layout(axis, group)
    weights = rows if axis == 0 else rows.T.copy()
    upstream = rng.normal(size=weights.shape).astype(np.float32)
    start = started(weights, bits, layout, learned=True)
    clip = tf.Variable(start.pop("clip") * np.float32(0.6))
    with tf.GradientTape() as tape:
        values = fake_quantize(weights, clip=clip, **start)
    found = tape.gradient(values, clip, upstream).numpy()
    # equation 3 of the paper, group by group, and its gradient scale
    grid = grid_of(values, bits, layout)
    low, high = LIMITS[bits]
    size = rows.size // grid.scales.size
    steps = rows.reshape(grid.scales.size, size) / grid.scales.reshape(-1, 1)
    slopes = layout.matrix(upstream).reshape(-1, size)
    slope = np.where((steps > low) & (steps < high), np.rint(steps) - steps, 0)
    slope = np.where(steps <= low, low, np.where(steps >= high, high, slope))
    expected = (slope * slopes).sum(1) / np.sqrt(size * high)
    blocks = layout.groups(weights.shape)[layout.block_axis]
    if bits == 8:  # the blocks of a row move together
        expected = np.repeat(expected, blocks)
    expected = expected.reshape(-1, blocks)
    expected = expected if axis == 0 or group == "tensor" else expected.T
    np.testing.assert_allclose(found, expected.reshape(-1), rtol=2e-3, atol=1e-4)


def test_the_modules_limits_are_those_of_the_grids() -> None:
    for bits, limits in LIMITS.items():
        assert [float(x) for x in module._limits(float(bits))] == list(limits)
