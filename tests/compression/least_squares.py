"""The problem that SparseGPT and GPTQ solve for a layer, with random numbers."""

from __future__ import annotations

import numpy as np


def problem(
    inputs: int, outputs: int, seed: int, rows: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlated inputs of different sizes, a kernel, and the Hessian of both, float64."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs)) * rng.lognormal(size=inputs)
    x = rng.normal(size=(rows or 4 * inputs, inputs)) @ mix / inputs**0.5
    return x, rng.normal(size=(inputs, outputs)), x.T @ x * (2 / len(x))
