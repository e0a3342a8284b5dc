"""The validation loss that callbacks decide by: one number, the same on all workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt.compression.agreement import agree
from tf_gptopt.compression.calibration import calibration_ids, check_ids
from tf_gptopt.compression.pruning.scores import batches_of, next_token_loss
from tf_gptopt.models.gpt import GPTModel


class ValidationLoss:
    """Mean cross-entropy of `model` on tokens that are read once, in nats.

    Args:
        model: plain or wrapped.
        source: token ids or batches; a `TokenDataset` gives its "valid" split. At most 128
            examples are read.
    """

    def __init__(self, model: GPTModel, source: Any) -> None:
        if hasattr(source, "batches"):  # a TokenDataset
            source = source.batches("valid", 128, max_batches=1)
        if isinstance(source, tuple) and len(source) == 2:  # as validation_data: inputs and labels
            source = source[0]
        self.model = model
        self.ids = check_ids(model, calibration_ids(source)[:, : model.config.max_sequence_length])
        self._loss = tf.function(
            lambda ids, weights: next_token_loss(model, ids, weights), autograph=False
        )

    def __call__(self) -> float:
        total = sum(
            float(self._loss(tf.constant(ids[0]), tf.constant(weights[0])))
            for ids, weights in batches_of(self.ids)
        )
        mean = np.float32(total / self.ids[:, 1:].size)
        return float(agree(self.model.distribute_strategy, [mean])[0])
