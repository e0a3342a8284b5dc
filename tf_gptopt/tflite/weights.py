"""A GPT's weights as they lie in the file: folded, in the scheme's type, each once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.tflite.flatbuffer import Constant, Model
from tf_gptopt.tflite.layers import Block, Dense, Weights

INT8_MAX = 127  # -128 is not used, so that the grid is symmetric
_ALL_ZERO = 1e-30  # a row of nothing but smaller numbers is stored as zeros, with scale 1


def store_weights(
    model: Model,
    config: GPTConfig,
    weights: dict[str, np.ndarray],
    scheme: str,
    keeps_float: Callable[[str], bool] = lambda layer: False,
) -> Weights:
    """Write a GPT's weights into `model`, its LayerNorms and the attention's scale folded.

    Args:
        weights: as `models.checkpoints.named_weights` gives them.
        scheme: `"int8"`: the products' kernels and the token table are int8 with one scale per
            output channel or token, and the position table is float16; `"float16"`: all of these
            are float16; `"float32"`.
        keeps_float: whether the layer of this name stays float32 in any scheme.

    Raises:
        UserError: for weights that are NaN or infinite, or that float16 cannot hold.
    """
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"Weight {name!r} holds NaN or infinity: the model has diverged. "
                "Take an earlier checkpoint."
            )
    weights = fold_layer_norms(weights)

    def matrix(name: str, rows: np.ndarray, factor: np.ndarray | None = None) -> Constant:
        """Store `rows` `(out, in)`, row r times `factor[r]`."""
        layer = name.partition("/")[0]
        kind = "float32" if keeps_float(layer) else scheme
        if kind == "int8" and layer != "position_embedding":
            rows, scales = quantize_rows(rows)
            # on the scales: the integers are those of the unscaled kernel, which training knows
            return model.constant(rows, name, scales if factor is None else scales * factor)
        if factor is not None:
            rows = rows * factor[:, None]
        return model.constant(rows if kind == "float32" else _as_float16(name, rows), name)

    def dense(layer: str, factor: np.ndarray | None = None) -> Dense:
        kernel, bias = weights[f"{layer}/kernel"], weights[f"{layer}/bias"]  # (in, out), (out,)
        bias = bias if factor is None else bias * factor
        return Dense(
            matrix(f"{layer}/kernel", kernel.T, factor), model.constant(bias, f"{layer}/bias")
        )

    def block(i: int, num_heads: int) -> Block:
        inner = num_heads * config.head_dim
        scale = np.ones(3 * inner, np.float32)  # of queries, keys and values
        scale[:inner] = config.head_dim**-0.5
        others = [dense(f"block_{i}_{name}") for name in ("proj", "fc", "out")]
        return Block(num_heads, dense(f"block_{i}_qkv", scale), *others)

    table = "token_embedding/embeddings"
    tokens = matrix(table, weights[table])
    if config.tie_embeddings:
        head = tokens
    else:
        head = matrix("token_logits/kernel", weights["token_logits/kernel"].T)
    positions = "position_embedding/embeddings"
    return Weights(
        config,
        tokens=tokens,
        positions=matrix(positions, weights[positions]),
        blocks=[block(i, heads) for i, heads in enumerate(config.block_heads)],
        gamma=model.constant(weights["final_norm/gamma"], "final_norm/gamma"),
        beta=model.constant(weights["final_norm/beta"], "final_norm/beta"),
        head=Dense(head),
    )


def quantize_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale a row: `rows` is nearly `integers * scales[:, None]`.

    The scale is `max|row| / 127`. Weights that lie on such a grid already, as quantization-aware
    training leaves them, come out as exactly the integers and scales of that grid.

    Args:
        rows: `(rows, width)` float32.

    Returns:
        Integers `(rows, width)` int8 in [-127, 127] and scales `(rows,)` float32.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    largest = np.maximum(rows.max(1), -rows.min(1))
    scales = np.where(largest < _ALL_ZERO, np.float32(1), largest / np.float32(INT8_MAX))
    integers = rows / scales[:, None]
    return np.rint(integers, out=integers).astype(np.int8), scales


def _as_float16(name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(
            f"Weight {name!r} holds numbers beyond float16's 65504. "
            'Export with QuantConfig("float32") or "int8".'
        )
    return half
