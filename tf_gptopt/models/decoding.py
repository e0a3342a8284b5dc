"""Several sequences of one model, a token of each a step, with a cache that grows as they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.kv_cache import (
    BlockCache,
    cache_spec,
    cached_forward,
    create_cache,
    grow_cache,
)

_FIRST_CAPACITY = 64


class CachedDecoding:
    """Sequences of any lengths, read a prompt first and then a token a step.

    The step is one `tf.function` per model, traced once for all batch sizes, prompt lengths and
    cache capacities. The cache starts small and doubles, so a token's cost follows its position.
    """

    def __init__(self, model: GPTModel) -> None:
        self._model = model
        self._step = _compiled_step(model)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Begin with prompts; returns the logits after each, `(batch, vocab_size)` float32."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        token_ids = np.zeros((len(lengths), lengths.max()), np.int32)  # padded on the right
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._capacity = self._bucket(lengths.max())
        self._cache = create_cache(self._model, len(lengths), self._capacity)
        return self._read(token_ids, np.zeros_like(lengths), lengths - 1)

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read one token of every sequence; returns the logits after it, `(batch, vocab_size)`.

        Args:
            tokens: `(batch,)` int32, the newest of each sequence.
            lengths: `(batch,)` int32, the tokens of each, the newest included. That of a sequence
                which is over may stay: it computes on in its last place, and nobody looks.
        """
        if lengths.max() > self._capacity:
            self._capacity = self._bucket(lengths.max())
            self._cache = grow_cache(self._cache, self._capacity)
        return self._read(tokens[:, None], lengths - 1, np.zeros_like(lengths))

    def take(self, rows: np.ndarray) -> None:
        """Go on with copies of these sequences, `(new batch,)` int32, in this order."""
        self._cache = [
            BlockCache(tf.gather(block.keys, rows), tf.gather(block.values, rows))
            for block in self._cache
        ]

    def _read(
        self, token_ids: np.ndarray, positions: np.ndarray, logits_at: np.ndarray
    ) -> np.ndarray:
        logits, self._cache = self._step(token_ids, self._cache, positions, logits_at)
        return logits.numpy()

    def _bucket(self, length: int) -> int:
        """The capacity for `length` tokens: few sizes, so that few are ever prepared."""
        capacity = _FIRST_CAPACITY
        while capacity < length:
            capacity *= 2
        return min(capacity, self._model.config.max_sequence_length)


def _compiled_step(model: GPTModel) -> Callable[..., Any]:
    """`cached_forward` of this model as a `tf.function`, kept with the model."""
    step = model.__dict__.get("_cached_step")
    if step is None:
        many = tf.TensorSpec([None], tf.int32)
        signature = [tf.TensorSpec([None, None], tf.int32), cache_spec(model), many, many]

        @tf.function(input_signature=signature)
        def step(token_ids: Any, cache: Any, positions: Any, logits_at: Any) -> Any:
            return cached_forward(model, token_ids, cache, positions, logits_at)

        # past Keras's attribute tracking, which would save the function with the model
        model.__dict__["_cached_step"] = step
    return step
