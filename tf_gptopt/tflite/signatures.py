"""The functions in the file: `prefill_{n}`, `prefill_{n}_{c}`, `decode_{c}`, `verify_{n}_{c}` and
`logits_{n}`.

All but the last are one forward pass in different static shapes: n tokens come in, and c is the
capacity of the KV cache that they look back at. XNNPACK copies the whole cache on every call, so a
token costs what the capacity is and not what is filled: hence several capacities, of which the
runtime takes the smallest that holds the tokens so far.

- `prefill_{n}` reads the first tokens: `tokens` (n,), `last` (1,) int32. It returns `logits`
  (1, vocab_size), `hidden` (n, width) and the new keys and values.
- `prefill_{n}_{c}` reads more: also `position` (1,) int32 and a cache.
- `decode_{c}` reads one: `tokens` (1,), `position` (1,) and a cache. It returns `logits` and the
  new keys and values. `decode` is the one whose cache holds the whole context.
- `verify_{n}_{c}` is a decode of n tokens, with the `logits` (n, vocab_size) of all: a draft is
  read as one token is, and shows where it leaves the way.
- `logits_{n}` turns `hidden`, (n * width,) flat, into the `logits` (n, vocab_size) of all tokens.

The cache is two inputs per block, `k_{i}` and `v_{i}`: flat float32 in the layout (num_heads,
capacity, head_dim), where row p belongs to position p. A large one comes in by several inputs of a
few heads each, `k_{i}_{first head}`. It is never an output: `new_k_{i}` and
`new_v_{i}`, (num_heads, n, head_dim), are, and the caller writes them to the rows from `position`
on. So nothing is copied but what is new. An int8 cache has int8 arrays in their place and, beside
each, float32 scales: `k_scale_{i}` flat (num_heads, capacity), `new_k_scale_{i}` (num_heads, n).

With `io="int8"` the `logits` are int8, and the cache is int8 of one scale a block and no others.
The scales and zero points stand in the tensors, and that of the logits in the metadata too.

`position` is the number of tokens in the cache; what lies in later rows has no effect, as long as
it is finite. Fewer than n tokens are padded at their end with any valid ids, and `last` says which
row the logits belong to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.tflite import attention, layers
from tf_gptopt.tflite.flatbuffer import Model
from tf_gptopt.tflite.graph import Graph
from tf_gptopt.tflite.layers import Weights
from tf_gptopt.tflite.metadata import Bucket
from tf_gptopt.tflite.tensors import Tensor

LOGITS_ROWS = 128  # positions that `logits_{n}` does at once
_VERIFY_LENGTH = 5


def plan_buckets(
    context: int,
    prefill_lengths: Sequence[int] | None = None,
    decode_capacities: Sequence[int] | None = None,
) -> list[Bucket]:
    """The prefill and decode signatures of a model with this context.

    Args:
        context: the longest sequence, in tokens.
        prefill_lengths: tokens that a prefill reads at once; default powers of two from 16 to 256.
            A longer prompt is read in pieces.
        decode_capacities: sizes of the cache; the context is always one. Default 64, 128, 192, 256,
            320, ..., with growing steps: each at most a quarter larger from 256 on.

    Raises:
        UserError: for lengths that are no integers from 1 to the context.
    """
    if prefill_lengths is None:
        prefill_lengths = {min(n, context) for n in (16, 32, 64, 128, 256)}
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
    """The verify signatures beside these prefill and decode signatures.

    Args:
        verify_lengths: tokens that are verified at once; default 5, as many as XNNPACK multiplies
            with a matrix in one pass on a processor with AVX-512 (others: 4). With none, `()`,
            drafts are read by the prefill signatures.

    Raises:
        UserError: for lengths that are no integers from 1 to the context.
    """
    if verify_lengths is None:
        verify_lengths = [min(_VERIFY_LENGTH, context)]
    lengths = _checked("verify_lengths", verify_lengths, context) if verify_lengths else []
    # those of decode: going from one to the other never moves the cache
    capacities = [b.capacity for b in buckets if b.is_decode]
    return [Bucket(f"verify_{n}_{c}", n, c) for n in lengths for c in capacities]


def group_heads(buckets: Sequence[Bucket], weights: Weights) -> list[Bucket]:
    """The same buckets, each with the number of heads that makes an input of its cache."""
    heads, head_dim = max(weights.config.block_heads), weights.config.head_dim
    return [
        dataclasses.replace(
            b, group=attention.heads_at_once(heads, b.capacity, head_dim, weights.cache)
        )
        for b in buckets
    ]


def add_step(model: Model, weights: Weights, bucket: Bucket) -> None:
    """Add a prefill, decode or verify signature to `model`."""
    config, n, capacity = weights.config, bucket.tokens, bucket.capacity
    epsilon = config.layer_norm_epsilon
    g = model.graph(bucket.signature)
    tokens = g.input("tokens", [n], np.int32)
    last = g.input("last", [1], np.int32) if bucket.is_prefill else None
    position = g.input("position", [1], np.int32) if capacity else None
    masks = attention.masks(g, n, capacity, position)

    x = layers.embed(g, weights, tokens, position)  # (n, width)
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
        y = layers.product(g, g.gelu(layers.as_float(g, y)), block.out)
        x = layers.add(g, x, y, block.mlp_add)

    x = layers.as_float(g, x)
    if last is not None:
        g.output("hidden", x)
        x = g.embedding_lookup(last, x)  # that row alone, (1, width)
    _output_logits(g, weights, x)


def add_logits(model: Model, weights: Weights, rows: int) -> str:
    """Add `logits_{rows}`; returns its name."""
    width = weights.config.embedding_dim
    g = model.graph(f"logits_{rows}")
    hidden = g.reshape(g.input("hidden", [rows * width]), [rows, width])
    _output_logits(g, weights, hidden)
    return f"logits_{rows}"


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
