"""The loss of a language model: cross-entropy of the next token, averaged over tokens."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras
from tf_gptopt.models.fused import cross_entropy
from tf_gptopt.models.layers import register
from tf_gptopt.models.linear_cross_entropy import linear_cross_entropy


@register
class NextTokenLoss(keras.losses.Loss):
    """Mean cross-entropy in nats; `exp` of it is the perplexity.

    ```python
    model.compile(adamw(steps=1000), loss=NextTokenLoss())
    ```

    Call arguments:
        y_true: labels `(batch, time)` int32, already shifted; `ignore_label` marks padding.
        y_pred: logits `(batch, time, vocab_size)`.
        sample_weight: None, or weights that broadcast to `(batch, time)`.

    Returns a float32 scalar: the sum over labelled tokens divided by their number. Under a
    `tf.distribute` strategy the number is that of all replicas, so N devices give the loss and the
    gradients of one with the same global batch, however the padding is spread. A label that is no
    token makes the loss NaN.

    In a compiled model whose last layer is ours the logits are never held whole: the loss starts
    from the last hidden states, a chunk of rows at a time (`linear_cross_entropy`), and the logits
    themselves are not computed, unless a metric asks for them.

    Args:
        ignore_label: tokens with this label do not count.
    """

    def __init__(
        self, ignore_label: int = -1, name: str = "next_token_loss", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.ignore_label = ignore_label

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """Loss of each token, `(batch, time)` float32; 0 where the label is ignored."""
        labels = tf.cast(tf.reshape(y_true, [-1]), tf.int32)
        logits = tf.reshape(y_pred, [-1, y_pred.shape[-1]])
        ignored = labels == self.ignore_label
        losses = cross_entropy(logits, tf.where(ignored, 0, labels))
        return tf.reshape(tf.where(ignored, 0.0, losses), tf.shape(y_true))

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        counted = tf.cast(y_true != self.ignore_label, tf.float32)
        weights = counted
        if sample_weight is not None:
            weight = tf.cast(sample_weight, tf.float32)
            weights *= weight[:, None] if weight.shape.rank == 1 else weight  # one a sequence
        if self.reduction == keras.losses.Reduction.NONE:
            return self.call(y_true, y_pred) * weights
        head = getattr(y_pred, "head", None)
        if head is not None and y_true.shape.rank == 2:
            total = linear_cross_entropy(head, tf.cast(y_true, tf.int32), weights)
        else:
            total = tf.reduce_sum(self.call(y_true, y_pred) * weights)
        if self.reduction == keras.losses.Reduction.SUM:
            return total
        tokens = tf.reduce_sum(counted)
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            # Keras divides the loss by the number of replicas, so an average belongs here
            tokens = replica.all_reduce(tf.distribute.ReduceOp.MEAN, tokens)
        return tf.math.divide_no_nan(total, tokens)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "ignore_label": self.ignore_label}
