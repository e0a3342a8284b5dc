"""One sequence of tokens over a loaded file, token by token: its cache, and who uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.program import Program
from tf_gptopt.tflite.scoring import Score, score_tokens
from tf_gptopt.tflite.turns import Turns
from tf_gptopt.tflite.vocabulary import Vocabulary


class Session:
    """A KV cache, and what is read into it.

    Args:
        program: the loaded file.
        vocabulary: its tokens.
        cache: what it remembers; default nothing.

    Attributes:
        reused: tokens of the last prompt that were in the cache and not read again.
    """

    def __init__(
        self, program: Program, vocabulary: Vocabulary, cache: KVCache | None = None
    ) -> None:
        self.config = program.config
        self.reused = 0
        self._program, self._vocabulary = program, vocabulary
        self._cache = cache or program.new_cache()
        self._turns = Turns()

    @property
    def length(self) -> int:
        """Tokens in the cache: all that were read last, but not the last one generated."""
        return self._cache.length

    def reset(self) -> None:
        """Forget all tokens; the cache's memory stays."""
        with self._turns.take():
            self._cache.length = 0

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Read tokens after those in the cache; returns the logits after the last one.

        Args:
            ids: `(time,)` integers; any number that the context has room for.

        Returns:
            `(vocab_size,)` float32.

        Raises:
            UserError: when there are none, too many or unknown ones; the cache is as before.
        """
        ids = self._vocabulary.check_ids(ids)
        with self._turns.take():
            before = self.length
            self._check_room(before, len(ids))
            try:
                return self._program.read(self._cache, ids)
            except BaseException:  # Ctrl-C between two pieces of a long text, for one
                self._cache.length = min(before, self.length)
                raise

    def decode(self, token: int) -> np.ndarray:
        """Read one token; returns the logits after it, `(vocab_size,)` float32.

        Raises:
            UserError: when the context is full, or for an id outside the vocabulary.
        """
        return self.prefill([token])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each of `ids`, `(time, vocab_size)` float32, for evaluation.

        The signatures that generate compute them, so this measures what a user of the file gets.
        The tokens in the cache are forgotten.
        """
        ids = self._vocabulary.check_ids(ids)
        self._check_room(0, len(ids))
        with self._turns.take():
            self._cache.length = 0
            try:
                return self._program.read_all(self._cache, ids)
            finally:
                self._cache.length = 0

    def score(self, text: str | Sequence[int], prompt: str | Sequence[int] | None = None) -> Score:
        """How likely the model holds a text to be, token by token.

        Args:
            text: text or token ids.
            prompt: what comes before it, text or ids; its own tokens are not scored. Text is
                encoded for itself, so no token spans the two. What it begins with in common with
                the tokens in the cache, such as the last call's prompt, is not read again.

        Returns:
            The log-probability of each token of `text`, and their sum. Without a prompt, the first
            token has nothing before it: the scores begin with the second. The cache then holds
            both texts, but for the last token.

        Raises:
            UserError: when nothing is left to score, for ids outside the vocabulary, for more
                tokens than the context has room for (the last is not read), and for text without
                a tokenizer.
        """
        as_ids = self._vocabulary.as_ids
        ids = as_ids(text)
        before = ids[:1] if prompt is None else self._vocabulary.as_prompt(prompt)
        ids = ids[1:] if prompt is None else ids
        if not len(ids):
            raise UserError(
                "One token alone has nothing before it to score it by. Give a longer text, or a "
                "prompt (the end-of-text token begins a document)."
            )
        self._check_room(0, len(before) + len(ids) - 1)
        with self._turns.take():
            self.reused = self._cache.rewind(before)
            return score_tokens(self._program, self._cache, before[self.reused :], ids)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given, or the one that belongs to the file.

        Raises:
            UserError: when there is none, or it is not the one that the model was exported with.
        """
        return self._vocabulary.tokenizer

    @property
    def eot_id(self) -> int | None:
        """The token that ends a text, if the model was exported with a tokenizer or has one."""
        return self._vocabulary.eot_id

    @property
    def eot_ids(self) -> tuple[int, ...]:
        """All tokens that end a text; a chat model may have several."""
        return self._vocabulary.eot_ids

    def _check_room(self, used: int, count: int) -> None:
        context = self.config.max_sequence_length
        if used + count > context:
            rest = f", of which {used} are used" if used else ""
            raise UserError(
                f"{count} tokens do not fit: the model's context is {context} tokens{rest}. "
                "Shorten the text, or call reset() to start anew."
            )
