"""A GPT in numpy that rounds where a quantized file rounds: what such a file should compute.

What is left between the two is rounding that falls to the other side of a tie, which is little; so
what the scheme's rounding makes of a model is known from the model, and needs no bound for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tf_gptopt.compression.quantization.config import QuantConfig
from tf_gptopt.compression.quantization.grids import activation_scale
from tf_gptopt.models.config import GPTConfig


def gelu(x: np.ndarray) -> np.ndarray:
    """GPT-2's `gelu_new`."""
    return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)))


class Imitation:
    """The logits of weights that are those of a file.

    Args:
        weights: by name, as `reading.held_weights` gives them. Of a model that is not exported yet,
            as `rounding.round_weights` does.
        quant: whose activations, cache and additions are imitated; weights are taken as they are.
        ranges: of static activations; None records them, in `seen`, instead of rounding.
        activation: between the products of an MLP.
    """

    def __init__(
        self,
        config: GPTConfig,
        weights: Mapping[str, np.ndarray],
        quant: QuantConfig,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        activation: Callable[[np.ndarray], np.ndarray] = gelu,
    ) -> None:
        self.config, self.weights, self.quant, self.ranges = config, weights, quant, ranges
        self.activation = activation
        self.seen: dict[str, tuple[float, float]] = {}

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """`(time,)` ids -> `(time, vocab_size)`."""
        table = self.weights["token_embedding/embeddings"]
        positions = self.weights["position_embedding/embeddings"][: len(ids)]
        x = self.added("position_embedding", table[ids] + positions)
        for i, heads in enumerate(self.config.block_heads):
            block = f"block_{i}"
            y = self.dense(f"{block}_qkv", self.norm(f"{block}_attention_norm", x))
            y = self.dense(f"{block}_proj", self.attention(y, heads))
            x = self.added(f"{block}_attention_add", x + y)
            y = self.dense(f"{block}_fc", self.norm(f"{block}_mlp_norm", x))
            y = self.dense(f"{block}_out", self.activation(y))
            x = self.added(f"{block}_mlp_add", x + y)
        x = self.norm("final_norm", x)
        if self.config.tie_embeddings:
            return self.product("token_logits", "token_embedding", x, table.T)
        return self.product("token_logits", "token_logits", x, self.weights["token_logits/kernel"])

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(
            (x * x).mean(-1, keepdims=True) + np.float32(self.config.layer_norm_epsilon)
        )
        return x * self.weights[f"{name}/gamma"] + self.weights[f"{name}/beta"]

    def dense(self, layer: str, x: np.ndarray) -> np.ndarray:
        weights = self.weights
        return self.product(layer, layer, x, weights[f"{layer}/kernel"], weights[f"{layer}/bias"])

    def product(
        self,
        name: str,
        layer: str,
        x: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """`x @ kernel + bias`; `layer` says what of it is rounded, `name` to which ranges."""
        if self.quant.keeps_float(layer) or self.quant.activations == "float":
            return x @ kernel + bias
        if self.quant.activations == "dynamic":
            return _round_asymmetric(x) @ kernel + bias
        return self.fixed(f"{name}/output", self.fixed(f"{name}/input", x) @ kernel + bias)

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
        scores = q @ k.transpose(0, 2, 1) * np.float32(q.shape[-1] ** -0.5)
        scores = np.where(np.tri(time, dtype=bool), scores, np.float32(-1e9))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return (p @ v).transpose(1, 0, 2).reshape(time, -1)


def _round_rows(x: np.ndarray) -> np.ndarray:
    """Symmetric int8, a scale for each row."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / 127, np.float32(1e-30))
    return np.rint(x / scale) * scale


def _round_asymmetric(x: np.ndarray) -> np.ndarray:
    """int8 between the extremes and zero of each row, as XNNPACK does it at run time."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = np.where(high > low, (high - low) / np.float32(255), np.float32(1))
    zero_point = np.rint(-128 - low / scale)
    return (np.clip(np.rint(x / scale) + zero_point, -128, 127) - zero_point) * scale
