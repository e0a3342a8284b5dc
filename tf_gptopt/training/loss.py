"""The loss of a language model: cross-entropy of the next token, averaged over tokens."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt.models.fused import CrossEntropy, cross_entropy
from tf_gptopt.models.layers import register
from tf_gptopt.models.linear_cross_entropy import linear_cross_entropy
from tf_gptopt.models.token_means import check_labels, everywhere, is_label, token_weights

_Reduction = keras.losses.Reduction


@register
class NextTokenLoss(keras.losses.Loss):
    """Mean cross-entropy in nats; `exp` of it is the perplexity.

    ```python
    model.compile(adamw(steps=1000), loss=NextTokenLoss())
    ```

    Call arguments:
        y_true: labels `(batch, time)` int32, already shifted. A negative one (-1, or -100 as in
            Hugging Face's data) marks a token that does not count, padding for example.
        y_pred: logits `(batch, time, vocab_size)`.
        sample_weight: None, or weights that broadcast to `(batch, time)`.

    Returns a float32 scalar: the sum over labelled tokens divided by their number. Under a
    `tf.distribute` strategy the number is that of all replicas and the sum is each replica's own:
    what the replicas return adds up to the mean, and their gradients, which optimizers sum, to
    those of one device with the same global batch, however the padding is spread. So it is in
    `fit`, and in a training loop of your own, where `strategy.reduce("SUM", losses, axis=None)` is
    the batch's loss.

    In a compiled model whose last layer is ours the logits are never held whole: the loss starts
    from the last hidden states, a chunk of rows at a time (`linear_cross_entropy`), and the logits
    themselves are not computed, unless a metric or a `call` of a subclass asks for them.

    Args:
        ignore_label: tokens with this label do not count either; for data that marks padding by
            the id of a token.
        label_smoothing: share of the target that is spread evenly over the vocabulary, in [0, 1)
            (Szegedy et al. 2016, arXiv:1512.00567).
        z_loss: what log(Z)^2 of a token costs, with Z the sum of the exponentials of its logits;
            1e-4 keeps logits from drifting (Chowdhery et al. 2022, "PaLM", arXiv:2204.02311).
        reduction: of Keras: "sum" or "none" in place of the mean.

    Raises:
        UserError: when a number is out of its range.
        tf.errors.InvalidArgumentError: for a label that is no token of the vocabulary; inside of
            XLA, which knows no errors, the loss is NaN.
    """

    def __init__(
        self,
        ignore_label: int = -1,
        name: str = "next_token_loss",
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = _Reduction.AUTO,
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        if not 0 <= label_smoothing < 1 or not z_loss >= 0:
            raise UserError(
                "label_smoothing is a share in [0, 1) and z_loss a weight from 0. "
                f"Received: {label_smoothing=}, {z_loss=}."
            )
        self.ignore_label, self.label_smoothing, self.z_loss = ignore_label, label_smoothing, z_loss
        self._asked = self.reduction
        self.averages = self.reduction in (_Reduction.AUTO, _Reduction.SUM_OVER_BATCH_SIZE)
        if self.averages:
            # Keras would divide by the number of replicas, and a share of the mean is divided
            self.reduction = _Reduction.SUM

    @property
    def form(self) -> CrossEntropy | None:
        """What is computed from a token's logits; None where a subclass has its own `call`."""
        if type(self).call is not NextTokenLoss.call:
            return None
        return CrossEntropy(self.label_smoothing, self.z_loss)

    def labelled(self, y_true: tf.Tensor) -> tf.Tensor:
        """Which labels count, bool."""
        return is_label(y_true, self.ignore_label)

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """Loss of each token, `(batch, time)` float32; 0 where the label does not count."""
        labels = tf.cast(tf.reshape(y_true, [-1]), tf.int32)
        logits = tf.reshape(y_pred, [-1, y_pred.shape[-1]])
        counted = self.labelled(labels)
        check_labels(labels, y_pred.shape[-1])
        form = CrossEntropy(self.label_smoothing, self.z_loss)
        losses = cross_entropy(logits, tf.where(counted, labels, 0), form)
        return tf.reshape(tf.where(counted, losses, 0.0), tf.shape(y_true))

    def sums(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The weighted sum of the losses and the number of labels, float32 scalars; of this
        replica. Arguments as of a call."""
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        counted = tf.cast(self.labelled(y_true), tf.float32)
        weights = counted * token_weights(sample_weight)
        head = getattr(y_pred, "head", None)
        if head is not None and self.form is not None and y_true.shape.rank == 2:
            labels = tf.cast(y_true, tf.int32)
            check_labels(labels, y_pred.shape[-1])
            total = linear_cross_entropy(head, labels, weights, form=self.form)
        else:
            total = tf.reduce_sum(self.call(y_true, y_pred) * weights)
        return total, tf.reduce_sum(counted)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        if self.reduction == _Reduction.NONE:
            y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
            counted = tf.cast(self.labelled(y_true), tf.float32)
            return self.call(y_true, y_pred) * counted * token_weights(sample_weight)
        total, tokens = self.sums(y_true, y_pred, sample_weight)
        return tf.math.divide_no_nan(total, everywhere(tokens)) if self.averages else total

    def get_config(self) -> dict[str, Any]:
        return {
            "ignore_label": self.ignore_label,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "reduction": self._asked,
            "name": self.name,
        }
