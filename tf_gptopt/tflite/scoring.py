"""How likely a model holds given tokens to be."""

from __future__ import annotations

import dataclasses

import numpy as np

from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.program import Program

_AT_ONCE = 128  # tokens, whose logits are 26 MB in GPT-2's vocabulary


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of given tokens.

    Attributes:
        token_ids: `(time,)` int32, the tokens that were scored.
        log_probs: `(time,)` float32, the natural logarithm of each one's probability after those
            before it.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray

    @property
    def total(self) -> float:
        """The natural logarithm of the probability of them all."""
        return float(self.log_probs.sum(dtype=np.float64))


def score_tokens(program: Program, cache: KVCache, before: np.ndarray, ids: np.ndarray) -> Score:
    """Score `ids` `(time,)` after `before` and what is in the cache; the last one is not read.

    Both hold at least one int32 id of the vocabulary and fit the context: callers check.
    """
    log_probs = np.empty(len(ids), np.float32)
    log_probs[:1] = _log_probs(program.read(cache, before)[None], ids[:1])
    for start in range(1, len(ids), _AT_ONCE):
        targets = ids[start : start + _AT_ONCE]
        logits = program.read_all(cache, ids[start - 1 : start - 1 + len(targets)])
        log_probs[start : start + len(targets)] = _log_probs(logits, targets)
    return Score(ids, log_probs)


def _log_probs(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """log softmax(logits) `(time, vocab_size)` of one token in each row."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted[np.arange(len(ids)), ids] - np.log(np.exp(shifted).sum(-1, dtype=np.float64))
