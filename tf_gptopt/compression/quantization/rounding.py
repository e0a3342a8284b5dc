"""Which matrix of a GPT gets which grid, and the rounding to it. numpy alone.

What `QuantConfig` says of weights, done in one place, for `quantize`, training and the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.grids import (
    LIMITS,
    Grid,
    find_grid,
    find_scales,
    quantize_matrix,
)

TABLE = "token_embedding/embeddings"
POSITIONS = "position_embedding/embeddings"


def quantizable_layers(weights: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Layers whose matrices can be integers, and their matrices' names, in the model's order:
    `{"token_embedding": "token_embedding/embeddings", "block_0_qkv": "block_0_qkv/kernel", ...}`.

    Args:
        weights: by name, as `models.checkpoints.named_weights` gives them.
    """
    names = [name for name in weights if name == TABLE or name.endswith("/kernel")]
    return {name.partition("/")[0]: name for name in names}


def matrix_rows(name: str, weight: np.ndarray) -> np.ndarray:
    """`(rows, width)` as grids and files have it, of a Dense kernel `(in, out)` or the token table;
    applied twice it gives the weight again."""
    return weight if name == TABLE else weight.T


def shared_peaks(weights: Mapping[str, np.ndarray], config: QuantConfig) -> dict[int, float]:
    """How far the grids of granularity "global" reach, for 8 bits and for 4."""
    together: dict[int, list[np.ndarray]] = {}
    for layer, name in quantizable_layers(weights).items():
        if not config.keeps_float(layer) and config.group_of(layer) == "global":
            together.setdefault(BITS[config.weights_of(layer)], []).append(weights[name].ravel())
    peaks = {}
    for bits, matrices in together.items():
        grouped = np.concatenate(matrices)[None, None]
        scale = find_scales(grouped, bits, "global", config.range, config.percentile)
        peaks[bits] = float(scale.item() * LIMITS[bits][1])
    return peaks


def layer_grid(
    layer: str, rows: np.ndarray, config: QuantConfig, peaks: Mapping[int, float] | None = None
) -> Grid:
    """The grid of a layer's matrix: the one that it lies on, or else the nearest points of what
    `config` says.

    Args:
        layer: its name, without wrappers; one whose weights `config` makes integers.
        rows: `(rows, width)` float32, as `matrix_rows` gives them.
        peaks: `shared_peaks` of the whole model, for granularity "global".
    """
    bits, group = BITS[config.weights_of(layer)], config.group_of(layer, rows.shape[1])
    found = find_grid(rows, bits, group)
    if found is not None:
        return found
    peak = (peaks or {}).get(bits) if group == "global" else None
    return quantize_matrix(rows, bits, group, config.range, config.percentile, peak)


def round_weights(weights: Mapping[str, np.ndarray], config: QuantConfig) -> dict[str, np.ndarray]:
    """`weights` with every matrix on its grid, or rounded to float16 where that is asked for, and
    the position table as the file has it."""
    peaks = shared_peaks(weights, config)
    matrices = quantizable_layers(weights)
    return {
        **weights,
        POSITIONS: round_positions(weights[POSITIONS], config),
        **{name: round_matrix(name, weights[name], config, peaks) for name in matrices.values()},
    }


def is_rounded(weights: Mapping[str, np.ndarray], config: QuantConfig) -> bool:
    """Whether `round_weights` would change nothing."""
    rounded = round_weights(weights, config)
    return all(np.array_equal(rounded[name], weights[name]) for name in weights)


def round_matrix(
    name: str, weight: np.ndarray, config: QuantConfig, peaks: Mapping[int, float] | None = None
) -> np.ndarray:
    """One of the weights that `quantizable_layers` lists, rounded to what `config` says of it."""
    layer = name.partition("/")[0]
    if not config.keeps_float(layer):
        grid = layer_grid(layer, matrix_rows(name, weight), config, peaks)
        return matrix_rows(name, grid.values())
    return as_float16(name, weight) if config.weights_of(layer) == "float16" else weight


def round_positions(table: np.ndarray, config: QuantConfig) -> np.ndarray:
    """The position table as the file has it: float32 or float16 beside such weights, float16 beside
    int8, and int8 beside int4, each position with its scale."""
    kind = config.weights_of("position_embedding")
    if kind == "int4":
        return position_grid(table).values()
    return table if kind == "float32" else as_float16(POSITIONS, table)


def position_grid(table: np.ndarray) -> Grid:
    """The grid of an int8 position table `(context, width)`."""
    return find_grid(table) or quantize_matrix(table)


def as_float16(name: str, weight: np.ndarray) -> np.ndarray:
    """`weight` rounded to float16, as float32.

    Raises:
        UserError: for numbers that float16 cannot hold.
    """
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(
            f"Weight {name!r} holds numbers beyond float16's 65504. Keep its layer in float32 "
            "(float_layers), or take integers."
        )
    return half.astype(np.float32)
