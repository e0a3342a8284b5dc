"""Drafters: they guess what a target will say next, for less than it costs to ask it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt.tflite.pacing import Share
from tf_gptopt.tflite.program import Program
from tf_gptopt.tflite.vocabulary import Vocabulary

_HALVINGS = 12  # of a probability, that are told apart
_BELIEF = 0.5  # the chance of a token, before any of that probability was seen


class Drafter(Protocol):
    """Proposes tokens. A target that says others costs time, and changes nothing else."""

    def propose(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """What may follow.

        Args:
            tokens: what the target sees, `(time,)` int32.
            count: at most so many are wanted, at least one.

        Returns:
            Token ids of the target's vocabulary, `(n,)` with n from 0 to `count`.
        """
        ...


class PromptLookup:
    """What followed the last tokens where they came before (prompt lookup, Saxena 2023; Yang et al.
    2023, "LLMA", arXiv:2304.04487). It needs no model, and pays where text repeats itself.

    The longest match is taken, and the latest of those; a match that reaches into its own
    continuation goes on in circles.

    Args:
        shortest: tokens that have to match.
        longest: tokens that are compared.
    """

    def __init__(self, shortest: int = 2, longest: int = 8) -> None:
        self._shortest, self._longest = shortest, longest

    def propose(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """See `Drafter`; some microseconds for a thousand tokens."""
        (ends,) = np.nonzero(tokens[:-1] == tokens[-1])
        size = 1
        while ends.size and size < self._longest:
            at = ends[ends >= size] - size
            longer = at[tokens[at] == tokens[-1 - size]] + size
            if not longer.size:
                break
            ends, size = longer, size + 1
        if not ends.size or size < self._shortest:
            return tokens[:0]
        start = ends[-1] + 1
        return tokens[start + np.arange(count) % (len(tokens) - start)]


class DraftModel:
    """What a smaller model of the same vocabulary says, greedily, while it is likely to be right.

    How sure it is says little by itself: a student of the standard library's source that gave its
    token a probability of 1/32 to 1/16 was right in two cases of three where the target was greedy,
    and in one of ten where that drew at temperature 0.8. So the drafter remembers how often it was
    right when it was so sure, for every halving of the probability.

    Args:
        program: the small model; it has a cache of its own here, whatever else it is used for.
        least: the least chance that a draft is right as a whole, which falls with every token.
    """

    def __init__(self, program: Program, least: float = 0.1) -> None:
        self._program, self._least = program, least
        self._cache = program.new_cache()
        self._chances = [Share(_BELIEF) for _ in range(_HALVINGS)]
        self._last: tuple[int, list[int], list[int]] = 0, [], []

    def propose(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """See `Drafter`."""
        self._learn(tokens)
        context = self._program.config.max_sequence_length
        count = min(count, context + 1 - len(tokens))
        draft: list[int] = []
        doubts: list[int] = []
        self._last = len(tokens), draft, doubts
        if count < 1:
            return np.array(draft, np.int32)
        chance, unread = 1.0, tokens[self._cache.rewind(tokens) :]
        while len(draft) < count:
            logits = self._program.read(self._cache, unread)
            token = int(logits.argmax())
            others = float(np.exp(logits - logits[token]).sum())  # 1 / its probability
            if not np.isfinite(others):
                break
            doubt = min(int(math.log2(max(others, 1.0))), _HALVINGS - 1)
            chance *= self._chances[doubt].value
            if chance < self._least:
                self._chances[doubt].forget(_BELIEF)
                break
            draft.append(token)
            doubts.append(doubt)
            unread = np.array([token], np.int32)
        return np.array(draft, np.int32)

    def _learn(self, tokens: np.ndarray) -> None:
        """Compare the last draft with what followed."""
        start, draft, doubts = self._last
        for token, doubt, said in zip(draft, doubts, tokens[start:].tolist(), strict=False):
            self._chances[doubt].add(token == said)
            if token != said:
                break


def make_drafter(draft: Any, program: Program, vocabulary: Vocabulary) -> Drafter:
    """The drafter that `generate(..., draft=...)` means.

    Args:
        draft: `"lookup"`, a loaded file, the path of one, or a `Drafter`.
        program, vocabulary: the target's.

    Raises:
        UserError: for a model of another vocabulary or tokenizer, and anything else.
    """
    if hasattr(draft, "propose"):
        return draft
    if isinstance(draft, str) and draft == "lookup":
        return PromptLookup()
    if isinstance(draft, (str, os.PathLike)):
        from tf_gptopt.tflite.runtime import TFLiteGPT

        if not Path(draft).is_file():
            raise UserError(
                f"A draft is 'lookup' or a .tflite file, and there is no file {str(draft)!r}."
            )
        draft = TFLiteGPT(draft, threads=program.threads)
    if not hasattr(draft, "new_conversation"):
        raise UserError(
            "draft must be 'lookup', a TFLiteGPT or the path of a .tflite file. Received: "
            f"{type(draft).__name__}."
        )
    draft._vocabulary.check_same(vocabulary)
    return DraftModel(draft._program)
