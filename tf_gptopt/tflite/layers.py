"""A GPT's layers in TFLite operations, all of which XNNPACK takes except the table look-ups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.graph import Graph
from tf_gptopt.tflite.tensors import Affine, Constant, Tensor


@dataclasses.dataclass(frozen=True)
class Dense:
    """`x @ kernel.T + bias`.

    Args:
        kernel: `(out, in)` in the scheme's type.
        bias: `(out,)`, float32, or int32 beside static activations.
        unpacked: whether the kernel is made float32 before the product.
        input, output: how both are int8, with static activations.
    """

    kernel: Constant
    bias: Constant | None = None
    unpacked: bool = False
    input: Affine | None = None
    output: Affine | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """What LayerNorm does after normalizing, `(width,)` each; None where the next product does."""

    gamma: Constant | None
    beta: Constant | None


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's products and norms, and how the residual stream is int8 behind its additions."""

    num_heads: int
    qkv: Dense
    proj: Dense
    fc: Dense
    out: Dense
    attention_norm: Norm
    mlp_norm: Norm
    attention_add: Affine | None
    mlp_add: Affine | None


@dataclasses.dataclass(frozen=True)
class Weights:
    """What all signatures share. With tied embeddings `head.kernel` is `tokens` itself.

    An int4 `tokens` of odd width has a column of zeros more: see `weights.with_even_rows`.
    """

    config: GPTConfig
    tokens: Constant  # (vocab_size, width)
    positions: Constant  # (context, width)
    position_range: Affine | None  # how the sum of both is int8
    blocks: Sequence[Block]
    norm: Norm
    head: Dense  # (vocab_size, width)
    cache: str  # "float32", "int8" or "int8 of fixed scale": see attention.py


def embed(g: Graph, weights: Weights, tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens and their positions `(n,)` -> `(n, width)`."""
    x = _lookup(g, tokens, weights.tokens)
    if x.shape[1] != weights.config.embedding_dim:
        x = g.slice(x, [0, 0], [x.shape[0], weights.config.embedding_dim])
    x = x + _lookup(g, positions, weights.positions)
    return as_int8(g, x, weights.position_range)


def logits(g: Graph, weights: Weights, x: Tensor) -> Tensor:
    """The last LayerNorm and the product with the token table: `(n, width)` -> `(n, vocab)`."""
    x = normalize(g, x, weights.norm, weights.config.layer_norm_epsilon)
    return product(g, x, weights.head)


def normalize(g: Graph, x: Tensor, norm: Norm, epsilon: float) -> Tensor:
    """LayerNorm."""
    x = as_float(g, x)
    centred = x - g.mean(x)
    variance = g.mean(centred * centred)
    x = centred * g.rsqrt(variance + g.model.constant(np.array([epsilon], np.float32)))
    if norm.gamma is not None:
        x = x * norm.gamma
    return x if norm.beta is None else x + norm.beta


def product(g: Graph, x: Tensor, layer: Dense) -> Tensor:
    """`x @ kernel.T + bias` of a float32 x; int8 with static activations."""
    kernel = g.dequantize(layer.kernel) if layer.unpacked else layer.kernel
    x = as_int8(g, g.pad(x, kernel.shape[1]), layer.input)
    return g.dense(x, kernel, layer.bias, layer.output)


def activate(g: Graph, kind: str, x: Tensor) -> Tensor:
    """What the MLP's neurons say, float32; `kind` is one of `config.ACTIVATIONS`."""
    x = as_float(g, x)
    return g.relu(x) if kind == "relu" else g.gelu(x, approximate=kind == "gelu_new")


def add(g: Graph, x: Tensor, y: Tensor, affine: Affine | None) -> Tensor:
    """The residual stream x and what a block adds to it, int8 or float32, as `affine` says."""
    if affine is not None and x.affine and y.affine:
        return g.elementwise("ADD", x, y, affine)
    return as_int8(g, as_float(g, x) + as_float(g, y), affine)


def as_float(g: Graph, x: Tensor) -> Tensor:
    return g.dequantize(x) if x.affine else x


def as_int8(g: Graph, x: Tensor, affine: Affine | None) -> Tensor:
    return x if affine is None else g.quantize(x, affine)


def _lookup(g: Graph, ids: Tensor, table: Constant) -> Tensor:
    rows = g.embedding_lookup(ids, table)
    return g.cast(rows, np.float32) if rows.dtype == np.float16 else rows
