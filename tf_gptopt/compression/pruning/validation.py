"""The validation loss that callbacks decide by: one number, the same on all workers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.compression.agreement import agree
from tf_gptopt.compression.calibration_text import check_ids, next_token_pairs
from tf_gptopt.compression.pruning.scores import batches_of, label_loss
from tf_gptopt.models.gpt import GPTModel


class ValidationLoss:
    """Mean cross-entropy of `model` on labels that are read once, in nats.

    Args:
        model: plain or wrapped.
        source: a pair `(inputs, labels)` or batches of such, whose negative labels do not count;
            token ids or batches of them, each labelled with the next; a `TokenDataset` gives its
            "valid" split. Of what may never end, 128 examples are read.
    """

    def __init__(self, model: GPTModel, source: Any) -> None:
        if hasattr(source, "batches"):  # a TokenDataset
            source = source.batches("valid", 128, max_batches=1)
        self.model = model
        context = model.config.max_sequence_length
        inputs, labels = (ids[:, :context] for ids in next_token_pairs(source))
        self.inputs, self.labels = check_ids(model, inputs), _check_labels(model, labels)
        self._loss = tf.function(partial(label_loss, model), autograph=False)

    def __call__(self) -> float:
        total = sum(
            float(self._loss(*(tf.constant(part[0]) for part in parts)))
            for parts in batches_of(self.inputs, self.labels)
        )
        mean = np.float32(total / np.sum(self.labels >= 0))
        return float(agree(self.model.distribute_strategy, [mean])[0])


def _check_labels(model: GPTModel, labels: np.ndarray) -> np.ndarray:
    if labels.size and labels.max() >= model.config.vocab_size:
        raise UserError(
            f"Labels are ids below {model.config.vocab_size}, the model's vocabulary. Received: "
            f"{labels.max()}. Encode the text with the model's own tokenizer."
        )
    if not np.any(labels >= 0):
        raise UserError(
            "There is nothing to validate on: no label counts, because all of them are negative."
        )
    return labels
