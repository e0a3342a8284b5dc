"""Grids: rounding is nearest, zeros stay, and any grid is found again to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.grids import (
    LIMITS,
    find_grid,
    find_scales,
    grouped_view,
    quantize_matrix,
)

KINDS = [(8, "tensor"), (8, "channel"), (4, "tensor"), (4, "channel"), (4, 4)]
RANGES = ("minmax", "percentile", "mse")
MATRICES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 12])),
    elements=st.floats(-1e4, 1e4, width=32) | st.floats(-0.125, 0.125, width=32) | st.just(0.0),
)


@settings(max_examples=200, deadline=None)
@given(matrix=MATRICES, kind=st.sampled_from(KINDS), range=st.sampled_from(RANGES))
def test_a_grid_is_found_again_to_the_last_bit(matrix, kind, range) -> None:
    bits, group = kind
    grid = quantize_matrix(matrix, bits, group, range, percentile=80)
    assert grid.integers.min() >= LIMITS[bits][0]
    assert grid.integers.max() <= LIMITS[bits][1]
    values = grid.values()
    assert not values[matrix == 0].any()
    found = find_grid(values, bits, group)
    np.testing.assert_array_equal(found.values(), values)
    assert found.scales.shape == grid.scales.shape


@pytest.mark.parametrize(("bits", "group"), [*KINDS, (4, 32)])
def test_rounding_is_to_the_nearest_point(bits: int, group: str | int) -> None:
    matrix = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    grid = quantize_matrix(matrix, bits, group)
    error = np.abs(grouped_view(grid.values() - matrix, group)).max(2)
    assert (error <= 0.5001 * grid.scales).all()
    assert grid.block == (group if isinstance(group, int) else None)


def test_a_matrix_on_no_grid_is_known() -> None:
    matrix = np.random.default_rng(0).normal(size=(400, 64)).astype(np.float32)
    for bits, group in (*KINDS, (4, 32)):
        assert find_grid(matrix, bits, group) is None
        almost = quantize_matrix(matrix, bits, group).values()
        almost[-1, -1] = np.nextafter(almost[-1, -2], np.float32(9))
        assert find_grid(almost, bits, group) is None


def test_every_one_of_many_scales_comes_back() -> None:
    matrix = np.random.default_rng(0).normal(size=(20_000, 5)).astype(np.float32)
    grid = quantize_matrix(matrix)
    found = find_grid(grid.values())
    np.testing.assert_array_equal(found.scales, grid.scales)
    np.testing.assert_array_equal(found.integers, grid.integers)
    np.testing.assert_allclose(grid.scales[:, 0], np.abs(matrix).max(1) / 127, rtol=2**-16)


def test_least_squares_never_loses_to_the_full_range() -> None:
    matrix = np.random.default_rng(0).standard_t(3, size=(64, 128)).astype(np.float32)
    for bits, group in ((8, "channel"), (4, "channel"), (4, 32)):
        errors = [
            np.square(quantize_matrix(matrix, bits, group, range).values() - matrix).sum()
            for range in ("mse", "minmax")
        ]
        assert errors[0] <= errors[1]
        assert errors[0] < errors[1] or bits == 8  # 127 steps seldom gain from clipping


def test_a_percentile_clips() -> None:
    matrix = np.full((1, 1000), 0.5, np.float32)
    matrix[0, :2] = 100.0, -100.0
    values = quantize_matrix(matrix, range="percentile", percentile=99.0).values()
    np.testing.assert_allclose(np.abs(values), 0.5, rtol=1e-4)


def test_groups_without_weights_are_zeros_with_scale_one() -> None:
    matrix = np.zeros((2, 64), np.float32)
    matrix[1, 0] = 1e-38
    for bits, group in ((8, "channel"), (4, 32), (8, "tensor")):
        grid = quantize_matrix(matrix, bits, group)
        assert not grid.integers.any()
        assert (grid.scales == 1).all()


def test_one_peak_for_all() -> None:
    matrix = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    grid = quantize_matrix(matrix, group="tensor", peak=50.0)
    assert grid.scales[0, 0] == pytest.approx(50 / 127, rel=1e-4)
    np.testing.assert_array_equal(find_grid(grid.values(), group="tensor").values(), grid.values())


def test_blocks_have_their_limits() -> None:
    with pytest.raises(UserError, match="do not divide"):
        quantize_matrix(np.ones((2, 48), np.float32), 4, 32)
    with pytest.raises(UserError, match="float16"):
        quantize_matrix(np.full((2, 64), 1e9, np.float32), 4, 32)
    scales = find_scales(grouped_view(np.ones((2, 64), np.float32), 32), 4, 32)
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
