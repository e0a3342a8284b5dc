"""The layers of a GPT that Keras does not have: embeddings, causal attention, tied logits.

None of them hides a Dense inside: projections are ordinary `Dense` layers of the flat model, where
pruning and quantization wrappers can see them. Sizes are read from the tensors, never from a model
configuration, because structured pruning makes them differ from block to block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models import fused
from tf_gptopt.models.attention import blockwise_attention
from tf_gptopt.models.custom_gradients import custom_gradient
from tf_gptopt.models.linear_cross_entropy import Head

register = keras.utils.register_keras_serializable(package="tf_gptopt")


@register
class TokenEmbedding(keras.layers.Layer):
    """Looks tokens up and hands the table on, so that the logits can share it.

    Returns two tensors, `(batch, time, width)` and the table `(vocab_size, width)`. Passing the
    table through the graph (rather than calling this layer twice) keeps the model flat with one
    node a layer, and what a wrapper does to the table (a mask, fake quantization) reaches both of
    its uses.

    Call arguments:
        token_ids: `(batch, time)` int32, each in `[0, vocab_size)`.
    """

    def __init__(self, vocab_size: int, embedding_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim

    def build(self, input_shape: Any) -> None:
        self.embeddings = self.add_weight(
            "embeddings",
            (self.vocab_size, self.embedding_dim),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )
        super().build(input_shape)

    def call(self, token_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        table = tf.convert_to_tensor(self.embeddings)  # cast once under mixed precision
        return tf.gather(table, token_ids), table

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "vocab_size": self.vocab_size,
            "embedding_dim": self.embedding_dim,
        }


@register
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector per position to `(batch, time, width)`, for time <= max_length."""

    def __init__(self, max_length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_length = max_length

    def build(self, input_shape: Any) -> None:
        self.embeddings = self.add_weight(
            "embeddings",
            (self.max_length, input_shape[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.01),
        )
        super().build(input_shape)

    def call(self, x: tf.Tensor, positions: tf.Tensor | None = None) -> tf.Tensor:
        """Add positions 0..time-1, or the given ones, `(batch, time)` int32."""
        table = tf.convert_to_tensor(self.embeddings)
        if positions is not None:
            return x + tf.gather(table, positions)
        time = tf.shape(x)[1]
        advice = (
            f"tokens long and the model's context is {self.max_length}. Cut the input or build "
            "the model with a larger max_sequence_length."
        )
        if x.shape[1] is None:
            fits = tf.debugging.Assert(time <= self.max_length, ["The input is", time, advice])
            with tf.control_dependencies([] if tf.executing_eagerly() else [fits]):
                time = tf.identity(time)
        elif x.shape[1] > self.max_length:
            raise UserError(f"The input is {x.shape[1]} {advice}")
        return x + table[:time]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "max_length": self.max_length}


@register
class CausalSelfAttention(keras.layers.Layer):
    """Softmax attention of each position to itself and those before it; it has no weights.

    Call arguments:
        qkv: `(batch, time, 3 * num_heads * head_dim)`: queries, keys and values side by side.

    Returns `(batch, time, num_heads * head_dim)`.

    Attributes:
        round_cache: what a KV cache of integers does to keys and values, or None.
    """

    round_cache: Callable[[tf.Tensor], tf.Tensor] | None = None

    def __init__(self, num_heads: int, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.dropout = dropout
        # in this layer's own dtype, whatever policy is global when it is cloned or loaded
        own = {"name": "weights_dropout", "dtype": self.dtype_policy}
        self.weights_dropout = Dropout(dropout, **own) if dropout else None

    def split_heads(self, qkv: tf.Tensor) -> list[tf.Tensor]:
        """q, k and v, each `(batch, num_heads, time, head_dim)`."""
        batch, time = tf.shape(qkv)[0], qkv.shape[1] or tf.shape(qkv)[1]
        head_dim = qkv.shape[-1] // (3 * self.num_heads)
        parts = tf.reshape(qkv, [batch, time, 3, self.num_heads, head_dim])
        # one transposition, then views: slicing first costs 15% of a training step
        q, k, v = tf.unstack(tf.transpose(parts, [2, 0, 3, 1, 4]))
        return [q, k, v] if self.round_cache is None else [q, *map(self.round_cache, (k, v))]

    def merge_heads(self, x: tf.Tensor) -> tf.Tensor:
        """`(batch, num_heads, time, head_dim)` -> `(batch, time, num_heads * head_dim)`."""
        x = tf.transpose(x, [0, 2, 1, 3])
        return tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1], x.shape[2] * x.shape[3]])

    def call(self, qkv: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        q, k, v = self.split_heads(qkv)
        q *= q.shape[-1] ** -0.5
        if training is True and qkv.shape[1] and self.weights_dropout is None:
            return self.merge_heads(blockwise_attention(q, k, v))
        time = tf.shape(q)[2]
        scores = tf.matmul(q, k, transpose_b=True)
        future = 1.0 - tf.linalg.band_part(tf.ones([time, time]), -1, 0)
        scores += tf.cast(future * mask_value(scores.dtype), scores.dtype)
        weights = tf.nn.softmax(scores)
        if self.weights_dropout is not None:
            weights = self.weights_dropout(weights, training=training)
        return self.merge_heads(tf.matmul(weights, v))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_heads": self.num_heads, "dropout": self.dropout}


@register
class Gelu(keras.layers.Layer):
    """x times the normal distribution's probability of less than x (Hendrycks & Gimpel 2016): by
    default GPT-2's `gelu_new`, the approximation with tanh."""

    def __init__(self, approximate: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.approximate = approximate

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if training is not True:
            return tf.nn.gelu(x, approximate=self.approximate)
        return fused.gelu(x) if self.approximate else fused.exact_gelu(x)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "approximate": self.approximate}


@register
class Relu(keras.layers.Layer):
    """x where it is positive, else 0."""

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return tf.nn.relu(x)


def make_activation(kind: str, **kwargs: Any) -> keras.layers.Layer:
    """The layer of an activation, one of `config.ACTIVATIONS`."""
    return Relu(**kwargs) if kind == "relu" else Gelu(kind == "gelu_new", **kwargs)


def activate(kind: str, x: tf.Tensor) -> tf.Tensor:
    """What such a layer computes outside of training."""
    return tf.nn.relu(x) if kind == "relu" else tf.nn.gelu(x, approximate=kind == "gelu_new")


@register
class LayerNorm(keras.layers.LayerNormalization):
    """`LayerNormalization` over the last axis, faster in training."""

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if training is not True:
            return super().call(inputs)
        return fused.layer_norm(inputs, self.gamma, self.beta, self.epsilon)


@register
class TokenLogits(keras.layers.Layer):
    """Logits from the shared token table: `[(batch, time, width), (vocab_size, width)]` in,
    `(batch, time, vocab_size)` float32 out, under every dtype policy.

    The output carries what it was made of as its attribute `head` (`linear_cross_entropy.Head`), as
    Keras's softmax carries its logits. A loss that starts from there leaves the logits unused, and
    an operation whose result nobody uses is not run.
    """

    def call(self, inputs: list[tf.Tensor], training: bool | None = None) -> tf.Tensor:
        x, table = inputs
        rows = tf.reshape(x, [-1, x.shape[-1]])  # one plain matmul, not a batched one
        logits = _rows_times_table(rows, table)
        time = x.shape[1] or tf.shape(x)[1]
        logits = tf.reshape(logits, [tf.shape(x)[0], time, table.shape[0]])
        return with_head(tf.cast(logits, tf.float32), x, table, training)


@register
class LogitsDense(keras.layers.Dense):
    """A head with a table of its own, which like `TokenLogits` tells what its output is made of."""

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        logits = super().call(inputs)
        if tf.executing_eagerly() or self.use_bias or self.activation != keras.activations.linear:
            return logits
        table = tf.transpose(tf.convert_to_tensor(self.kernel))
        return with_head(logits, tf.cast(inputs, table.dtype), table, training)


def with_head(
    logits: tf.Tensor, rows: tf.Tensor, table: tf.Tensor, training: bool | None
) -> tf.Tensor:
    """`logits`, knowing what they were made of; in a graph, where unused logits cost nothing."""
    if not tf.executing_eagerly():
        logits.head = Head(rows, table, training is True)
    return logits


@custom_gradient
def _rows_times_table(rows: tf.Tensor, table: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """`rows @ table.T`; the table's gradient is the wide product transposed, which is 15% faster
    on a CPU than the tall one that TensorFlow would compute."""

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        wide = tf.matmul(rows, upstream, transpose_a=True)  # (width, vocab_size)
        return tf.matmul(upstream, table), tf.transpose(wide)

    return tf.matmul(rows, table, transpose_b=True), gradient


def mask_value(dtype: tf.DType) -> float:
    """What is added to a score to forbid it: far below any score, and finite in `dtype`."""
    return -3e4 if dtype == tf.float16 else -1e9


@register
class Dropout(keras.layers.Dropout):
    """A Dropout whose random state is a variable that checkpoints hold, so that a resumed run draws
    the masks that an undisturbed one would have drawn. Keras's keeps it out of them."""

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(rate, **{**kwargs, "rng_type": "stateful"})

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.random_state = self._random_generator._generator
