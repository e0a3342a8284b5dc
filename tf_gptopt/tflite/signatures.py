"""The functions in the file: `prefill`, `decode` and `logits`.

The first two are one forward pass: tokens come in and look back at a KV cache. XNNPACK copies the
whole cache on every call, so a token costs what the capacity is and not what is filled. Sizes
marked with * are free: the shape in the file is where they begin, the metadata says how far they
go, and a runtime chooses. LiteRT then computes with what it is given; a change takes it a
millisecond or two. So the runtime's cache grows in small steps, and one function serves them all.

- `prefill` reads n tokens: `tokens` (n*,), `positions` (n*,) int32, `mask` (capacity*,) float32 and
  a cache. It returns `hidden` (n*, width) and the new keys and values.
- `decode` reads one: n is 1, and it returns `logits` (1, vocab_size) instead. `decode_{c}` is the
  same for capacities up to that.
- `logits` turns `hidden`, (n* x width,) flat, into the `logits` (n*, vocab_size) of all tokens.

Files for accelerators that want static shapes have a function for every size instead:

- `prefill_{n}` reads the first tokens, without a cache or a mask: also `last` (1,) int32, the row
  of which it returns the `logits` (1, vocab_size) beside `hidden`. `prefill_{n}_{c}` reads more,
  over a cache of c rows.
- `decode_{c}`, `decode` for the whole context, and `logits_{n}`.
- `verify_{n}_{c}` is a decode of n tokens, with the `logits` (n, vocab_size) of all: a draft is
  read as one token is, and shows where it leaves the way.

The cache is two inputs per block, `k_{i}` and `v_{i}`: flat float32 in the layout (num_heads,
capacity, head_dim), where row p belongs to position p. A large one comes in by several inputs of a
few heads each, `k_{i}_{first head}`. It is never an output: `new_k_{i}` and
`new_v_{i}`, (num_heads, n, head_dim), are, and the caller writes them to the rows behind those in
use. So nothing is copied but what is new. An int8 cache has int8 arrays in their place and, beside
each, float32 scales: `k_scale_{i}` flat (num_heads, capacity), `new_k_scale_{i}` (num_heads, n).

With `io="int8"` the `logits` are int8, and the cache is int8 of one scale a block and no others.
The scales and zero points stand in the tensors, and that of the logits in the metadata too.

`positions` are the tokens' places in the text, and `mask` has 0 for the rows of the cache that are
in use and -1e9 for the others, which may hold any numbers that are finite. Fewer than n tokens are
padded at their end with any ids and positions that are valid, and those of a free `prefill` rising.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.tflite import attention, layers
from tf_gptopt.tflite.buckets import CAPACITY_STEP, VERIFY_LENGTH, Bucket
from tf_gptopt.tflite.flatbuffer import Model
from tf_gptopt.tflite.graph import Graph
from tf_gptopt.tflite.layers import Weights
from tf_gptopt.tflite.tensors import Free, Tensor

LOGITS_ROWS = 128  # positions that `logits` does at once
_PREFILL_LENGTHS = (16, 32, 64, 128, 256)
_FIRST_TOKENS, _FIRST_ROWS = 16, 32  # sizes of a free prefill in the file: XNNPACK plans for them


def plan_buckets(
    context: int,
    prefill_lengths: Sequence[int] | None = None,
    decode_capacities: Sequence[int] | None = None,
    *,
    fixed: bool = False,
) -> list[Bucket]:
    """The prefill and decode signatures of a model with this context: free ones, or fixed.

    Args:
        context: the longest sequence, in tokens.
        prefill_lengths: tokens that a fixed prefill reads at once; default powers of two from 16 to
            256. A longer prompt is read in pieces.
        decode_capacities: sizes of a fixed cache; the context is always one. Default 64, 128, 192,
            256, 320, ..., with growing steps: each at most a quarter larger from 256 on.
        fixed: whether sizes are fixed; they are where some are given.

    Raises:
        UserError: for lengths that are no integers from 1 to the context.
    """
    if not fixed and prefill_lengths is None and decode_capacities is None:
        return [
            Bucket("prefill", min(_PREFILL_LENGTHS[-1], context), context, free=True),
            Bucket("decode", 1, context, free=True),
        ]
    if prefill_lengths is None:
        prefill_lengths = {min(n, context) for n in _PREFILL_LENGTHS}
    if decode_capacities is None:
        decode_capacities = {context}
        capacity = 64
        while capacity < context:
            decode_capacities.add(capacity)
            capacity += max(64, 1 << (capacity.bit_length() - 3))
    lengths = _checked("prefill_lengths", prefill_lengths, context)
    capacities = sorted({*_checked("decode_capacities", decode_capacities, context), context})

    buckets = [Bucket(f"prefill_{n}", n, 0) for n in lengths]
    # For the later pieces of a prompt and for prompts after the first, a short and a long one over
    # few capacities are enough: per token they cost far less than decoding in any case.
    short, long = ([n for n in lengths if n <= most][-1:] for most in (32, 128))
    doubled = [c for c in capacities if c & (c - 1) == 0 or c == context]
    for n in sorted({*short, *long} or lengths[:1]):
        far = [c for c in doubled if c >= 2 * max(n, 64) or c == context]
        buckets += [Bucket(f"prefill_{n}_{c}", n, c) for c in far]
    names = {c: f"decode_{c}" for c in capacities} | {context: "decode"}
    return buckets + [Bucket(names[c], 1, c) for c in capacities]


def plan_verifies(
    context: int, buckets: Sequence[Bucket], verify_lengths: Sequence[int] | None = None
) -> list[Bucket]:
    """The verify signatures beside these prefill and decode signatures; none beside free ones,
    which verify any number of tokens themselves.

    Args:
        verify_lengths: tokens that are verified at once; default 5, see `VERIFY_LENGTH`. With
            none, `()`, drafts are read by the prefill signatures.

    Raises:
        UserError: for lengths that are no integers from 1 to the context.
    """
    if verify_lengths is None:
        verify_lengths = [min(VERIFY_LENGTH, context)]
    lengths = _checked("verify_lengths", verify_lengths, context) if verify_lengths else []
    # those of decode: going from one to the other never moves the cache
    capacities = [b.capacity for b in buckets if b.is_decode and not b.free]
    return [Bucket(f"verify_{n}_{c}", n, c) for n in lengths for c in capacities]


def group_heads(buckets: Sequence[Bucket], weights: Weights) -> list[Bucket]:
    """The same buckets, each with the number of heads that makes an input of its cache.

    A free decode becomes several, each for the capacities that want the same number. A free
    prefill wants none: XNNPACK's matrix products go through the heads by themselves.
    """
    found: list[Bucket] = []
    for bucket in buckets:
        most, step = bucket.capacity, CAPACITY_STEP
        if bucket.free and not bucket.is_decode:
            found.append(bucket)
            continue
        sizes = [*range(step, most, step), most] if bucket.free else [most]
        groups = {_heads_at_once(weights, size): size for size in sizes}  # the last of each
        for group, size in groups.items():
            name = bucket.signature if size == most else f"{bucket.signature}_{size}"
            found.append(dataclasses.replace(bucket, signature=name, capacity=size, group=group))
    return found


def _heads_at_once(weights: Weights, capacity: int) -> int:
    heads, head_dim = max(weights.config.block_heads), weights.config.head_dim
    return attention.heads_at_once(heads, capacity, head_dim, weights.cache)


def add_step(model: Model, weights: Weights, bucket: Bucket) -> None:
    """Add a prefill, decode or verify signature to `model`."""
    config, n, capacity = weights.config, bucket.tokens, bucket.capacity
    if bucket.free:
        if not bucket.is_decode:  # planned for the largest sizes, it takes 25 MB more at once
            n, capacity = Free(min(n, _FIRST_TOKENS)), min(capacity, _FIRST_ROWS)
        capacity = Free(capacity)
    epsilon = config.layer_norm_epsilon
    g = model.graph(bucket.signature)
    tokens, positions = (g.input(name, [n], np.int32) for name in ("tokens", "positions"))
    last = g.input("last", [1], np.int32) if bucket.is_prefill and not bucket.free else None
    masks = attention.masks(g, positions, capacity)

    x = layers.embed(g, weights, tokens, positions)  # (n, width)
    for i, block in enumerate(weights.blocks):
        y = layers.product(g, layers.normalize(g, x, block.attention_norm, epsilon), block.qkv)
        if weights.cache != attention.FIXED:
            y = layers.as_float(g, y)
        heads = attention.split_heads(g, y, 3 * block.num_heads)
        q, k, v = g.split(heads, 3, axis=0)  # each (num_heads, n, head_dim)
        k = attention.store(g, f"k_{i}", k, weights.cache)
        v = attention.store(g, f"v_{i}", v, weights.cache)
        old = None
        if capacity:
            shape = block.num_heads, capacity, config.head_dim
            old = [
                attention.past(g, name, shape, bucket.group, weights.cache, block.qkv.output)
                for name in (f"k_{i}", f"v_{i}")
            ]
        y = attention.attend(g, layers.as_float(g, q), k, v, old, masks)
        y = layers.product(g, attention.merge_heads(g, y), block.proj)
        x = layers.add(g, x, y, block.attention_add)
        y = layers.product(g, layers.normalize(g, x, block.mlp_norm, epsilon), block.fc)
        y = layers.product(g, layers.activate(g, config.activation, y), block.out)
        x = layers.add(g, x, y, block.mlp_add)

    x = layers.as_float(g, x)
    if bucket.is_prefill:
        g.output("hidden", x)
    if last is not None:
        x = g.embedding_lookup(last, x)  # that row alone, (1, width)
    if last is not None or not bucket.is_prefill:
        _output_logits(g, weights, x)


def add_logits(model: Model, weights: Weights, rows: int, fixed: bool = False) -> str:
    """Add `logits`, for any number of rows up to this, or `logits_{rows}`; returns its name."""
    name = f"logits_{rows}" if fixed else "logits"
    width, count = weights.config.embedding_dim, rows if fixed else Free(1)
    g = model.graph(name)
    hidden = g.reshape(g.input("hidden", [count * width]), [count, width])
    _output_logits(g, weights, hidden)
    return name


def _output_logits(g: Graph, weights: Weights, x: Tensor) -> None:
    logits = layers.logits(g, weights, x)
    g.output("logits", logits if weights.cache == attention.FIXED else layers.as_float(g, logits))


def _checked(name: str, values: Sequence[int], context: int) -> list[int]:
    values = list(values)
    if not values or not all(isinstance(n, int) and 0 < n <= context for n in values):
        raise UserError(
            f"{name} must be integers from 1 to the model's context, {context}. Received: {values}."
        )
    return sorted(set(values))
