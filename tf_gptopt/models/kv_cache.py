"""Keys and values of the tokens so far, so that a new token costs one position and not all of them.

Layout, the same wherever this package keeps a cache: per block a pair of arrays, keys and values,
each `(batch, num_heads, capacity, head_dim)`. Row `p` belongs to position `p` of its sequence. Rows
at and after a sequence's length hold anything at all: a query at position `p` sees rows `0..p`, and
a row is written before the first query that sees it. That is why prompts of different lengths share
a batch by padding on the right.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.layers import mask_value


class BlockCache(NamedTuple):
    """One block's keys and values, each `(batch, num_heads, capacity, head_dim)`."""

    keys: tf.Tensor
    values: tf.Tensor


Cache = list[BlockCache]


def create_cache(model: GPTModel, batch: int, capacity: int) -> Cache:
    """An empty cache for `batch` sequences of up to `capacity` tokens.

    Its dtype is the attention layers' compute dtype (bfloat16 under `mixed_bfloat16`).

    Raises:
        UserError: when `capacity` exceeds the model's context.
    """
    context = model.config.max_sequence_length
    if not 1 <= capacity <= context:
        raise UserError(
            f"A cache holds 1 to {context} tokens, the model's context. Received: "
            f"capacity={capacity}."
        )
    return [
        BlockCache(*(tf.zeros([batch, heads, capacity, head_dim], dtype) for _ in range(2)))
        for heads, head_dim, dtype in _block_shapes(model)
    ]


def cache_spec(model: GPTModel) -> list[BlockCache]:
    """`tf.TensorSpec`s of a cache of any batch and capacity, for a `tf.function`'s signature."""
    return [
        BlockCache(*(tf.TensorSpec([None, heads, None, head_dim], dtype) for _ in range(2)))
        for heads, head_dim, dtype in _block_shapes(model)
    ]


