"""A GPT in numpy that rounds where a quantized file rounds: what such a file should compute."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.grids import activation_scale, quantize_matrix
from tf_gptopt.compression.quantization.rounding import layer_grid
from tf_gptopt.models.config import GPTConfig


class Imitation:
    """The logits of weights that lie on their grids already.

    Args:
        weights: by name.
        quant: whose activations, cache and additions are imitated; weights are taken as they are.
        ranges: of static activations; None records them, in `seen`, instead of rounding.
    """

    def __init__(
        self,
        config: GPTConfig,
        weights: Mapping[str, np.ndarray],
        quant: QuantConfig,
        ranges: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.config, self.weights, self.quant, self.ranges = config, weights, quant, ranges
        self.seen: dict[str, tuple[float, float]] = {}

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """`(time,)` ids -> `(time, vocab_size)`."""
        weights, table = self.weights, self.weights["token_embedding/embeddings"]
        positions = weights["position_embedding/embeddings"][: len(ids)]
        if self.quant.weights_of("position_embedding") == "int4":
            positions = quantize_matrix(positions).values()
        elif not self.quant.keeps_float("position_embedding"):
            positions = positions.astype(np.float16).astype(np.float32)
        x = self.added("position_embedding", table[ids] + positions)
        for i, heads in enumerate(self.config.block_heads):
            block = f"block_{i}"
            y = self.dense(f"{block}_qkv", self.norm(f"{block}_attention_norm", x))
            y = self.dense(f"{block}_proj", self.attention(y, heads))
            x = self.added(f"{block}_attention_add", x + y)
            y = self.dense(f"{block}_fc", self.norm(f"{block}_mlp_norm", x))
            y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
            x = self.added(f"{block}_mlp_add", x + self.dense(f"{block}_out", y))
        x = self.norm("final_norm", x)
        if self.config.tie_embeddings:
            return self.product("token_logits", "token_embedding", x, table.T, 0.0)
        return self.product("token_logits", "token_logits", x, weights["token_logits/kernel"], 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.layer_norm_epsilon)
        return x * self.weights[f"{name}/gamma"] + self.weights[f"{name}/beta"]

    def dense(self, layer: str, x: np.ndarray) -> np.ndarray:
        kernel, bias = self.weights[f"{layer}/kernel"], self.weights[f"{layer}/bias"]
        return self.product(layer, layer, x, kernel, bias)

    def product(self, name: str, layer: str, x, kernel, bias) -> np.ndarray:
        if self.quant.keeps_float(layer) or self.quant.activations == "float":
            return x @ kernel + bias
        if self.quant.activations == "dynamic":
            return _round_asymmetric(x) @ kernel + bias
        x = self.fixed(f"{name}/input", x)
        if self.ranges is not None:  # the bias is an integer in units of the sum
            step, _ = activation_scale(*self.ranges[f"{name}/input"], self.quant.symmetric)
            unit = step * layer_grid(layer, kernel.T, self.quant).scales[:, 0].astype(np.float64)
            bias = np.rint(bias / unit) * unit
        y = x.astype(np.float64) @ kernel + bias
        return self.fixed(f"{name}/output", y.astype(np.float32))

    def added(self, layer: str, x: np.ndarray) -> np.ndarray:
        return self.fixed(f"{layer}/output", x) if self.quant.quantize_adds else x

    def fixed(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.ranges is None:
            low, high = self.seen.get(name, (0.0, 0.0))
            self.seen[name] = min(low, float(x.min())), max(high, float(x.max()))
            return x
        scale, zero_point = activation_scale(*self.ranges[name], self.quant.symmetric)
        integers = np.clip(np.rint(x / np.float32(scale)) + zero_point, -128, 127)
        return (integers - zero_point) * np.float32(scale)

    def attention(self, qkv: np.ndarray, heads: int) -> np.ndarray:
        time = len(qkv)
        q, k, v = qkv.reshape(time, 3, heads, -1).transpose(1, 2, 0, 3)
        if self.quant.kv_cache == "int8":
            k, v = _round_rows(k), _round_rows(v)
        scores = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5
        scores = np.where(np.tri(time, dtype=bool), scores, -1e9)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return (p @ v).transpose(1, 0, 2).reshape(time, -1)


def _round_rows(x: np.ndarray) -> np.ndarray:
    """Symmetric int8, a scale for each row."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / 127, 1e-30)
    return np.rint(x / scale) * scale


def _round_asymmetric(x: np.ndarray) -> np.ndarray:
    """int8 between the extremes and zero of each row, as XNNPACK does it at run time."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = np.where(high > low, (high - low) / 255, 1)
    zero_point = np.rint(-128 - low / scale)
    return (np.clip(np.rint(x / scale) + zero_point, -128, 127) - zero_point) * scale
