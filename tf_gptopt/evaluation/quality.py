"""What a model predicts: loss and perplexity on held-out tokens, and whom it agrees with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.models.gpt import GPTModel, require_gpt
from tf_gptopt.tflite.runtime import TFLiteGPT

Batch = tuple[np.ndarray, np.ndarray]  # inputs and labels, both (batch, time) int32
Score = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text.

    Args:
        loss: mean cross-entropy, nats per token.
        tokens: how many tokens were predicted.
        top1: the most likely next token at every position, in order, int32 `(tokens,)`.
    """

    loss: float
    tokens: int
    top1: np.ndarray

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


def measure_quality(model: GPTModel | TFLiteGPT, batches: Iterable[Batch]) -> Quality:
    """Score a Keras model or a .tflite file on batches of `(inputs, labels)`, (batch, time) int32.

    The loss is computed from float32 logits.
    """
    score = _tflite_score(model) if isinstance(model, TFLiteGPT) else _keras_score(model)
    total, tokens, top1 = 0.0, 0, []
    for inputs, labels in batches:
        losses, predictions = score(np.asarray(inputs), np.asarray(labels))
        total += float(np.sum(losses, dtype=np.float64))
        tokens += losses.size
        top1.append(predictions.ravel().astype(np.int32))
    if not tokens:
        raise UserError("There is nothing to evaluate on: the validation split gave no batch.")
    return Quality(total / tokens, tokens, np.concatenate(top1))


def token_kl(
    model: GPTModel | TFLiteGPT, reference: GPTModel | TFLiteGPT, batches: Iterable[Batch]
) -> float:
    """Mean KL(reference || model) of the next token's distribution, in nats, over all positions."""
    ours, theirs = _logits_of(model), _logits_of(reference)
    total, tokens = 0.0, 0
    for inputs, _ in batches:
        kl = _kl(theirs(np.asarray(inputs)), ours(np.asarray(inputs))).numpy()
        total += float(np.sum(kl, dtype=np.float64))
        tokens += kl.size
    if not tokens:
        raise UserError("There is nothing to evaluate on: the validation split gave no batch.")
    return total / tokens


def _logits_of(model: GPTModel | TFLiteGPT) -> Callable[[np.ndarray], Any]:
    """Ids -> logits, both of a batch."""
    if isinstance(model, TFLiteGPT):
        return lambda inputs: np.stack([model.logits(ids) for ids in inputs])
    forward = tf.function(lambda ids: require_gpt(model)(ids, training=False))
    return lambda inputs: forward(tf.constant(inputs, tf.int32))


@tf.function(reduce_retracing=True)
def _kl(reference: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    log_p = tf.nn.log_softmax(tf.cast(reference, tf.float32))
    log_q = tf.nn.log_softmax(tf.cast(logits, tf.float32))
    return tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), -1)  # (batch, time)


def _keras_score(model: Any) -> Score:
    require_gpt(model)

    @tf.function(reduce_retracing=True)
    def step(inputs: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        logits = tf.cast(model(inputs, training=False), tf.float32)  # (batch, time, vocab)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return losses, tf.argmax(logits, -1, output_type=tf.int32)

    def score(inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        losses, top1 = step(tf.constant(inputs, tf.int32), tf.constant(labels, tf.int32))
        return losses.numpy(), top1.numpy()

    return score


def _tflite_score(runtime: TFLiteGPT) -> Score:
    def score(inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        losses = np.empty(labels.shape, np.float32)
        top1 = np.empty(labels.shape, np.int32)
        for row, (ids, targets) in enumerate(zip(inputs, labels, strict=True)):
            logits = runtime.logits(ids)  # (time, vocab)
            peak = logits.max(-1, keepdims=True)
            log_sum = np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]
            losses[row] = log_sum - np.take_along_axis(logits, targets[:, None], 1)[:, 0]
            top1[row] = logits.argmax(-1)
        return losses, top1

    return score
