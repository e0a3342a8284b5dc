"""A GPT with a gate on every unit: it computes what would be left if units were taken out.

A gate of 1 leaves its unit as it is. Gates of 0 give exactly the logits of the model without those
units, so a cut can be tried before it is made; and the gradient of the loss to a gate says how much
the unit is worth. The forward pass goes block by block in float32, one compiled function for all
blocks of one shape; only the residual stream before each block is kept, and the backward pass
computes a block's inside again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.structured.surgery import Units
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.layers import CausalSelfAttention, activate
from tf_gptopt.models.linear_cross_entropy import Head, linear_cross_entropy


class BlockGates(NamedTuple):
    """The gates of one block, each `(batch or 1, units)`."""

    layer: tf.Tensor
    heads: tf.Tensor
    neurons: tf.Tensor
    channels: tf.Tensor


class Seen(NamedTuple):
    """Magnitudes in one block, averaged over time: each `(batch, units)`, `similarity` `(batch,)`.

    Attributes:
        heads: L2 norm of a head's output.
        neurons: absolute value behind GELU.
        norms: absolute values of both LayerNorms' outputs, one after the other.
        similarity: cosine between what enters the block and what leaves it.
    """

    heads: tf.Tensor
    neurons: tf.Tensor
    norms: tuple[tf.Tensor, tf.Tensor]
    similarity: tf.Tensor


def open_gates(config: GPTConfig, batch: int = 1) -> Units:
    """All gates at 1, for every example of a batch its own, `(batch, units)` float32."""

    def ones(units: int) -> np.ndarray:
        return np.ones((batch, units), np.float32)

    return Units(
        ones(config.num_layers),
        [ones(heads) for heads in config.block_heads],
        [ones(neurons) for neurons in config.block_intermediate_dims],
        ones(config.embedding_dim),
    )


class GatedGPT:
    """The function of a GPT, `weights` by name as `named_weights` gives them."""

    def __init__(self, weights: Mapping[str, np.ndarray], config: GPTConfig) -> None:
        self.config = config
        # float32 whatever policy the model has: scores must not depend on it
        self._weights = {name: tf.constant(array, tf.float32) for name, array in weights.items()}
        self._block = tf.function(self._run_block)
        self._block_gradient = tf.function(self._run_block_gradient)
        self._loss = tf.function(self._run_loss)
        self._loss_gradient = tf.function(self._run_loss_gradient)

    def embed(self, token_ids: np.ndarray) -> tf.Tensor:
        """`(batch, time)` int32 -> the residual stream `(batch, time, width)`. A negative id is
        padding, here and below: some token is read there, and counts in no magnitude or loss."""
        table = self._weights["token_embedding/embeddings"]
        positions = self._weights["position_embedding/embeddings"]
        return tf.gather(table, np.maximum(token_ids, 0)) + positions[: token_ids.shape[1]]

    def block(
        self, i: int, x: tf.Tensor, gates: Units, token_ids: np.ndarray | None = None
    ) -> tuple[tf.Tensor, Seen]:
        """The residual stream behind block `i`, and magnitudes over the text of `token_ids`, or
        all."""
        share = _time_shares(np.zeros(x.shape[:2]) if token_ids is None else token_ids)
        return self._block(x, self._block_weights(i), _of_block(gates, i), share)

    def block_gradient(
        self, i: int, x: tf.Tensor, gates: Units, upstream: tf.Tensor
    ) -> tuple[tf.Tensor, BlockGates]:
        """Gradients to `x` and to the block's gates."""
        return self._block_gradient(x, self._block_weights(i), _of_block(gates, i), upstream)

    def loss(
        self, x: tf.Tensor, token_ids: np.ndarray, gates: Units
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Summed next-token cross-entropy in nats, from the stream behind the last block; and the
        final norm's magnitudes, `(batch, width)`."""
        return self._loss(x, token_ids, gates.channels)

    def loss_gradient(
        self, x: tf.Tensor, token_ids: np.ndarray, gates: Units
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Gradients to `x` and to the channels' gates."""
        return self._loss_gradient(x, token_ids, gates.channels)

    def _block_weights(self, i: int) -> dict[str, tf.Tensor]:
        prefix = f"block_{i}_"
        return {
            name.removeprefix(prefix): array
            for name, array in self._weights.items()
            if name.startswith(prefix)
        }

    def _run_block(
        self,
        x: tf.Tensor,
        weights: dict[str, tf.Tensor],
        gates: BlockGates,
        share: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, Seen]:
        def dense(x: tf.Tensor, name: str) -> tf.Tensor:
            rows = tf.reshape(x, [-1, x.shape[-1]])  # one plain matmul, not a batched one
            y = tf.matmul(rows, weights[f"{name}/kernel"]) + weights[f"{name}/bias"]
            return tf.reshape(y, [*x.shape[:-1], y.shape[-1]])

        def norm(x: tf.Tensor, name: str) -> tf.Tensor:
            return self._norm(x, weights[f"{name}/gamma"], weights[f"{name}/beta"], gates.channels)

        count = gates.heads.shape[-1]
        first = norm(x, "attention_norm")
        y = CausalSelfAttention(count, dtype="float32")(dense(first, "qkv"))
        heads = tf.reshape(y, [*y.shape[:-1], count, -1]) * gates.heads[:, None, :, None]
        y = dense(tf.reshape(heads, y.shape), "proj")
        middle = x + y * gates.layer[:, :, None]

        second = norm(middle, "mlp_norm")
        neurons = activate(self.config.activation, dense(second, "fc")) * gates.neurons[:, None]
        end = middle + dense(neurons, "out") * gates.layer[:, :, None]

        cosine = tf.reduce_sum(tf.nn.l2_normalize(x, -1) * tf.nn.l2_normalize(end, -1), -1)
        if share is None:
            share = tf.fill(tf.shape(cosine), 1.0 / x.shape[1])
        return end, Seen(
            _over_time(tf.norm(heads, axis=-1), share),
            _over_time(tf.abs(neurons), share),
            (_over_time(tf.abs(first), share), _over_time(tf.abs(second), share)),
            tf.reduce_sum(cosine * share, 1),
        )

    def _run_block_gradient(
        self, x: tf.Tensor, weights: dict[str, tf.Tensor], gates: BlockGates, upstream: tf.Tensor
    ) -> tuple[tf.Tensor, BlockGates]:
        with tf.GradientTape() as tape:
            tape.watch([x, gates])
            end, _ = self._run_block(x, weights, gates)
        return tape.gradient(end, [x, gates], output_gradients=upstream)

    def _run_loss(
        self, x: tf.Tensor, token_ids: tf.Tensor, channels: tf.Tensor, training: bool = False
    ) -> tuple[tf.Tensor, tf.Tensor]:
        gamma, beta = self._weights["final_norm/gamma"], self._weights["final_norm/beta"]
        hidden = self._norm(x, gamma, beta, channels)
        table = self._weights.get("token_logits/kernel")  # (width, vocab_size)
        table = (
            self._weights["token_embedding/embeddings"] if table is None else tf.transpose(table)
        )
        labels, text = token_ids[:, 1:], tf.cast(token_ids >= 0, tf.float32)
        loss = linear_cross_entropy(Head(hidden[:, :-1], table, training), labels, text[:, 1:])
        share = text / tf.reduce_sum(text, 1, keepdims=True)
        return loss, _over_time(tf.abs(hidden), share)

    def _run_loss_gradient(
        self, x: tf.Tensor, token_ids: tf.Tensor, channels: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch([x, channels])
            loss, _ = self._run_loss(x, token_ids, channels, training=True)
        return tape.gradient(loss, [x, channels])

    def _norm(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, channels: tf.Tensor
    ) -> tf.Tensor:
        """LayerNorm over the channels that are open. Nothing else reads the residual stream, so
        this is all that a channel's gate has to reach. Its gradient is that of the weights which
        read the channel: mean and variance hardly change with an ordinary one, and would make even
        a channel that nobody reads count."""
        gates = channels[:, None]  # (batch or 1, 1, width)
        counted = tf.stop_gradient(gates)
        count = tf.reduce_sum(counted, -1, keepdims=True)
        centered = x - tf.reduce_sum(counted * x, -1, keepdims=True) / count
        variance = tf.reduce_sum(counted * centered**2, -1, keepdims=True) / count
        normal = centered * tf.math.rsqrt(variance + self.config.layer_norm_epsilon)
        return (normal * gamma + beta) * gates


def _time_shares(token_ids: np.ndarray) -> tf.Tensor:
    """What each token counts in its example's mean over time, `(batch, time)` float32."""
    text = (token_ids >= 0).astype(np.float32)
    return tf.constant(text / text.sum(1, keepdims=True))


def _over_time(values: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """Weighted means of `(batch, time, units)`, `(batch, units)`."""
    return tf.einsum("btu,bt->bu", values, share)


def _of_block(gates: Units, i: int) -> BlockGates:
    each = (gates.layers[:, i : i + 1], gates.heads[i], gates.neurons[i], gates.channels)
    return BlockGates(*(tf.convert_to_tensor(g, tf.float32) for g in each))
