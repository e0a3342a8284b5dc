"""Runs an exported GPT: numpy, ai-edge-litert and tokenizers are all it needs.

```python
gpt = TFLiteGPT("model.tflite")
for piece in gpt.stream("def main(", max_new_tokens=50):
    print(piece, end="", flush=True)
```
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.models.choosing import Chooser, SamplingOptions, make_generators, read_options
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.models.text_stream import TextStream
from tf_gptopt.tflite.litert import load_litert
from tf_gptopt.tflite.metadata import read_metadata
from tf_gptopt.tflite.scoring import Score, score_tokens
from tf_gptopt.tflite.session import Session

_MOST_THREADS = 8  # more wait for each other: a token is a few milliseconds of many small products


class TFLiteGPT:
    """A GPT in a .tflite file, its tokenizer, and one sequence of tokens.

    Args:
        path: a file that `export_tflite` wrote.
        threads: processor threads; default those this process may use, at most 8.
        tokenizer: default the files beside `path`, read when text first comes in or goes out.
        verify: compare the file's checksum (0.1 s per 150 MB).
        weight_cache: a folder for the weights in the order that the processor wants, as large as
            the model; written on the first load. Later loads then take 0.02 s instead of 0.5 s
            (124 M parameters), processes share the memory, and decoding is some 5% faster.
            Default: in memory.

    Attributes:
        config: the model's `GPTConfig`.
        metadata: all that the file says about itself.
        threads: as given or chosen.
        finish_reason: why the last generation ended: `"eot"`, `"stop"` (a stop string), `"length"`
            (`max_new_tokens`) or `"context"` (no room left); None before the first.

    Raises:
        UserError: for a file that is absent, damaged or not ours, and for a tokenizer that does not
            belong to it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        threads: int | None = None,
        tokenizer: Any = None,
        *,
        verify: bool = True,
        weight_cache: str | os.PathLike | None = None,
    ) -> None:
        self.path = Path(path)
        self.metadata = read_metadata(self.path, verify)
        self.config = GPTConfig.from_dict(self.metadata["gpt"])
        self.threads = _choose_threads(threads)
        self.finish_reason: str | None = None
        self._tokenizer = None if tokenizer is None else self._check_tokenizer(tokenizer)
        model = load_litert(self.path, self.threads, self.metadata["sha256"], weight_cache)
        self._session = Session(model, self.metadata)

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
        ids = self._check_ids(prompt)
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
        ids = self._as_ids(prompt)
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
        history = np.empty(len(ids) + count, np.int32)
        history[: len(ids)] = ids
        self.finish_reason = None
        for length in range(len(ids), len(ids) + count):
            token = chooser(self._session.read(ids), history[:length], rng)
            history[length] = token
            if token == self.eot_id:
                self.finish_reason = "eot"
            elif text is not None:
                text.push(token)
                if text.stopped:
                    self.finish_reason = "stop"
            yield token
            if self.finish_reason:
                return
            ids = np.array([token], np.int32)
        self.finish_reason = "length" if count == max_new_tokens else "context"

    # Token by token

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._session.cache.length

    def reset(self) -> None:
        """Forget all tokens; the cache's memory stays."""
        self._session.cache.length = 0

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Read tokens after those in the cache; returns the logits after the last one.

        Args:
            ids: `(time,)` integers; any number that the context has room for.

        Returns:
            `(vocab_size,)` float32.

        Raises:
            UserError: when there are none, too many or unknown ones; the cache is as before.
        """
        ids = self._check_ids(ids)
        self._check_room(len(ids))
        return self._session.read(ids).copy()

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
        ids = self._check_ids(ids)
        self.reset()
        self._check_room(len(ids))
        try:
            return self._session.read_all(ids)
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
        ids = self._as_ids(text)
        before, ids = (ids[:1], ids[1:]) if prompt is None else (self._as_ids(prompt), ids)
        if not len(ids):
            raise UserError(
                "One token alone has nothing before it to score it by. Give a longer text, or a "
                "prompt (the end-of-text token begins a document)."
            )
        self.reset()
        self._check_room(len(before) + len(ids) - 1)
        try:
            return score_tokens(self._session, before, ids)
        finally:
            self.reset()

    # The tokenizer, and what comes in

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given, or the one beside the file.

        Raises:
            UserError: when there is none, or it is not the one that the model was exported with.
        """
        if self._tokenizer is None:
            from tf_gptopt.data.tokenizer import Tokenizer

            if not (self.path.parent / "tokenizer.json").is_file():
                raise UserError(
                    f"There is no tokenizer.json beside {self.path}, and text needs one. Copy it "
                    "there, hand a tokenizer over, or use token ids."
                )
            self._tokenizer = self._check_tokenizer(Tokenizer.load(self.path.parent))
        return self._tokenizer

    @property
    def eot_id(self) -> int | None:
        """The token that ends a text, if the model was exported with a tokenizer or has one."""
        if self._tokenizer is not None:
            return self._tokenizer.eot_id
        return (self.metadata["tokenizer"] or {}).get("eot_id")

    def _check_tokenizer(self, tokenizer: Any) -> Any:
        known = self.metadata["tokenizer"] or {}
        size = getattr(tokenizer, "vocab_size", None)
        mark = getattr(tokenizer, "fingerprint", None)
        if size is not None and size > self.config.vocab_size:
            raise UserError(
                f"The tokenizer knows {size} tokens and {self.path} only {self.config.vocab_size}: "
                "it belongs to another model. Take the tokenizer.json that was exported with it."
            )
        if mark and known.get("fingerprint") and mark != known["fingerprint"]:
            raise UserError(
                f"The tokenizer is not the one that {self.path} was exported with (fingerprint "
                f"{mark[:12]}, expected {known['fingerprint'][:12]}): the text would be nonsense. "
                "Take the tokenizer.json that was exported with it."
            )
        return tokenizer

    def _as_ids(self, text: str | Sequence[int]) -> np.ndarray:
        return self._check_ids(self.tokenizer.encode(text) if isinstance(text, str) else text)

    def _check_ids(self, ids: Any) -> np.ndarray:
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise UserError(
                "A prompt is text or a list of at least one token id. Received: "
                f"{type(ids).__name__} of shape {array.shape}, {array.dtype}."
            )
        vocab_size = self.config.vocab_size
        outside = array[(array < 0) | (array >= vocab_size)]
        if outside.size:
            raise UserError(
                f"Token id {outside[0]} is outside the vocabulary of {vocab_size} tokens. Use the "
                "tokenizer that the model was trained with."
            )
        return array.astype(np.int32)

    def _check_room(self, count: int) -> None:
        context = self.config.max_sequence_length
        if self.length + count > context:
            used = f", of which {self.length} are used" if self.length else ""
            raise UserError(
                f"{count} tokens do not fit: the model's context is {context} tokens{used}. "
                "Shorten the text, or call reset() to start anew."
            )


def _choose_threads(threads: int | None) -> int:
    if threads is None:
        # what this process may use, where the system tells
        can_ask = hasattr(os, "sched_getaffinity")
        return min(len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1, _MOST_THREADS)
    if not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads must be a positive integer. Received: threads={threads!r}.")
    return threads
