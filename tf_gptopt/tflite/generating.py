"""Token after token: what follows a history, over a cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tf_gptopt.models.choosing import Chooser
from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.program import Program


class History:
    """The tokens of a prompt and of what has been generated after it.

    Args:
        ids: the prompt, `(time,)` int32.
        room: tokens that prompt and completion may have together.
    """

    def __init__(self, ids: np.ndarray, room: int) -> None:
        self._tokens = np.empty(room, np.int32)
        self._tokens[: len(ids)] = ids
        self.length = len(ids)

    @property
    def tokens(self) -> np.ndarray:
        """`(length,)` int32, a view."""
        return self._tokens[: self.length]

    def append(self, token: int) -> None:
        self._tokens[self.length] = token
        self.length += 1


def next_tokens(
    program: Program,
    cache: KVCache,
    history: History,
    chooser: Chooser,
    rng: np.random.Generator,
) -> Iterator[int]:
    """What follows `history`, a token at a time and without end; each is appended to `history`.

    `cache` holds the first tokens of `history`, fewer than all; the rest is read first.
    """
    while True:
        logits = program.read(cache, history.tokens[cache.length :])
        token = chooser(logits, history.tokens, rng)
        history.append(token)
        yield token
