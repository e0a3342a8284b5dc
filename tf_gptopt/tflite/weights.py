"""A GPT's weights as they lie in the file: on their grids, in the scheme's types, each once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.compression.quantization.config import BITS, QuantConfig
from tf_gptopt.compression.quantization.grids import Grid, activation_scale
from tf_gptopt.compression.quantization.rounding import (
    POSITIONS,
    as_float16,
    layer_grid,
    position_grid,
    round_positions,
    shared_peaks,
)
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.finite import check_finite
from tf_gptopt.models.folding import fold_layer_norms
from tf_gptopt.tflite.attention import FIXED
from tf_gptopt.tflite.flatbuffer import Model
from tf_gptopt.tflite.layers import Block, Dense, Norm, Weights
from tf_gptopt.tflite.tensors import Affine, Constant

Ranges = Mapping[str, tuple[float, float]]  # "block_0_qkv/input" -> (low, high)

_MOST_BIAS = 2.0**30  # of an int32 sum, of which the products need 2**26


def store_weights(
    model: Model,
    config: GPTConfig,
    weights: Mapping[str, np.ndarray],
    quant: QuantConfig,
    ranges: Ranges | None = None,
) -> Weights:
    """Write a GPT's weights into `model`, its LayerNorms folded.

    Matrices that lie on a grid of the scheme are stored as exactly its integers and scales; others
    are rounded to the nearest. With smoothing, gamma stays: it holds what the smoothing divided by.

    Args:
        weights: as `models.checkpoints.named_weights` gives them.
        quant: the scheme.
        ranges: of static activations, as `GPTModel.activation_ranges` has them.

    Raises:
        UserError: for weights that are NaN or infinite, that float16 cannot hold, or that a scheme
            with calibration never saw; and for ranges that are missing.
    """
    check_finite(weights)
    if not quant.smoothing:
        weights = fold_layer_norms(dict(weights))
    return _Writer(model, config, weights, quant, ranges or {}).write()


class _Writer:
    def __init__(
        self,
        model: Model,
        config: GPTConfig,
        weights: Mapping[str, np.ndarray],
        quant: QuantConfig,
        ranges: Ranges,
    ) -> None:
        self.model, self.config, self.weights = model, config, weights
        self.quant, self.ranges = quant, ranges
        self.peaks = shared_peaks(weights, quant)

    def write(self) -> Weights:
        config = self.config
        head = "token_embedding" if config.tie_embeddings else "token_logits"
        self._check_io([*(f"block_{i}_qkv" for i in range(config.num_layers)), head])
        tokens = self.matrix("token_embedding", self.weights["token_embedding/embeddings"])
        kernel = tokens if config.tie_embeddings else self.matrix(head, self.rows(head))
        return Weights(
            config,
            tokens=tokens,
            positions=self.positions(),
            position_range=self.added("position_embedding"),
            blocks=[self.block(i, heads) for i, heads in enumerate(config.block_heads)],
            norm=self.norm("final_norm"),
            head=Dense(kernel, None, self.unpacked(head), *self.static(head, "token_logits")),
            cache=self.quant.kv_cache if self.quant.io == "float32" else FIXED,
        )

    def block(self, i: int, num_heads: int) -> Block:
        layers = [self.dense(f"block_{i}_{name}") for name in ("qkv", "proj", "fc", "out")]
        norms = [self.norm(f"block_{i}_{name}_norm") for name in ("attention", "mlp")]
        added = [self.added(f"block_{i}_{name}_add") for name in ("attention", "mlp")]
        return Block(num_heads, *layers, *norms, *added)

    def dense(self, layer: str) -> Dense:
        rows, bias, name = self.rows(layer), self.weights[f"{layer}/bias"], f"{layer}/bias"
        before, after = self.static(layer, layer)
        if before is None:
            kernel = self.matrix(layer, rows)
            return Dense(kernel, self.model.constant(bias, name), self.unpacked(layer))
        grid, integers = with_integer_bias(self.grid(layer, rows), bias, before, after)
        scales = grid.scales[:, 0] * np.float32(before.scale)
        return Dense(
            self.model.grid(grid, f"{layer}/kernel"),
            self.model.constant(integers, name, scales),
            input=before,
            output=after,
        )

    def matrix(self, layer: str, rows: np.ndarray) -> Constant:
        """Store `rows` `(out, in)` in the layer's type."""
        kind = self.quant.weights_of(layer)
        name = f"{layer}/{'embeddings' if layer.endswith('embedding') else 'kernel'}"
        if kind in BITS:
            grid = self.grid(layer, rows)
            if layer == "token_embedding" and grid.bits == 4:  # its rows are looked up
                grid = with_even_rows(grid)
            return self.model.grid(grid, name)
        if kind == "float16":
            rows = as_float16(name, rows).astype(np.float16)
        return self.model.constant(rows, name)

    def grid(self, layer: str, rows: np.ndarray) -> Grid:
        grid = layer_grid(layer, rows, self.quant, self.peaks)
        quant = self.quant
        prepared = quant.rounding != "nearest" or quant.bias_correction or quant.smoothing
        if prepared and not np.array_equal(grid.values(), rows):
            raise UserError(
                f"The weights of {layer!r} are not those that {quant.name!r} makes, which looks at "
                "text for it. Hand calibration= over, or export what quantize(model, config, "
                "calibration) returns."
            )
        return grid

    def positions(self) -> Constant:
        table, kind = self.weights[POSITIONS], self.quant.weights_of("position_embedding")
        if kind == "int4":
            return self.model.grid(position_grid(table), POSITIONS)
        table = round_positions(table, self.quant)
        return self.model.constant(
            table.astype(np.float32 if kind == "float32" else np.float16), POSITIONS
        )

    def norm(self, name: str) -> Norm:
        gamma, beta = self.weights[f"{name}/gamma"], self.weights[f"{name}/beta"]
        return Norm(
            None if (gamma == 1).all() else self.model.constant(gamma, f"{name}/gamma"),
            None if not beta.any() else self.model.constant(beta, f"{name}/beta"),
        )

    def rows(self, layer: str) -> np.ndarray:
        return self.weights[f"{layer}/kernel"].T  # (out, in)

    def unpacked(self, layer: str) -> bool:
        """Whether the product is one of floats although the file holds something smaller."""
        kind = self.quant.weights_of(layer)
        return kind == "float16" or (kind in BITS and self.quant.activations == "float")

    # Static activations

    def static(self, layer: str, product: str) -> tuple[Affine | None, Affine | None]:
        """How the input and the output of a product are int8; None where they are float."""
        if self.quant.activations != "static" or self.quant.keeps_float(layer):
            return None, None
        return self.affine(f"{product}/input"), self.affine(f"{product}/output")

    def added(self, layer: str) -> Affine | None:
        """How the residual stream behind this layer is int8; None where it is float."""
        return self.affine(f"{layer}/output") if self.quant.quantize_adds else None

    def affine(self, name: str) -> Affine:
        if name not in self.ranges:
            raise UserError(
                f"No range is known for the activations {name!r}, and {self.quant.name!r} needs "
                "one. Hand calibration= over (`tf-gptopt export --dataset FOLDER`), or export what "
                "quantize(model, config, calibration) returns."
            )
        return Affine(*activation_scale(*self.ranges[name], self.quant.symmetric))

    def _check_io(self, layers: list[str]) -> None:
        for layer in layers:
            if self.quant.io == "int8" and self.quant.keeps_float(layer):
                raise UserError(
                    f'io="int8" hands out what {layer!r} computes, which is to stay float. '
                    'Quantize that layer too, or take io="float32".'
                )


