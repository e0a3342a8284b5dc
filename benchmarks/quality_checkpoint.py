"""A trained checkpoint of somebody else's in the laboratory of benchmarks/quality.py.

Its training text is not at hand, so the model writes its own: sequences sampled from it, of which
some calibrate and others score. What is not trained from the checkpoint, on text, is left out.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.quality_lab import Lab
from tf_gptopt._keras import keras
from tf_gptopt._tokenizer import Tokenizer
from tf_gptopt.models.checkpoints import load_checkpoint
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.training.loss import NextTokenLoss
from tf_gptopt.training.optimizer import adamw

BEGIN, END = 13, 14  # tokens around each of the checkpoint's sequences
LENGTH = 32  # tokens of a window: most of the sequences are longer
TUNED_ON = 4096  # sequences
BATCH = 256  # of them, where nothing is trained


class CheckpointLab(Lab):
    """As `Lab`; `texts` is the checkpoint's folder."""

    groups = ("parent", "one-shot", "quantized", "quantized, tuned")

    @property
    def parent(self) -> GPTModel:
        return load_checkpoint(self.texts)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.parent.tokenizer

    @cached_property
    def sequences(self) -> np.ndarray:
        """Sampled by the model, `(sequences, LENGTH + 1)` int32: the beginnings of long ones."""
        path = self.folder / "sequences.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, self._sample(TUNED_ON + self.scale.calibration + self._scored))
        return np.load(path)

    def _sample(self, count: int) -> np.ndarray:
        self.say(f"{count:,} sequences")
        model, found = self.parent, []
        forward = tf.function(lambda ids: model(ids, training=False))
        tf.random.set_seed(self.scale.seed)
        while sum(map(len, found)) < count:
            ids = np.full((1024, LENGTH + 1), END, np.int32)
            ids[:, 0] = BEGIN
            for place in range(LENGTH):
                logits = forward(tf.constant(ids[:, :LENGTH]))[:, place]
                ids[:, place + 1] = tf.random.categorical(logits, 1)[:, 0]
            found.append(ids[(ids[:, 1:-1] != END).all(1)])
        return np.concatenate(found)[:count]

    @property
    def _scored(self) -> int:
        return self.scale.scored // LENGTH

    @cached_property
    def calibration(self) -> np.ndarray:
        return self.sequences[-self.scale.calibration :, :-1]

    @property
    def _training(self) -> np.ndarray:
        return self.sequences[self._scored :][:TUNED_ON]

    def sample(self) -> Any:
        return _batches(self._training[: 2 * BATCH])

    def scored(self) -> Any:
        return _batches(self.sequences[: self._scored])

    def fit(self, model: keras.Model, steps: int, learning_rate: float, *args: Any, **kw: Any):
        """Plain Keras: a checkpoint of half a million parameters trains in seconds."""
        ids = self._training
        data = tf.data.Dataset.from_tensor_slices((ids[:, :-1], ids[:, 1:]))
        data = data.shuffle(TUNED_ON, seed=self.scale.seed).repeat()
        model.compile(adamw(steps, learning_rate), loss=NextTokenLoss())
        return model.fit(data.batch(64), steps_per_epoch=steps, epochs=1, verbose=0).history

    def sizes(self) -> dict[str, int]:
        return {"valid_tokens": self._scored * LENGTH}

    def compare(self) -> None:
        """There is no text to train a model of PyTorch's on."""


def _batches(sequences: np.ndarray) -> Any:
    """`(inputs, labels)` of `BATCH` sequences each."""
    parts = np.split(sequences, range(BATCH, len(sequences), BATCH))
    return ((ids[:, :-1], ids[:, 1:]) for ids in parts)
