"""One sequence of tokens over a loaded file: text and tokens in, text and tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.models.choosing import Chooser, SamplingOptions, make_generators, read_options
from tf_gptopt.models.text_stream import TextStream
from tf_gptopt.tflite.generating import History, next_tokens
from tf_gptopt.tflite.program import Program
from tf_gptopt.tflite.scoring import Score, score_tokens
from tf_gptopt.tflite.vocabulary import Vocabulary


class Conversation:
    """A KV cache and what goes on in it. Several share one loaded file: its weights are there once.

    `TFLiteGPT` is one, and `TFLiteGPT.new_conversation` makes others.

    Args:
        program: the loaded file.
        vocabulary: its tokens.

    Attributes:
        finish_reason: why the last generation ended: `"eot"`, `"stop"` (a stop string), `"length"`
            (`max_new_tokens`) or `"context"` (no room left); None before the first.
    """

    def __init__(self, program: Program, vocabulary: Vocabulary) -> None:
        self.config = program.config
        self.finish_reason: str | None = None
        self._program, self._vocabulary = program, vocabulary
        self._cache = program.new_cache()

    # Text

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = None,
        *,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> str | list[int]:
        """Complete a prompt: text for text, token ids for token ids, the prompt included.

        Args:
            prompt: text or token ids, at least one token and at most the context.
            max_new_tokens: default as many as the context has room for.
            seed: makes the draws repeatable.
            stop: strings that end the text.
            **options: how tokens are chosen, see `models.choosing.SamplingOptions`: `temperature`,
                `top_k`, `top_p`, `min_p`, `repetition_penalty`, `logit_bias` and others; default
                greedy.

        Returns:
            Text, without the end-of-text token or stop string; or ids, the ending token included.

        Raises:
            UserError: for an empty or overlong prompt, ids outside the vocabulary, impossible
                numbers, unknown options, and text or stop strings without a tokenizer.
        """
        if isinstance(prompt, str):
            pieces = self.stream(prompt, max_new_tokens, seed=seed, stop=stop, **options)
            return prompt + "".join(pieces)
        chooser = read_options(options)
        ids = self._vocabulary.check_ids(prompt)
        text = TextStream(self.tokenizer.decode, stop) if stop else None
        return ids.tolist() + list(self._generate(ids, max_new_tokens, chooser, seed, text))

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = None,
        *,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """What follows the prompt, in pieces of text as they are certain; arguments as `generate`.

        A piece never ends inside a character. `finish_reason` says afterwards why it ended.
        """
        chooser = read_options(options)
        ids = self._vocabulary.as_ids(prompt)
        text = TextStream(self.tokenizer.decode, stop)
        for _ in self._generate(ids, max_new_tokens, chooser, seed, text):
            if text.piece:
                yield text.piece
        if rest := text.finish():
            yield rest

    def _generate(
        self,
        ids: np.ndarray,
        max_new_tokens: int | None,
        chooser: Chooser,
        seed: int | None,
        text: TextStream | None,
    ) -> Iterator[int]:
        """New tokens, the ending one included; `text` sees each that is text."""
        if max_new_tokens is not None and max_new_tokens < 0:
            raise UserError(f"max_new_tokens must not be negative. Received: {max_new_tokens}.")
        self.reset()
        self._check_room(len(ids))
        room = self.config.max_sequence_length - len(ids)
        count = room if max_new_tokens is None else min(max_new_tokens, room)
        (rng,) = make_generators(seed, 1)
        history = History(ids, len(ids) + count)
        self.finish_reason = None
        tokens = next_tokens(self._program, self._cache, history, chooser, rng)
        for _, token in zip(range(count), tokens, strict=False):
            if token == self.eot_id:
                self.finish_reason = "eot"
            elif text is not None:
                text.push(token)
                if text.stopped:
                    self.finish_reason = "stop"
            yield token
            if self.finish_reason:
                return
        self.finish_reason = "length" if count == max_new_tokens else "context"

    # Token by token

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache.length

    def reset(self) -> None:
        """Forget all tokens; the cache's memory stays."""
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
        self._check_room(len(ids))
        return self._program.read(self._cache, ids)

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
        self.reset()
        self._check_room(len(ids))
        try:
            return self._program.read_all(self._cache, ids)
        finally:
            self.reset()

    def score(self, text: str | Sequence[int], prompt: str | Sequence[int] | None = None) -> Score:
        """How likely the model holds a text to be, token by token.

        Args:
            text: text or token ids.
            prompt: what comes before it, text or ids; its own tokens are not scored. Text is
                encoded for itself, so no token spans the two.

        Returns:
            The log-probability of each token of `text`, and their sum. Without a prompt, the first
            token has nothing before it: the scores begin with the second. The tokens in the cache
            are forgotten.

        Raises:
            UserError: when nothing is left to score, for ids outside the vocabulary, for more
                tokens than the context has room for (the last is not read), and for text without
                a tokenizer.
        """
        as_ids = self._vocabulary.as_ids
        ids = as_ids(text)
        before, ids = (ids[:1], ids[1:]) if prompt is None else (as_ids(prompt), ids)
        if not len(ids):
            raise UserError(
                "One token alone has nothing before it to score it by. Give a longer text, or a "
                "prompt (the end-of-text token begins a document)."
            )
        self.reset()
        self._check_room(len(before) + len(ids) - 1)
        try:
            return score_tokens(self._program, self._cache, before, ids)
        finally:
            self.reset()

    # The tokenizer, and what comes in

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

    def _check_room(self, count: int) -> None:
        context = self.config.max_sequence_length
        if self.length + count > context:
            used = f", of which {self.length} are used" if self.length else ""
            raise UserError(
                f"{count} tokens do not fit: the model's context is {context} tokens{used}. "
                "Shorten the text, or call reset() to start anew."
            )
