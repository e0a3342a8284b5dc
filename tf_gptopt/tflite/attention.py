"""Attention and its cache in TFLite operations, a few heads at a time.

Three kinds of cache. A `"float32"` one holds the keys and values themselves. An `"int8"` one holds
`round(x / scale)` and, for every head and token, `scale = max|x| / 127`; scores and weights are
multiplied by the scales, so the products see integers. A `FIXED` one holds the static int8 output
of the qkv product as it is.

New tokens see each other through the same rounded keys and values that the cache keeps: reading
a text at once and token by token is the same.

One token's products with the cache are elementwise multiplications and sums. That makes three
passes over what lies in a processor core's own cache, and still takes two thirds of the time of
XNNPACK's matrix product, which packs its right-hand operand anew on every call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from tf_gptopt.tflite.buckets import ALIGNMENT, CAPACITY_STEP, head_groups
from tf_gptopt.tflite.graph import Graph
from tf_gptopt.tflite.layers import as_float
from tf_gptopt.tflite.tensors import Affine, Free, Tensor, is_one

FIXED = "int8 of fixed scale"

_STEEP = 1e9  # what a forbidden score is lowered by, per position
_SMALLEST = 1e-30  # a scale, so that nothing is divided by zero

# A large cache comes in a few heads at a time: what is computed from it then stays in the caches of
# a processor's cores. Each group is an input of its own, because taking slices out of one input
# costs as much as what is done with them. What counts is a group's size as float32, which an int8
# one becomes first.
_HEAD_GROUP_FLOATS = 512 * 1024


@dataclasses.dataclass(frozen=True)
class Masks:
    """What is added to scores: 0 where a key may be seen, far below 0 where not."""

    past: Tensor | None  # (capacity,): hides the cache's rows that are not in use
    future: Tensor | None  # (n, n): hides, of the new tokens, those after a token itself


@dataclasses.dataclass(frozen=True)
class Past:
    """Keys or values of the cache as they come in, flat: `(heads * capacity * head_dim,)` for each
    group of heads, and `(all heads * capacity,)` scales."""

    capacity: int
    head_dim: int
    groups: Sequence[Tensor]
    scales: Tensor | None = None

    def parts(self, g: Graph) -> Iterator[tuple[int, Tensor]]:
        """The first head of each group, and its rows `(heads, capacity, head_dim)` float32."""
        first = 0
        for group in self.groups:
            heads = group.shape[0] // (self.capacity * self.head_dim)
            yield first, g.reshape(as_float(g, group), [heads, self.capacity, self.head_dim])
            first += heads

    def scale(self, g: Graph, x: Tensor) -> Tensor:
        """`x` `(all heads, n, capacity)`, multiplied by the scales."""
        if self.scales is None:
            return x
        return x * g.reshape(self.scales, [x.shape[0], 1, self.capacity])


def heads_at_once(heads: int, capacity: int, head_dim: int, cache: str) -> int:
    """How many heads of the cache make one input: groups of nearly equal size, each of which begins
    where LiteRT can read in place, at this capacity and at multiples of `CAPACITY_STEP`; 0 for
    all."""
    if not capacity:
        return 0
    groups = math.ceil(heads * capacity * head_dim / _HEAD_GROUP_FLOATS)
    each = math.ceil(heads / min(groups, heads))
    row = each * head_dim * (4 if cache == "float32" else 1)
    aligned = all(row * rows % ALIGNMENT == 0 for rows in (capacity, CAPACITY_STEP))
    return each if each < heads and aligned else 0


def masks(g: Graph, positions: Tensor, capacity: int) -> Masks:
    """The input `mask`, and who of the new tokens sees whom; `positions` (n,) int32 are theirs."""
    past = g.input("mask", [capacity]) if capacity else None
    (n,) = positions.shape
    if is_one(n):
        return Masks(past, None)
    half, steep, zero = (g.model.constant(np.full(1, v, np.float32)) for v in (0.5, _STEEP, 0))
    if not isinstance(n, Free):  # of padding behind the last token, positions may repeat
        positions = g.model.constant(np.arange(n, dtype=np.int32))
    places = g.cast(positions, np.float32)
    # computed, for it would be 262 kB of 256 tokens: min(0, steep * (place - key's place + 1/2))
    ahead = g.reshape(places + half, [n, 1]) - g.reshape(places, [1, n])
    return Masks(past, g.elementwise("MINIMUM", ahead * steep, zero))


def split_heads(g: Graph, x: Tensor, heads: int) -> Tensor:
    """`(n, heads * head_dim)` -> `(heads, n, head_dim)`."""
    n, head_dim = x.shape[0], x.shape[1] // heads
    if is_one(n):  # the same numbers in the same order
        return g.reshape(x, [heads, 1, head_dim])
    return g.transpose(g.reshape(x, [n, heads, head_dim]), [1, 0, 2])


def merge_heads(g: Graph, x: Tensor) -> Tensor:
    """`(heads, n, head_dim)` -> `(n, heads * head_dim)`."""
    heads, n, head_dim = x.shape
    if not is_one(n):
        x = g.transpose(x, [1, 0, 2])
    return g.reshape(x, [n, heads * head_dim])


def store(g: Graph, name: str, x: Tensor, cache: str) -> Tensor:
    """Hand the new tokens' keys or values out for the cache, and return what it will give back,
    `(heads, n, head_dim)` float32.

    Args:
        name: `"k_0"` makes the outputs `new_k_0` and, of an int8 cache, `new_k_scale_0`.
        x: `(heads, n, head_dim)`.
        cache: its kind.
    """
    if cache != "int8":
        g.output(f"new_{name}", x)
        return as_float(g, x)
    heads, n, _ = x.shape
    most, smallest = (g.model.constant(np.full(1, v, np.float32)) for v in (127, _SMALLEST))
    scales = g.elementwise("MAXIMUM", g.max(g.abs(x)) / most, smallest)  # (heads, n, 1)
    integers = g.quantize(x / scales, Affine(1.0))
    g.output(f"new_{name}", integers)
    g.output(f"new_{_scale_name(name)}", g.reshape(scales, [heads, n]))
    # Multiplied here and not behind the products: a product of integers that nothing comes between
    # is one operation for XNNPACK, which goes wrong when n grows.
    return g.dequantize(integers) * scales


def past(
    g: Graph,
    name: str,
    shape: tuple[int, int, int],
    group: int,
    cache: str,
    fixed: Affine | None,
) -> Past:
    """The inputs that hold a block's keys or values so far.

    Args:
        name: `"k_0"`, and its scales `"k_scale_0"`.
        shape: `(heads, capacity, head_dim)`.
        group: heads to an input, see `buckets.head_groups`.
        cache: its kind; `fixed` is the scale of one that has the same for all.
    """
    heads, capacity, head_dim = shape
    affine = {"float32": None, FIXED: fixed}.get(cache, Affine(1.0))
    dtype = np.float32 if cache == "float32" else np.int8
    groups = [
        g.input(each, [size * capacity * head_dim], dtype, affine)
        for each, _, size in head_groups(name, heads, group)
    ]
    scales = g.input(_scale_name(name), [heads * capacity]) if cache == "int8" else None
    return Past(capacity, head_dim, groups, scales)


def attend(
    g: Graph, q: Tensor, k: Tensor, v: Tensor, old: Sequence[Past] | None, m: Masks
) -> Tensor:
    """Attention of the new tokens to the cache and to each other.

    Args:
        q: `(heads, n, head_dim)` float32.
        k, v: of the new tokens, `(heads, n, head_dim)` float32.
        old: keys and values of the cache, or None.

    Returns:
        `(heads, n, head_dim)`.
    """
    heads, n, head_dim = q.shape
    q = q * g.model.constant(np.full(1, head_dim**-0.5, np.float32))
    new_scores = _products(g, q, k)
    if m.future is not None:
        new_scores = new_scores + m.future
    if old is None:
        return _mix(g, g.softmax(new_scores), v)

    # one softmax over two sets of keys, which are never joined: that would copy the cache
    old_k, old_v = old
    scores = g.concatenate(
        [_products(g, g.part(q, at, keys.shape[0]), keys) for at, keys in old_k.parts(g)], axis=0
    )
    scores = old_k.scale(g, scores) + m.past
    if isinstance(n, Free):
        new_p, old_p, total = _exponentials(g, new_scores, scores)
    else:
        p = g.softmax(g.concatenate([new_scores, scores], axis=2))  # (heads, n, n + capacity)
        new_p = g.slice(p, [0, 0, 0], [heads, n, n])
        old_p = g.slice(p, [0, 0, n], [heads, n, old_v.capacity])
        total = None
    old_p = old_v.scale(g, old_p)
    mixed = g.concatenate(
        [_mix(g, g.part(old_p, at, rows.shape[0]), rows) for at, rows in old_v.parts(g)], axis=0
    )
    mixed = mixed + _mix(g, new_p, v)
    return mixed if total is None else mixed / total


def _exponentials(g: Graph, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax over both together, of which the last axes may have any size: what each becomes,
    and what the results are to be divided by."""
    most = g.elementwise("MAXIMUM", g.max(a), g.max(b))
    a, b = g.exp(a - most), g.exp(b - most)
    return a, b, g.sum(a, axis=-1) + g.sum(b, axis=-1)


def _products(g: Graph, q: Tensor, keys: Tensor) -> Tensor:
    """Of queries `(heads, n, head_dim)` and keys `(heads, rows, head_dim)`: `(heads, n, rows)`."""
    heads, n, _ = q.shape
    if not is_one(n):
        return g.matmul(q, keys, transpose_b=True)
    return g.reshape(g.sum(keys * q, axis=2), [heads, 1, keys.shape[1]])


def _mix(g: Graph, p: Tensor, rows: Tensor) -> Tensor:
    """The mean of `rows` `(heads, rows, head_dim)`, weighted by p `(heads, n, rows)`."""
    heads, n, count = p.shape
    if is_one(count):
        return p * rows
    if not is_one(n):
        return g.matmul(p, rows)
    return g.sum(rows * g.reshape(p, [heads, count, 1]), axis=1)


def _scale_name(name: str) -> str:
    kind, _, block = name.partition("_")
    return f"{kind}_scale_{block}"