def grow_cache(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` tokens."""
    more = capacity - cache[0].keys.shape[2]
    padding = [[0, 0], [0, 0], [0, more], [0, 0]]
    return [
        BlockCache(tf.pad(block.keys, padding), tf.pad(block.values, padding)) for block in cache
    ]


def cached_forward(
    model: GPTModel,
    token_ids: tf.Tensor,
    cache: Cache,
    positions: tf.Tensor,
    logits_at: tf.Tensor | None = None,
) -> tuple[tf.Tensor, Cache]:
    """Logits of new tokens, given the cache of those before them, through the model's own layers.

    It works on any `GPTModel`, with pruning and quantization wrappers or without, eagerly and
    inside `tf.function`, for a prompt (many tokens) and for one token.

    Args:
        token_ids: `(batch, time)` int32.
        cache: from `create_cache` or an earlier call; it is not changed.
        positions: `(batch,)` int32, the position of each row's first new token.
        logits_at: `(batch,)` int32 index into `time`: ask for the logits of that token alone, which
            saves the large product with the token table for the others.

    Returns:
        Logits `(batch, time, vocab_size)` float32, or `(batch, vocab_size)` with `logits_at`; and
        the cache with the new rows.

    Raises:
        UserError: when the tokens do not fit into the cache (`tf.errors.InvalidArgumentError`
            inside `tf.function`).
    """
    token_ids = tf.convert_to_tensor(token_ids, tf.int32)
    positions = tf.convert_to_tensor(positions, tf.int32)
    checks = _check_fit(cache, positions, tf.shape(token_ids)[1])
    with tf.control_dependencies(checks):
        where = positions[:, None] + tf.range(tf.shape(token_ids)[1])  # (batch, time)

    # Embeddings
    x, table = _call(model, "token_embedding", token_ids)
    x = _call(model, "position_embedding", x, positions=where)

    # Blocks
    new_cache = []
    for i, block_cache in enumerate(cache):
        block = f"block_{i}"
        y = _call(model, f"{block}_attention_norm", x)
        y = _call(model, f"{block}_qkv", y)
        y, block_cache = _attend(model.base_layer(f"{block}_attention"), y, block_cache, where)
        y = _call(model, f"{block}_proj", y)
        x = _call(model, f"{block}_attention_add", [x, y])

        y = _call(model, f"{block}_mlp_norm", x)
        y = _call(model, f"{block}_fc", y)
        y = _call(model, f"{block}_gelu", y)
        y = _call(model, f"{block}_out", y)
        x = _call(model, f"{block}_mlp_add", [x, y])
        new_cache.append(block_cache)

    # Logits
    if logits_at is not None:
        x = tf.gather(x, tf.convert_to_tensor(logits_at, tf.int32)[:, None], axis=1, batch_dims=1)
    x = _call(model, "final_norm", x)
    logits = _call(model, "token_logits", [x, table] if model.config.tie_embeddings else x)
    return (logits if logits_at is None else logits[:, 0]), new_cache


def _attend(
    layer: keras.layers.Layer, qkv: tf.Tensor, cache: BlockCache, where: tf.Tensor
) -> tuple[tf.Tensor, BlockCache]:
    """CausalSelfAttention of queries at positions `where` to the cache and to themselves."""
    layer = getattr(layer, "layer", layer)
    q, k, v = layer.split_heads(qkv)  # (batch, num_heads, time, head_dim) each
    cache = BlockCache(_write(cache.keys, k, where), _write(cache.values, v, where))
    keys, values = tf.cast(cache.keys, q.dtype), tf.cast(cache.values, q.dtype)

    scores = tf.matmul(q * (q.shape[-1] ** -0.5), keys, transpose_b=True)
    future = tf.range(tf.shape(keys)[2]) > where[:, None, :, None]  # (batch, 1, time, capacity)
    scores += tf.cast(future, scores.dtype) * tf.cast(mask_value(scores.dtype), scores.dtype)
    return layer.merge_heads(tf.matmul(tf.nn.softmax(scores), values)), cache


def _write(rows: tf.Tensor, new: tf.Tensor, where: tf.Tensor) -> tf.Tensor:
    """`rows` `(batch, num_heads, capacity, head_dim)` with `new` at positions `(batch, time)`."""
    batch, heads, time = tf.shape(new)[0], tf.shape(new)[1], tf.shape(new)[2]
    shape = [batch, heads, time]
    index = tf.stack(
        [
            tf.broadcast_to(tf.range(batch)[:, None, None], shape),
            tf.broadcast_to(tf.range(heads)[None, :, None], shape),
            tf.broadcast_to(where[:, None, :], shape),
        ],
        axis=-1,
    )
    # a copy and a few rows; selecting between old and new everywhere costs two to four times that
    return tf.tensor_scatter_nd_update(rows, index, tf.cast(new, rows.dtype))


def _call(model: GPTModel, name: str, x: Any, **kwargs: Any) -> Any:
    layer = model.base_layer(name)
    if "training" in inspect.signature(layer.call).parameters:
        kwargs["training"] = False
    return layer(x, **kwargs)


def _block_shapes(model: GPTModel) -> list[tuple[int, int, str]]:
    """Heads, width of a head and dtype per block, as the layers know them."""
    shapes = []
    for i in range(model.config.num_layers):
        attention = model.base_layer(f"block_{i}_attention")
        attention = getattr(attention, "layer", attention)
        width = model.base_layer(f"block_{i}_qkv").output_shape[-1]
        heads = attention.num_heads
        shapes.append((heads, width // (3 * heads), attention.compute_dtype))
    return shapes


def _check_fit(cache: Cache, positions: tf.Tensor, time: tf.Tensor) -> list[tf.Operation]:
    capacity = tf.shape(cache[0].keys)[2]
    fits = tf.reduce_all((positions >= 0) & (positions + time <= capacity))
    if not tf.executing_eagerly():
        # without this a GPU drops the rows that do not fit, silently
        return [tf.debugging.Assert(fits, ["Tokens beyond the cache:", positions, time, capacity])]
    if not fits:
        raise UserError(
            f"{int(time)} tokens at positions {positions.numpy().tolist()} do not fit into a cache "
            f"of {int(capacity)}. Create a larger cache, or grow_cache it."
        )
    return []
