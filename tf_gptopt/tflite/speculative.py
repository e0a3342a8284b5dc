"""Speculative decoding: a cheap drafter guesses what follows, and the target checks it at once.

A token costs the time in which all weights are read from memory, and five tokens read together
cost little more than one. So the target reads a draft in one call, and its logits say after each
token whether that was right (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318).

Those papers draw the draft from the drafter's distribution, and accept or replace a token so that
the target's distribution comes out. Here a draft is one fixed guess x, and the target chooses its
token as it always does: penalties, sampler, the conversation's own random numbers. If it chooses x,
which it does with probability p(x), the draft goes on; if not, its token is a draw from the rest.
For a fixed guess that is their rule, and more: the same numbers are drawn in the same order as in
plain decoding, so the same seed gives the same text, greedy or sampled, whatever is drafted.

"The same" is meant up to rounding: a verify sums in another order than a decode does, as a prefill
does, and where two tokens are as good as equal the other one may come out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from tf_gptopt.models.choosing import Chooser
from tf_gptopt.tflite.cache import KVCache
from tf_gptopt.tflite.drafting import Drafter
from tf_gptopt.tflite.generating import History
from tf_gptopt.tflite.pacing import Pace
from tf_gptopt.tflite.program import Program


@dataclasses.dataclass
class DraftStats:
    """What drafting came to in a generation. It counts on while that goes on.

    Args:
        proposed: tokens that the drafter proposed.
        accepted: how many of them the target said as well.
        calls: of the target, after the prompt.
        tokens: that these calls gave.
    """

    proposed: int = 0
    accepted: int = 0
    calls: int = 0
    tokens: int = 0

    def __add__(self, other: DraftStats) -> DraftStats:
        return DraftStats(
            self.proposed + other.proposed,
            self.accepted + other.accepted,
            self.calls + other.calls,
            self.tokens + other.tokens,
        )

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens by proposed ones; 0 where none was proposed."""
        return self.accepted / max(1, self.proposed)

    @property
    def tokens_per_call(self) -> float:
        """What plain decoding has 1 of."""
        return self.tokens / max(1, self.calls)


class Speculation:
    """A drafter for a target, and what is known of how well it does: it outlives a generation.

    Args:
        program: the target.
        drafter: what proposes tokens.

    Attributes:
        stats: since they were last set back.
    """

    def __init__(self, program: Program, drafter: Drafter) -> None:
        self.drafter = drafter
        self.pace = Pace(program.verify_lengths)
        self.stats = DraftStats()


def speculated_tokens(
    program: Program,
    cache: KVCache,
    history: History,
    chooser: Chooser,
    rng: np.random.Generator,
    speculation: Speculation,
) -> Iterator[int]:
    """The tokens of `generating.next_tokens`, sooner.

    Between two tokens `cache` holds what it would hold there too: all visible tokens but the last.
    """
    pace = speculation.pace
    while True:
        visible = history.visible
        unread = visible[cache.rewind(visible) :]
        draft = _draft(visible, program, speculation) if len(unread) == 1 else unread[:0]
        began = time.perf_counter()
        if len(draft):
            logits = program.verify(cache, np.concatenate([unread, draft]))
        else:
            logits = program.read(cache, unread)[None]
        seconds = time.perf_counter() - began
        if len(unread) == 1:  # else it was a prompt
            speculation.stats.proposed += len(draft)
            speculation.stats.calls += 1
            if not len(draft):
                pace.saw_decode(seconds)
        for said, row in enumerate(logits):
            token = chooser(row, history.tokens, rng, history.prompt_length)
            goes_on = said < len(draft) and token == draft[said]
            if len(unread) == 1:
                speculation.stats.accepted += int(goes_on)
                speculation.stats.tokens += 1
            if len(draft) and not goes_on:
                pace.saw_verify(len(draft), said, seconds)
            history.append(token)
            # hides the rest of the draft in case that the caller stops here, or shows what is right
            cache.length = len(visible) + said
            yield token
            if not goes_on:
                break


def _draft(visible: np.ndarray, program: Program, speculation: Speculation) -> np.ndarray:
    """Tokens that may follow: as many as pay, and as the context has room for."""
    count = min(speculation.pace.choose(), program.config.max_sequence_length - len(visible))
    if not count:
        return visible[:0]
    began = time.perf_counter()
    draft = speculation.drafter.propose(visible, count)[:count]
    speculation.pace.saw_draft(len(draft), time.perf_counter() - began)
    return draft