def with_even_rows(grid: Grid) -> Grid:
    """The grid with a column of zeros more where its rows are odd: LiteRT looks rows of int4 up
    whole bytes at a time, and every second one would begin in the middle of a byte."""
    if grid.integers.shape[1] % 2 == 0:
        return grid
    return dataclasses.replace(grid, integers=np.pad(grid.integers, ((0, 0), (0, 1))))


def with_integer_bias(
    grid: Grid, bias: np.ndarray, before: Affine, after: Affine
) -> tuple[Grid, np.ndarray]:
    """The bias in units of the products' sums, int32, and the grid with scales that allow it.

    These units are a row's scale times the input's. Two kinds of rows need other scales than they
    have: those of nothing but zeros, whose scale says nothing, and those so small beside their bias
    that it would not fit; there the weights are far below a step of the output.

    Args:
        grid: of the kernel, `(out, in)`.
        bias: `(out,)` float32.
        before, after: how input and output are int8.
    """
    scales = grid.scales[:, 0]  # one for all, or one a row
    size = np.abs(bias) if len(scales) > 1 else np.abs(bias).max(keepdims=True)
    empty = ~grid.integers.reshape(len(scales), -1).any(1)
    least = np.where(empty, after.scale / 256, size / _MOST_BIAS) / before.scale
    if (empty | (scales < least)).any():
        scales = np.where(empty, least, np.maximum(scales, least)).astype(np.float32)
        integers = np.rint(grid.values() / scales[:, None]).astype(np.int8)
        grid = dataclasses.replace(grid, integers=integers, scales=scales[:, None])
    limit = np.float64(2**31 - 1)
    integers = np.rint(bias / (scales.astype(np.float64) * before.scale))
    return grid, np.clip(integers, -limit, limit).astype(np.int32)
