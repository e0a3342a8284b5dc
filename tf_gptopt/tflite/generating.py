"""Token after token: what follows a history, over a cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tf_gptopt.models.choosing import Chooser
from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.program import Program


class History:
    """The tokens of a prompt and of what has been generated after it.

    Those that overflow the context leave the model's sight as it fills: each time the first `keep`
    stay, and the latest half of the others. What is visible depends on the tokens alone, not on the
    calls that brought them.

    Args:
        ids: the prompt, `(time,)` int32.
        context: tokens that the model sees at most.
        keep: tokens at the beginning that stay visible, fewer than the context.
    """

    def __init__(self, ids: np.ndarray, context: int, keep: int = 0) -> None:
        self._tokens = ids.copy()
        self._context, self._keep = context, keep
        self.length = self.prompt_length = len(ids)

    @property
    def tokens(self) -> np.ndarray:
        """All of them, `(length,)` int32, a view."""
        return self._tokens[: self.length]

    @property
    def visible(self) -> np.ndarray:
        """Those that the model sees, `(time,)` int32: at most the context."""
        over = self.length - self._context
        if over <= 0:
            return self.tokens
        others = self._context - self._keep
        step = others - others // 2
        start = self._keep + -(-over // step) * step
        return np.concatenate([self._tokens[: self._keep], self._tokens[start : self.length]])

    def append(self, token: int) -> None:
        if self.length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty(self.length + 64, np.int32)])
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

    The cache may hold anything: what it has in common with the visible tokens is not read again.
    """
    while True:
        visible = history.visible
        logits = program.read(cache, visible[cache.rewind(visible) :])
        token = chooser(logits, history.tokens, rng, history.prompt_length)
        history.append(token)
        yield token
