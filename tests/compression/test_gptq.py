"""GPTQ: the paper's algorithm exactly, on grids that files have, and better than rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import least_squares
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt.compression.quantization.gptq import solve_kernel
from tf_gptopt.compression.quantization.grids import find_grid, find_scales, quantize_matrix
from tf_gptopt.models.gpt import GPTModel

IDS = np.random.default_rng(1).integers(0, 61, (9, 14))
KINDS = [(8, "tensor"), (8, "channel"), (4, "tensor"), (4, "channel"), (4, 4), (4, 8)]


def problem(inputs: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `least_squares.problem`, the kernel float32."""
    x, kernel, hessian = least_squares.problem(inputs, outputs, seed)
    return x, kernel.astype(np.float32), hessian


def slow_gptq(kernel: np.ndarray, hessian: np.ndarray, bits: int, group: str | int) -> np.ndarray:
    """The paper's equations 2 and 3, an output and an input at a time, with the inverse Hessian of
    the inputs that are left taken anew at every step."""
    n, outputs = kernel.shape
    hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(n)
    w, low, high = kernel.astype(np.float64), *((-127, 127) if bits == 8 else (-8, 7))
    inverses = [np.linalg.inv(hessian[i:, i:]) for i in range(n)]
    size = group if isinstance(group, int) else n
    whole = find_scales(kernel.reshape(1, 1, -1), bits, "tensor").item()
    for j in range(outputs):
        for i in range(n):
            if i % size == 0:  # the scale of the group's weights as they are when it is reached
                members = w[i : i + size, j].astype(np.float32)[None, None]
                scale = float(find_scales(members, bits, group).item())
                scale = whole if group == "tensor" else scale
            q = np.clip(np.rint(w[i, j] / scale), low, high) * scale if kernel[i, j] else 0.0
            w[i:, j] -= (w[i, j] - q) / inverses[i][0, 0] * inverses[i][:, 0]
            w[i, j] = q
    return w


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    outputs=st.integers(1, 5),
    kind=st.sampled_from(KINDS),
    zeros=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 99),
)
def test_it_is_the_papers_algorithm(
    groups: int, outputs: int, kind: tuple[int, Any], zeros: float, seed: int
) -> None:
    bits, group = kind
    _, kernel, hessian = problem(groups * (group if isinstance(group, int) else 5), outputs, seed)
    kernel[np.random.default_rng(seed).random(kernel.shape) < zeros] = 0
    found = solve_kernel(kernel, hessian, bits, group)
    np.testing.assert_allclose(found, slow_gptq(kernel, hessian, bits, group), rtol=1e-6, atol=1e-9)
    assert not found[kernel == 0].any()
    assert find_grid(found.T, bits, group) is not None


@pytest.mark.parametrize("range", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("kind", [(8, "channel"), (4, "tensor"), (4, "channel"), (4, 32)])
def test_the_output_error_is_below_roundings(kind: tuple[int, Any], range: str) -> None:
    bits, group = kind
    x, kernel, hessian = problem(192, 48, seed=3)
    rounded = quantize_matrix(kernel.T, bits, group, range, 99).values().T
    solved = solve_kernel(kernel, hessian, bits, group, range, 99)
    assert np.linalg.norm(x @ (kernel - solved)) < 0.75 * np.linalg.norm(x @ (kernel - rounded))


def test_many_outputs_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from tf_gptopt.compression.quantization import gptq

    _, kernel, hessian = problem(32, 50, seed=5)
    whole = solve_kernel(kernel, hessian, 4, "tensor", "mse")
    monkeypatch.setattr(gptq, "_OUTPUTS", 7)
    np.testing.assert_array_equal(solve_kernel(kernel, hessian, 4, "tensor", "mse"), whole)


def test_what_is_on_its_grid_stays(tiny_model: Callable[..., GPTModel]) -> None:
    _, kernel, hessian = problem(32, 9, seed=1)
    solved = solve_kernel(kernel, hessian, 4, 8)
    np.testing.assert_array_equal(solve_kernel(solved, hessian, 4, 8), solved)


def test_inputs_that_are_always_zero() -> None:
    _, kernel, hessian = problem(16, 9, seed=1)
    hessian[3], hessian[:, 3] = 0, 0
    solved = solve_kernel(kernel, hessian, 4, "channel")
    assert np.isfinite(solved).all()
    assert find_grid(solved.T, 4, "channel") is not None
    blind = solve_kernel(kernel, np.zeros((16, 16)), 4, "channel")  # no text at all: plain rounding
    np.testing.assert_array_equal(blind, quantize_matrix(kernel.T, 4).values().T)
