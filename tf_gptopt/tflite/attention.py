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
from collections.abc import Sequence

import numpy as np

from tf_gptopt.tflite.graph import Graph
from tf_gptopt.tflite.layers import as_float
from tf_gptopt.tflite.metadata import head_groups
from tf_gptopt.tflite.tensors import Affine, Tensor

FIXED = "int8 of fixed scale"

_FAR_BELOW = 1e9  # what a forbidden score is lowered by, per position
_SMALLEST = 1e-30  # a scale, so that nothing is divided by zero

# The cache comes in as float32, or becomes it, a few heads at a time: what is computed from it then
# stays in the second-level cache of a processor core. Each group is an input of its own, because
# taking slices out of one input costs as much as what is done with them.
_HEAD_GROUP_BYTES = 1024 * 1024
_ALIGNMENT = 64  # bytes: what LiteRT wants of an input that it reads in place


@dataclasses.dataclass(frozen=True)
class Masks:
    """What is added to scores: 0 where a key may be seen, far below 0 where not."""

    past: Tensor | None  # (1, capacity): hides the cache's rows from `position` on
    future: Tensor | None  # (n, n): hides, of the new tokens, those after a token itself


@dataclasses.dataclass(frozen=True)
class Rows:
    """Keys or values `(heads, n, head_dim)` float32, to be multiplied by `scales` (heads, 1, n)."""

    values: Tensor
    scales: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Past:
    """Keys or values of the cache as they come in, flat: `(heads * capacity * head_dim,)` for each
    group of heads, and `(all heads * capacity,)` scales."""

    capacity: int
    head_dim: int
    groups: Sequence[Tensor]
    scales: Tensor | None = None

    def part(self, g: Graph, group: int, first: int) -> Rows:
        """Those of a group, whose first head is `first`."""
        values = as_float(g, self.groups[group])
        heads = values.shape[0] // (self.capacity * self.head_dim)
        values = g.reshape(values, [heads, self.capacity, self.head_dim])
        if self.scales is None:
            return Rows(values)
        scales = g.part(self.scales, first * self.capacity, heads * self.capacity)
        return Rows(values, g.reshape(scales, [heads, 1, self.capacity]))


def heads_at_once(heads: int, capacity: int, head_dim: int, cache: str) -> int:
    """How many heads of the cache make one input: groups of nearly equal size, each of which begins
    where LiteRT can read in place; 0 for all."""
    if not capacity:
        return 0
    groups = math.ceil(heads * capacity * head_dim * 4 / _HEAD_GROUP_BYTES)
    each = math.ceil(heads / min(groups, heads))
    size = each * capacity * head_dim * (4 if cache == "float32" else 1)
    return 0 if each == heads or size % _ALIGNMENT else each


def masks(g: Graph, n: int, capacity: int, position: Tensor | None) -> Masks:
    """Computed rather than stored: `future` alone would take 262 kB of the file for n = 256."""
    zero = g.model.constant(np.zeros(1, np.float32))
    steep = g.model.constant(np.full(1, _FAR_BELOW, np.float32))

    def allow(places: Tensor, keys: np.ndarray) -> Tensor:
        """Places see the keys before them: min(0, steep * (place - key - 1/2))."""
        keys = g.model.constant(-0.5 - keys.astype(np.float32)[None])
        return g.elementwise("MINIMUM", (g.cast(places, np.float32) + keys) * steep, zero)

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


def store(g: Graph, name: str, x: Tensor, cache: str) -> Rows:
    """Hand the new tokens' keys or values out for the cache, and return what it will give back.

    Args:
        name: `"k_0"` makes the outputs `new_k_0` and, of an int8 cache, `new_k_scale_0`.
        x: `(heads, n, head_dim)`.
        cache: its kind.
    """
    if cache != "int8":
        g.output(f"new_{name}", x)
        return Rows(as_float(g, x))
    heads, n, _ = x.shape
    most, smallest = (g.model.constant(np.full(1, v, np.float32)) for v in (127, _SMALLEST))
    scales = g.elementwise("MAXIMUM", g.max(g.abs(x)) / most, smallest)  # (heads, n, 1)
    integers = g.quantize(x / scales, Affine(1.0))
    g.output(f"new_{name}", integers)
    scales = g.reshape(scales, [heads, n])
    g.output(f"new_{_scale_name(name)}", scales)
    return Rows(g.dequantize(integers), g.reshape(scales, [heads, 1, n]))


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
        group: heads to an input, see `metadata.head_groups`.
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


def attend(g: Graph, q: Tensor, k: Rows, v: Rows, old: Sequence[Past] | None, m: Masks) -> Tensor:
    """Attention of the new tokens to the cache and to each other.

    Args:
        q: `(heads, n, head_dim)` float32.
        k, v: of the new tokens.
        old: keys and values of the cache, or None.

    Returns:
        `(heads, n, head_dim)`.
    """
    head_dim = q.shape[2]
    q = q * g.model.constant(np.full(1, head_dim**-0.5, np.float32))
    if old is None:
        scores = _scores(g, q, k, m.future)
        return _mix(g, g.softmax(scores), v)
    results, first = [], 0
    for group in range(len(old[0].groups)):
        olds = [rows.part(g, group, first) for rows in old]
        heads = olds[0].values.shape[0]
        new = [_part(g, rows, first, heads) for rows in (k, v)]
        results.append(_attend_with_cache(g, g.part(q, first, heads), *new, *olds, m))
        first += heads
    return g.concatenate(results, axis=0)


def _attend_with_cache(
    g: Graph, q: Tensor, k: Rows, v: Rows, old_k: Rows, old_v: Rows, m: Masks
) -> Tensor:
    """One softmax over two sets of keys, which are never joined: that would copy the cache."""
    heads, n, _ = q.shape
    capacity = old_k.values.shape[1]
    scores = [_scores(g, q, old_k, m.past), _scores(g, q, k, m.future)]
    p = g.softmax(g.concatenate(scores, axis=2))  # (heads, n, capacity + n)
    old_p = g.slice(p, [0, 0, 0], [heads, n, capacity])
    new_p = g.slice(p, [0, 0, capacity], [heads, n, n])
    return _mix(g, old_p, old_v) + _mix(g, new_p, v)


def _scores(g: Graph, q: Tensor, k: Rows, mask: Tensor | None) -> Tensor:
    """`(heads, n, keys)`."""
    heads, n, _ = q.shape
    if n == 1:
        scores = g.reshape(g.sum(k.values * q, axis=2), [heads, 1, k.values.shape[1]])
    else:
        scores = g.matmul(q, k.values, transpose_b=True)
    if k.scales is not None:
        scores = scores * k.scales
    return scores if mask is None else scores + mask


def _mix(g: Graph, p: Tensor, v: Rows) -> Tensor:
    """The mean of v's rows, weighted by p `(heads, n, rows)`."""
    if v.scales is not None:
        p = p * v.scales
    heads, n, rows = p.shape
    if rows == 1:
        return p * v.values
    if n == 1:
        return g.sum(v.values * g.reshape(p, [heads, rows, 1]), axis=1)
    return g.matmul(p, v.values)


def _part(g: Graph, rows: Rows, first: int, count: int) -> Rows:
    scales = None if rows.scales is None else g.part(rows.scales, first, count)
    return Rows(g.part(rows.values, first, count), scales)


def _scale_name(name: str) -> str:
    kind, _, block = name.partition("_")
    return f"{kind}_scale_{block}"
