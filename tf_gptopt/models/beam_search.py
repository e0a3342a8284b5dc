"""Beam search: the likeliest continuations go on together, and the best finished one wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tf_gptopt.models.choosing import Chooser
from tf_gptopt.models.decoding import CachedDecoding
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.sampling import BeamSampler, largest, log_softmax


def beam_search(
    model: GPTModel,
    prompts: Sequence[list[int]],
    limits: np.ndarray,
    chooser: Chooser,
    ends: Callable[[list[int], list[int]], bool],
    stops: int,
) -> list[list[int]]:
    """The best completion of each prompt, all prompts and beams in one batch.

    It chooses as `transformers` does with `early_stopping=False`: a search is over when its best
    running beam, at its present length, is no better than the worst of `num_beams` finished ones.

    Args:
        model: any `GPTModel`, plain or wrapped.
        prompts: token ids.
        limits: `(batch,)`, tokens of each prompt and its completion at most.
        chooser: its sampler says the number of beams and how length counts; it adjusts the logits
            before they become log-probabilities.
        ends: whether new tokens, given the prompt's first, are a finished completion.
        stops: how many token ids end one: so many more candidates are looked at, for beams to go on
            with when all the likeliest have ended.
    """
    sampler = chooser.sampler
    width = sampler.num_beams
    searches = [
        _Search(prompt, limit - len(prompt), sampler, ends, width * max(2, 1 + stops))
        for prompt, limit in zip(prompts, limits.tolist(), strict=True)
    ]
    if all(search.done for search in searches):
        return [[] for _ in prompts]
    decoding = CachedDecoding(model)
    logits = decoding.prefill(prompts).repeat(width, 0)
    decoding.take(np.arange(len(prompts)).repeat(width))
    while True:
        parents = np.arange(len(logits))  # whose cache each beam goes on with
        for i, search in enumerate(searches):
            if not search.done:
                beams = slice(i * width, (i + 1) * width)
                known = [search.prompt_length] * width
                log_probs = log_softmax(chooser.adjust(logits[beams], search.sequences, known))
                parents[beams] = i * width + search.advance(log_probs)
        if all(search.done for search in searches):
            return [search.best for search in searches]
        decoding.take(parents)
        sequences = [sequence for search in searches for sequence in search.sequences]
        tokens = np.array([sequence[-1] for sequence in sequences], np.int32)
        logits = decoding.step(tokens, np.array([len(s) for s in sequences], np.int32))


class _Search:
    """One prompt's beams, and its finished completions."""

    def __init__(
        self,
        prompt: list[int],
        room: int,
        sampler: BeamSampler,
        ends: Callable[[list[int], list[int]], bool],
        candidates: int,
    ) -> None:
        self._prompt, self._room, self._ends = prompt, room, ends
        self._width, self._length_penalty = sampler.num_beams, sampler.length_penalty
        self._candidates = candidates
        self._beams: list[list[int]] = [[]] * self._width  # new tokens of each
        # the first alone counts before the first step, for they are all the same
        self._scores = np.array([0.0] + [-np.inf] * (self._width - 1))
        self._finished: list[tuple[float, list[int]]] = []  # the best first
        self.done = room == 0

    @property
    def prompt_length(self) -> int:
        return len(self._prompt)

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and new tokens of each beam."""
        return [self._prompt + beam for beam in self._beams]

    @property
    def best(self) -> list[int]:
        """The new tokens of the best finished completion."""
        return self._finished[0][1] if self._finished else []

    def advance(self, log_probs: np.ndarray) -> np.ndarray:
        """Append a token to every beam.

        Args:
            log_probs: `(num_beams, vocab_size)` of the token after each beam.

        Returns:
            `(num_beams,)`, the beam that each new one goes on from.
        """
        totals = (self._scores[:, None] + log_probs).reshape(1, -1)
        order, totals = largest(totals, self._candidates)
        going_on = []
        for rank, (at, score) in enumerate(zip(order[0].tolist(), totals[0], strict=True)):
            parent, token = divmod(at, log_probs.shape[-1])
            tokens = [*self._beams[parent], token]
            if score == -np.inf:  # forbidden
                break
            if len(tokens) == self._room or self._ends(self._prompt, tokens):
                if rank < self._width:
                    self._finished.append((self._normalize(score, tokens), tokens))
            elif len(going_on) < self._width:
                going_on.append((score, parent, tokens))
        self._finished = sorted(self._finished, key=lambda found: -found[0])[: self._width]
        full = len(self._finished) == self._width
        if not going_on or (
            full and self._normalize(going_on[0][0], going_on[0][2]) <= self._finished[-1][0]
        ):
            self.done = True
            return np.arange(self._width)
        while len(going_on) < self._width:  # copies that nothing comes of
            going_on.append((-np.inf, *going_on[0][1:]))
        self._scores = np.array([score for score, _, _ in going_on])
        self._beams = [tokens for _, _, tokens in going_on]
        return np.array([parent for _, parent, _ in going_on])

    def _normalize(self, score: float, tokens: list[int]) -> float:
        return score / len(tokens) ** self._length_penalty
