"""What a model predicts: loss and perplexity on held-out tokens, and whom it agrees with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt._ids import as_ids
from tf_gptopt.models.gpt import GPTModel, require_gpt
from tf_gptopt.tflite.runtime import TFLiteGPT

Batch = tuple[np.ndarray, np.ndarray]  # inputs and labels, both (batch, time) int32
Piece = tuple[slice, Any]  # which rows of a batch, and their logits
_BATCHES = "Batches are pairs of inputs and labels, both token ids (batch, time), integers."


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text.

    Args:
        loss: mean cross-entropy, nats per token.
        tokens: how many tokens were predicted.
        top1: the most likely next token at every labelled position, in order, int32 `(tokens,)`.
        kl: mean KL(reference || model) of the next token's distribution, nats, where there was a
            reference.
    """

    loss: float
    tokens: int
    top1: np.ndarray
    kl: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def agreement(self, reference: Quality) -> float:
        """Share of positions, teacher-forced, at which both find the same token most likely."""
        if self.top1.shape != reference.top1.shape:
            raise UserError(
                "Agreement compares models on the same tokens. Received: "
                f"{self.tokens} and {reference.tokens} predictions."
            )
        return float(np.mean(self.top1 == reference.top1))


def measure_quality(
    model: GPTModel | TFLiteGPT,
    batches: Iterable[Batch],
    reference: GPTModel | TFLiteGPT | Iterable[np.ndarray] | None = None,
) -> Quality:
    """Score a Keras model or a .tflite file on batches of `(inputs, labels)`, (batch, time) int32.

    The losses are computed from float32 logits. Negative labels do not count.

    Args:
        reference: a model whose distribution of the next token is compared with (`Quality.kl`), or
            its logits, `(batch, time, vocab_size)` for each batch.

    Raises:
        UserError: when there is no batch, and for anything but token ids in one.
    """
    forward, theirs = _logits_of(model), _reference_logits(reference)
    total, divergence, top1 = 0.0, 0.0, []
    vocab_size = model.config.vocab_size
    for inputs, labels in batches:
        inputs = as_ids(inputs, _BATCHES, ndim=(2,), vocab_size=vocab_size)
        labels = as_ids(labels, _BATCHES, ndim=(2,))
        if labels.shape != inputs.shape or labels.max(initial=0) >= vocab_size:
            raise UserError(
                f"{_BATCHES} Received: inputs {inputs.shape}, labels {labels.shape} up to "
                f"{labels.max(initial=0)}, for a vocabulary of {vocab_size} tokens."
            )
        expected = theirs(inputs)
        for rows, logits in forward(inputs):
            rest = () if expected is None else (expected[rows],)
            sums, predictions = _judge(tf.constant(labels[rows], tf.int32), logits, *rest)
            total += float(sums[0])
            divergence += float(sums[-1])
            top1.append(predictions.numpy()[labels[rows] >= 0])
    predictions = np.concatenate([np.empty(0, np.int32), *top1])
    tokens = len(predictions)
    if not tokens:
        raise UserError("There is nothing to evaluate on: there is no batch, or no label counts.")
    kl = None if reference is None else divergence / tokens
    return Quality(total / tokens, tokens, predictions, kl)


def token_logits(model: GPTModel | TFLiteGPT, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """The logits of each batch's inputs, `(batch, time, vocab_size)` float32."""
    forward = _whole_logits_of(model)
    return (forward(inputs) for inputs, _ in batches)


def _logits_of(model: GPTModel | TFLiteGPT) -> Callable[[np.ndarray], Iterator[Piece]]:
    """Ids -> logits: of a whole batch, or of a sequence at a time, as a file reads them."""
    if isinstance(model, TFLiteGPT):
        return lambda inputs: (
            (slice(row, row + 1), model.logits(ids)[None]) for row, ids in enumerate(inputs)
        )
    require_gpt(model)
    predict = tf.function(lambda ids: tf.cast(model(ids, training=False), tf.float32))
    return lambda inputs: iter([(slice(None), predict(tf.constant(inputs, tf.int32)))])


def _whole_logits_of(model: GPTModel | TFLiteGPT) -> Callable[[np.ndarray], np.ndarray]:
    forward = _logits_of(model)
    return lambda inputs: np.concatenate([logits for _, logits in forward(inputs)])


def _reference_logits(reference: Any) -> Callable[[np.ndarray], np.ndarray | None]:
    if reference is None:
        return lambda inputs: None
    if hasattr(reference, "config"):
        return _whole_logits_of(reference)
    known = iter(reference)
    return lambda inputs: next(known)


@tf.function(reduce_retracing=True)
def _judge(
    labels: tf.Tensor, logits: tf.Tensor, reference: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums of the losses and of the divergences, float64 `(2,)`; the likeliest tokens."""
    counts = tf.cast(labels >= 0, tf.float32)
    losses = counts * tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
    sums = [tf.reduce_sum(tf.cast(losses, tf.float64)), tf.zeros((), tf.float64)]
    if reference is not None:
        log_p, log_q = tf.nn.log_softmax(reference), tf.nn.log_softmax(logits)
        kl = counts * tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), -1)  # (batch, time)
        sums[1] = tf.reduce_sum(tf.cast(kl, tf.float64))
    return tf.stack(sums), tf.argmax(logits, -1, output_type=tf.int32)
