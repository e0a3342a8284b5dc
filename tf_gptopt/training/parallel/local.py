"""What one device of a mesh computes by itself, between two exchanges with the others."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.models import fused
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.layers import CausalSelfAttention, TokenLogits, make_activation
from tf_gptopt.training.parallel.sharding import sizes


class LocalGPT(keras.layers.Layer):
    """A column's share of every block: its heads, its neurons, its part of the vocabulary.

    It has no weights: each method is a function of tensors, weights among them, that lie on the
    device already. `x` is the residual stream, `(batch, time, width)`, the same in all columns.

    Args:
        config: the shape of the whole model.
        row, column: of this device in the mesh.
        columns: of the mesh.
        device: its name.
    """

    def __init__(
        self, config: GPTConfig, row: int, column: int, columns: int, device: str, **kwargs: Any
    ) -> None:
        super().__init__(name=f"device_{row}_{column}", **kwargs)
        self.config, self.row = config, row
        tokens = sizes(config.vocab_size, columns)
        self.first_token, self.tokens = sum(tokens[:column]), tokens[column]
        same = {"dtype": self.dtype_policy}
        self.activation = make_activation(config.activation, **same)
        self.token_logits = TokenLogits(**same)
        _, attention_dropout, _ = config.dropouts
        self.attention = [
            CausalSelfAttention(sizes(heads, columns)[column], attention_dropout, **same)
            for heads in config.block_heads
        ]
        if attention_dropout:
            with tf.device(device):  # here lie the random states, which the first call makes
                for layer in self.attention:
                    layer.weights_dropout(tf.ones([1]), training=True)

    def embed(self, token_ids: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        """Vectors of the tokens that this column's table holds, and zeros for the others."""
        own = token_ids - self.first_token
        is_own = (own >= 0) & (own < self.tokens)
        vectors = tf.gather(table, tf.where(is_own, own, 0))
        return tf.where(is_own[..., None], vectors, tf.zeros([], vectors.dtype))

    def start(self, seed: Any, vectors: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """The residual stream before the first block."""
        return self._drop(vectors + positions[: tf.shape(vectors)[1]], seed, 0)

    def attend(
        self, block: int, training: bool, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor,
        qkv: tf.Tensor, qkv_bias: tf.Tensor, proj: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
        """x, and this column's term of what attention adds to it."""
        y = self._norm(x, gamma, beta, training)
        y = self.attention[block](_times(y, qkv) + qkv_bias, training=training)
        return tf.identity(x), _times(y, proj)

    def mlp(
        self, block: int, training: bool, seed: Any, x: tf.Tensor, attended: tf.Tensor,
        proj_bias: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor,
        fc: tf.Tensor, fc_bias: tf.Tensor, out: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
        """x with attention added, and this column's term of what the MLP adds to it."""
        x += self._drop(attended + proj_bias, seed, 2 * block + 1)
        y = self._norm(x, gamma, beta, training)
        y = self.activation(_times(y, fc) + fc_bias, training=training)
        return x, _times(y, out)

    def finish(
        self, block: int, seed: Any, x: tf.Tensor, summed: tf.Tensor, out_bias: tf.Tensor
    ) -> tf.Tensor:
        """The residual stream after a block."""
        return x + self._drop(summed + out_bias, seed, 2 * block + 2)

    def logits(
        self, training: bool, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, head: tf.Tensor
    ) -> tf.Tensor:
        """This column's logits, `(batch, time, share of the vocabulary)` float32."""
        x = self._norm(x, gamma, beta, training)
        if self.config.tie_embeddings:
            return self.token_logits([x, head])
        return _times(tf.cast(x, tf.float32), head)

    def _norm(self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, training: bool) -> tf.Tensor:
        epsilon = self.config.layer_norm_epsilon
        if training:
            return fused.layer_norm(x, gamma, beta, epsilon)
        wide, gamma, beta = (tf.cast(value, tf.float32) for value in (x, gamma, beta))
        mean, variance = tf.nn.moments(wide, -1, keepdims=True)
        y = tf.nn.batch_normalization(wide, mean, variance, beta, gamma, epsilon)
        return tf.cast(y, x.dtype)

    def _drop(self, x: tf.Tensor, seed: Any, place: int) -> tf.Tensor:
        """Dropout with the same mask in every column, and another one in every row and place."""
        rate = self.config.dropouts[0 if place == 0 else 2]  # after the embeddings, or a branch
        if seed is None or not rate:
            return x
        places = 2 * self.config.num_layers + 1
        own = seed + tf.constant([self.row * places + place, 0], seed.dtype)
        return tf.nn.experimental.stateless_dropout(x, rate, own)


def _times(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """`x @ kernel` over the last axis, as one plain product."""
    rows = tf.matmul(tf.reshape(x, [-1, x.shape[-1]]), kernel)
    time = x.shape[1] or tf.shape(x)[1]  # static where it is known: attention asks for it
    return tf.reshape(rows, [tf.shape(x)[0], time, kernel.shape[-1]])
