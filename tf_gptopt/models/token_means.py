"""Means over labelled tokens: sum of losses / number of labels, over all batches and replicas.

A batch's loss is a mean over its labels, and batches, microbatches and replicas differ in how many
they have. Keras weighs such means by rows. Here each counts by its labels, in what `fit` and
`evaluate` report and in what an accumulating optimizer adds up, so that neither depends on how the
tokens were divided.

A loss takes part by three members, as `NextTokenLoss` has them: `averages`, whether it is a mean;
`labelled(y_true)`, bool, which labels count; and `sums(y_true, y_pred, sample_weight)`, the
weighted sum of the losses and the number of labels, float32 scalars of this replica.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._keras import keras

_compile_utils = keras.src.engine.compile_utils
_losses_utils = keras.src.utils.losses_utils


def is_label(labels: tf.Tensor, ignore_label: int | None = None) -> tf.Tensor:
    """Which labels count, bool: those that are not negative, and not `ignore_label`."""
    counts = labels >= 0
    if ignore_label is not None and ignore_label >= 0:
        counts &= labels != ignore_label
    return counts


def check_labels(labels: tf.Tensor, vocab_size: int) -> None:
    """Let the graph raise where a label is no token. XLA knows no errors: losses are NaN there."""
    largest = tf.reduce_max(labels)
    message = (
        f"A label is no token: labels are ids below the vocabulary's {vocab_size}, and negative "
        "ones do not count. Encode the text with this model's own tokenizer. Received a label:"
    )
    tf.debugging.Assert(largest < tf.cast(vocab_size, largest.dtype), [message, largest])


def labels_of(loss: Any, labels: tf.Tensor) -> tf.Tensor:
    """Which labels count in `loss`, bool; a loss of Keras's has nothing to say of it."""
    known = getattr(loss, "labelled", is_label)
    return known(labels)


def token_weights(sample_weight: Any) -> tf.Tensor | float:
    """Weights that broadcast to `(batch, time)`, float32; one axis is one a sequence."""
    if sample_weight is None:
        return 1.0
    weights = tf.cast(sample_weight, tf.float32)
    return weights[:, None] if weights.shape.rank == 1 else weights


def count(loss: Any, labels: tf.Tensor) -> tf.Tensor:
    """By what the mean that `loss` is counts: its labels, or the rows of the batch, float32."""
    if averages_tokens(loss):
        return tf.reduce_sum(tf.cast(loss.labelled(labels), tf.float32))
    return tf.cast(tf.shape(labels)[0], tf.float32)


def everywhere(tokens: tf.Tensor) -> tf.Tensor:
    """The sum of a number of tokens over all replicas, on each of them."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return tokens
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, tokens)


def averages_tokens(loss: Any) -> bool:
    """Whether `loss` is a mean over labels that tells its sum and their number."""
    return getattr(loss, "averages", False)


def average_over_tokens(model: keras.Model) -> None:
    """Let the `loss` that a compiled model reports be a mean over labels; call it after `compile`.

    Does nothing where the loss is none that counts its labels (`averages_tokens`).
    """
    before = model.compiled_loss
    if not averages_tokens(before._user_losses) or isinstance(before, TokenMeanLosses):
        return
    model.compiled_loss = TokenMeanLosses(
        before._user_losses,
        before._user_loss_weights,
        output_names=before._output_names,
        total_loss_mean=before._total_loss_mean,
        optimizer=model.optimizer,
    )


def weigh(optimizer: Any, tokens: tf.Tensor) -> None:
    """Tell an accumulating optimizer over how many labels, of all replicas, the next gradient is a
    mean; others do not ask."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if hasattr(inner, "weigh"):
        inner.weigh(tokens)


class TokenMeanLosses(_compile_utils.LossesContainer):
    """Keras's container of a compiled loss, for one that averages over labels."""

    def __init__(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._optimizer = optimizer

    def __call__(
        self,
        y_true: Any,
        y_pred: tf.Tensor,
        sample_weight: Any = None,
        regularization_losses: Any = None,
    ) -> tf.Tensor | None:
        """This replica's share of the mean over the labels of all replicas."""
        if not self._built:
            self.build(y_pred)
        (y_true,), (y_pred,), (sample_weight,) = (
            tf.nest.flatten(self._conform_to_outputs(y_pred, x))
            for x in (y_true, y_pred, sample_weight)
        )
        if y_true is None:
            return None
        (loss,), (scale,) = self._losses, self._loss_weights
        total, tokens = loss.sums(y_true, y_pred, sample_weight)
        if scale is not None:
            total *= scale
        value = tf.math.divide_no_nan(total, tokens)
        all_tokens = everywhere(tokens)
        share = tf.math.divide_no_nan(total, all_tokens)
        if regularization_losses:
            extra = tf.add_n(_losses_utils.cast_losses_to_common_dtype(regularization_losses))
            value += extra
            share += _losses_utils.scale_loss_for_distribution(extra)
        self._total_loss_mean.update_state(value, sample_weight=tokens)
        weigh(self._optimizer, all_tokens)
        return share
