"""Text after text over a loaded file: generate and stream, over the cache of a session."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.models.choosing import Chooser, SamplingOptions, make_generators, read_options
from tf_gptopt.models.text_stream import TextStream, as_stop_strings, open_stream
from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.drafting import make_drafter
from tf_gptopt.tflite.generating import History, next_tokens
from tf_gptopt.tflite.limits import Limits
from tf_gptopt.tflite.program import Program
from tf_gptopt.tflite.session import Session
from tf_gptopt.tflite.speculative import DraftStats, Speculation, speculated_tokens
from tf_gptopt.tflite.vocabulary import Vocabulary, is_batch

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a call of `generate` or `stream` asks for, beside prompt and seed."""

    limits: Limits
    stops: tuple[str, ...]
    chooser: Chooser
    speculation: Speculation | None


class Conversation(Session):
    """A KV cache and what goes on in it. Several share one loaded file: its weights are there once.

    `TFLiteGPT` is one; `new_conversation` and `fork` make others. Each thread may have its own. One
    that two threads use at once says so, and so does a stream that goes on after its conversation
    was used for something else.

    The cache remembers what was read last, and a prompt that begins in the same way is not read
    again up to there: the turns of a chat, a shared instruction. What comes out is the same up to
    rounding, since other signatures read the rest; `reset()` before each call makes it the same to
    the bit.

    Args:
        program: the loaded file.
        vocabulary: its tokens.
        cache: what it remembers; default nothing.

    Attributes:
        finish_reason: why the last generation ended: `"eot"`, `"stop"` (a stop string), `"length"`
            (`max_new_tokens`) or `"context"` (no room left); a list of these for several prompts;
            None before the first, and while one goes on.
        reused: tokens of the last prompt that were in the cache and not read again.
        draft_stats: how drafting did in the last generation (`DraftStats`); None without a draft.
    """

    def __init__(
        self, program: Program, vocabulary: Vocabulary, cache: KVCache | None = None
    ) -> None:
        super().__init__(program, vocabulary, cache)
        self.finish_reason: str | list[str] | None = None
        self.draft_stats: DraftStats | None = None
        self._draft: Any = None
        self._speculation: Speculation | None = None  # with that draft

    def new_conversation(self) -> Conversation:
        """Another sequence of tokens over the same weights: a KV cache is all it takes."""
        return Conversation(self._program, self._vocabulary)

    def fork(self) -> Conversation:
        """Another conversation that holds the same tokens: a prompt read once, then many ways on.

        Raises:
            UserError: while another thread uses this one.
        """
        with self._turns.take(self._turns.current):
            return Conversation(self._program, self._vocabulary, self._cache.copy())

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        overflow: str = "stop",
        keep: int = 0,
        draft: Any = None,
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Complete a prompt or several: text for text, token ids for token ids, prompt included.

        Args:
            prompt: text or token ids, at least one token; or a list of such prompts, done one after
                the other. What they begin with in common is read once.
            max_new_tokens: default as many as the context has room for.
            seed: makes the draws repeatable. Each of several prompts draws from numbers of its own,
                which its place in the list decides.
            stop: strings that end the text.
            overflow: what happens when the context is full. `"stop"` ends the text; a prompt longer
                than the context is an error. `"slide"` goes on without the older half: the first
                `keep` tokens and the latest half of the others are read again, since learned
                positions cannot be shifted. A longer prompt is taken as if it had come token by
                token. Penalties look at as many last tokens as the
                context has, or `penalty_window`.
            keep: tokens at the beginning that `"slide"` never forgets, such as an instruction.
            draft: what guesses tokens ahead, for the model to check several at once: a small file
                of the same tokenizer, loaded or its path, or `"lookup"` for what followed the last
                tokens where they came before. What comes out is the same up to rounding, sooner
                where the guesses are good; see `tflite.speculative`.
            **options: how tokens are chosen, see `models.choosing.SamplingOptions`: `temperature`,
                `top_k`, `top_p`, `min_p`, `repetition_penalty`, `logit_bias` and others; default
                greedy.

        Returns:
            Text, without the end-of-text token or stop string; or ids, the ending token included.
            A list of these for a list of prompts.

        Raises:
            UserError: for an empty or overlong prompt, ids outside the vocabulary, impossible
                numbers, unknown options, text or stop strings without a tokenizer, and `"slide"`
                with nothing that ends the text.
        """
        request = self._request(max_new_tokens, stop, overflow, keep, draft, options)
        if request.limits.are_none and not request.stops:
            raise UserError(
                'With overflow="slide" a text may go on for ever. Give max_new_tokens or a stop '
                "string, or take it piece by piece with stream()."
            )
        several = is_batch(prompt)
        prompts = list(prompt) if several else [prompt]
        if not prompts:
            raise UserError("There are no prompts. Hand over at least one.")
        names = [f"Prompt {i}: " if several else "" for i in range(len(prompts))]
        batch = [self._read(*pair, request) for pair in zip(names, prompts, strict=True)]
        completions, reasons = [], []
        for item, ids, rng in zip(prompts, batch, make_generators(seed, len(batch)), strict=True):
            completions.append(self._complete(item, ids, request, rng))
            reasons.append(self.finish_reason)
        if not several:
            return completions[0]
        self.finish_reason = reasons
        return completions

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        overflow: str = "stop",
        keep: int = 0,
        draft: Any = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """What follows one prompt, in pieces of text as they are certain; arguments as `generate`.

        A piece never ends inside a character. `finish_reason` says afterwards why it ended. With
        `overflow="slide"` and no limit it goes on for as long as pieces are taken.

        A stream may be left at any piece: the conversation is free. Once it was used otherwise,
        the stream cannot go on.

        Raises:
            UserError: as `generate`, at the first piece; and at a later one, when the conversation
                was used for something else in between.
        """
        request = self._request(max_new_tokens, stop, overflow, keep, draft, options)
        (rng,) = make_generators(seed, 1)
        yield from self._pieces(self._read("", prompt, request), request, rng)

    def _request(
        self,
        max_new_tokens: int | None,
        stop: str | Sequence[str] | None,
        overflow: str,
        keep: int,
        draft: Any,
        options: Mapping[str, Any],
    ) -> _Request:
        limits = Limits(self.config.max_sequence_length, max_new_tokens, overflow, keep)
        chooser = read_options(
            options,
            window=self.config.max_sequence_length,  # what the model no longer sees does not count
            forbidden=self._vocabulary.ids_without_token,
        )
        stops = as_stop_strings(stop)
        return _Request(limits, stops, chooser, self._speculate(draft))

    def _speculate(self, draft: Any) -> Speculation | None:
        """What goes on drafting where the last generation ended, if `draft` is the same."""
        if draft is None:
            return None
        if self._draft is not draft and self._draft != draft:
            drafter = make_drafter(draft, self._program, self._vocabulary)
            self._draft, self._speculation = draft, Speculation(self._program, drafter)
        self._speculation.stats = DraftStats()
        return self._speculation

    def _read(self, name: str, prompt: Any, request: _Request) -> np.ndarray:
        """A prompt's ids; `name` begins the error that says what is wrong with it."""
        try:
            ids = self._vocabulary.as_prompt(prompt)
            request.limits.check_prompt(len(ids))
        except UserError as error:
            raise UserError(f"{name}{error}") from None
        return ids

    def _complete(
        self, prompt: Prompt, ids: np.ndarray, request: _Request, rng: np.random.Generator
    ) -> str | list[int]:
        if isinstance(prompt, str):
            return prompt + "".join(self._pieces(ids, request, rng))
        text = open_stream(self.tokenizer, request.stops, ids) if request.stops else None
        return ids.tolist() + list(self._generate(ids, request, rng, text))

    def _pieces(
        self, ids: np.ndarray, request: _Request, rng: np.random.Generator
    ) -> Iterator[str]:
        text = open_stream(self.tokenizer, request.stops, ids)
        for token in self._generate(ids, request, rng, text):
            if text.piece and token not in self.eot_ids:
                yield text.piece
        if rest := text.finish():
            yield rest

    def _generate(
        self,
        ids: np.ndarray,
        request: _Request,
        rng: np.random.Generator,
        text: TextStream | None,
    ) -> Iterator[int]:
        """New tokens, the ending one included; `text` sees each that is text."""
        limits = request.limits
        history = History(ids, limits.context, limits.keep)
        self.finish_reason, self.draft_stats = None, None
        with self._turns.take() as turn:
            self.reused = self._cache.rewind(history.visible)
        source = self._program, self._cache, history, request.chooser, rng
        speculation = request.speculation
        tokens = speculated_tokens(*source, speculation) if speculation else next_tokens(*source)
        room, ends = limits.room(len(ids)), self.eot_ids
        for _ in itertools.count() if room is None else range(room):
            with self._turns.take(turn):
                token = next(tokens)
            self.draft_stats = speculation and speculation.stats
            reason = None
            if token in ends:
                reason = "eot"
            elif text is not None:
                text.push(token)
                if text.stopped:
                    reason = "stop"
            yield token
            if reason:
                self.finish_reason = reason
                return
        self.finish_reason = "length" if room == limits.max_new_tokens else "context"
