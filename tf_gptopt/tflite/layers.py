"""A GPT's layers in TFLite operations, all of which XNNPACK takes except the table look-ups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tf_gptopt.models.config import GPTConfig
from tf_gptopt.tflite.flatbuffer import Constant, Graph, Tensor

_FAR_BELOW = 1e9  # what a forbidden score is lowered by, per position

# XNNPACK reads the cache, copies it out of the input, and packs it for its product. Done for a few
# heads at a time the copies stay in the second-level cache of a processor core.
_HEAD_GROUP_BYTES = 512 * 1024


@dataclasses.dataclass(frozen=True)
class Dense:
    """`x @ kernel.T + bias`: kernel `(out, in)` in the scheme's type, bias `(out,)` float32."""

    kernel: Constant
    bias: Constant | None = None


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's products, with its LayerNorms' gamma and beta and the attention's scale folded."""

    num_heads: int
    qkv: Dense
    proj: Dense
    fc: Dense
    out: Dense


@dataclasses.dataclass(frozen=True)
class Weights:
    """What all signatures share. With tied embeddings `head.kernel` is `tokens` itself."""

    config: GPTConfig
    tokens: Constant  # (vocab_size, width)
    positions: Constant  # (context, width)
    blocks: Sequence[Block]
    gamma: Constant  # (width,), of the last LayerNorm
    beta: Constant  # (width,)
    head: Dense  # (vocab_size, width)


def embed(g: Graph, weights: Weights, tokens: Tensor, position: Tensor | None) -> Tensor:
    """Tokens `(n,)` at `position, position + 1, ...` (or 0, 1, ...) -> `(n, width)`."""
    n = tokens.shape[0]
    steps = g.model.constant(np.arange(n, dtype=np.int32))
    if position is None:
        places = steps
    elif n == 1:
        places = position
    else:  # padding may run past the end of the table
        end = g.model.constant(np.array([weights.positions.shape[0] - 1], np.int32))
        places = g.minimum(position + steps, end)
    return _lookup(g, tokens, weights.tokens) + _lookup(g, places, weights.positions)


def logits(g: Graph, weights: Weights, x: Tensor) -> Tensor:
    """The last LayerNorm and the product with the token table: `(n, width)` -> `(n, vocab)`."""
    x = normalize(g, x, weights.config.layer_norm_epsilon)
    return dense(g, x * weights.gamma + weights.beta, weights.head)


def normalize(g: Graph, x: Tensor, epsilon: float) -> Tensor:
    """LayerNorm without gamma and beta: those live in the product that follows."""
    centred = x - g.mean(x)
    variance = g.mean(centred * centred)
    return centred * g.rsqrt(variance + g.model.constant(np.array([epsilon], np.float32)))


def dense(g: Graph, x: Tensor, layer: Dense) -> Tensor:
    is_half = layer.kernel.dtype == np.float16
    return g.dense(x, g.dequantize(layer.kernel) if is_half else layer.kernel, layer.bias)


def _lookup(g: Graph, ids: Tensor, table: Constant) -> Tensor:
    rows = g.embedding_lookup(ids, table)
    return g.cast(rows, np.float32) if rows.dtype == np.float16 else rows


# Attention


@dataclasses.dataclass(frozen=True)
class Masks:
    """What is added to scores: 0 where a key may be seen, far below 0 where not."""

    past: Tensor | None  # (1, capacity): hides the cache's rows from `position` on
    future: Tensor | None  # (n, n): hides, of the new tokens, those after a token itself


def masks(g: Graph, n: int, capacity: int, position: Tensor | None) -> Masks:
    """Computed rather than stored: `future` alone would take 262 kB of the file for n = 256."""
    zero = g.model.constant(np.zeros(1, np.float32))
    steep = g.model.constant(np.full(1, _FAR_BELOW, np.float32))

    def allow(places: Tensor, keys: np.ndarray) -> Tensor:
        """Places see the keys before them: min(0, steep * (place - key - 1/2))."""
        keys = g.model.constant(-0.5 - keys.astype(np.float32)[None])
        return g.minimum((g.cast(places, np.float32) + keys) * steep, zero)

    past = future = None
    if position is not None:
        past = allow(position, np.arange(capacity))
    if n > 1:
        after = g.model.constant(np.arange(1, n + 1, dtype=np.int32)[:, None])  # itself is seen
        future = allow(after, np.arange(n))
    return Masks(past, future)


def split_heads(g: Graph, x: Tensor, heads: int) -> Tensor:
    """`(n, heads * head_dim)` -> `(heads, n, head_dim)`."""
    n, head_dim = x.shape[0], x.shape[1] // heads
    if n == 1:  # the same numbers in the same order
        return g.reshape(x, [heads, 1, head_dim])
    return g.transpose(g.reshape(x, [n, heads, head_dim]), [1, 0, 2])


def merge_heads(g: Graph, x: Tensor) -> Tensor:
    """`(heads, n, head_dim)` -> `(n, heads * head_dim)`."""
    heads, n, head_dim = x.shape
    if n > 1:
        x = g.transpose(x, [1, 0, 2])
    return g.reshape(x, [n, heads * head_dim])


def attention(
    g: Graph, q: Tensor, k: Tensor, v: Tensor, old_k: Tensor | None, old_v: Tensor | None, m: Masks
) -> Tensor:
    """Attention of the new tokens to the cache and to each other, a few heads at a time.

    Args:
        q, k, v: of the new tokens, each `(heads, n, head_dim)`; q has its scale already.
        old_k, old_v: the cache as it comes in, each `(heads * capacity * head_dim,)`, or None.

    Returns:
        `(heads, n, head_dim)`.
    """
    heads, _, head_dim = q.shape
    if old_k is None:
        scores = g.matmul(q, k, transpose_b=True)  # (heads, n, n)
        return g.matmul(g.softmax(scores + m.future if m.future else scores), v)
    size = old_k.shape[0] // heads  # of a head's keys
    at_once = max(1, _HEAD_GROUP_BYTES // (4 * size))
    results = []
    for first in range(0, heads, at_once):
        group = min(at_once, heads - first)
        news = [g.part(x, first, group) for x in (q, k, v)]
        olds = [
            g.reshape(g.part(x, first * size, group * size), [group, size // head_dim, head_dim])
            for x in (old_k, old_v)
        ]
        results.append(_attend_with_cache(g, *news, *olds, m))
    return g.concatenate(results, axis=0)


def _attend_with_cache(
    g: Graph, q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor, m: Masks
) -> Tensor:
    """One softmax over two sets of keys, which are never joined: that would copy the cache."""
    heads, n, _ = q.shape
    capacity = old_k.shape[1]
    new_scores = g.matmul(q, k, transpose_b=True)  # (heads, n, n)
    if m.future is not None:
        new_scores = new_scores + m.future
    old_scores = g.matmul(q, old_k, transpose_b=True) + m.past  # (heads, n, capacity)
    p = g.softmax(g.concatenate([old_scores, new_scores], axis=2))
    old_p = g.slice(p, [0, 0, 0], [heads, n, capacity])
    new_p = g.slice(p, [0, 0, capacity], [heads, n, n])
    return g.matmul(old_p, old_v) + (new_p * v if n == 1 else g.matmul(new_p, v))
