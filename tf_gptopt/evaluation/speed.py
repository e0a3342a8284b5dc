"""How fast a .tflite file reads a prompt (prefill) and writes (decode), in tokens per second."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_gptopt.tflite.runtime import TFLiteGPT
from tf_gptopt.tflite.speculative import DraftStats


@dataclasses.dataclass(frozen=True)
class Speed:
    """Medians over the measured tokens.

    Args:
        decode: tokens per second, one at a time, greedy, right after the prompt.
        prefill: tokens per second of reading the prompt.
        prompt_tokens: length of that prompt.
        threads: processor threads used; None means the runtime's default.
    """

    decode: float
    prefill: float
    prompt_tokens: int
    threads: int | None


@dataclasses.dataclass(frozen=True)
class DraftSpeed:
    """Speculative decoding beside plain decoding of the same file: greedy, on the same prompts.

    Args:
        name: the file that is drafted for.
        draft: the file that drafts.
        plain, speculative: tokens per second, over all prompts.
        ratio: median over the prompts of speculative by plain.
        acceptance_rate: accepted tokens by proposed ones.
        tokens_per_call: of the file; plain decoding has 1.
    """

    name: str
    draft: str
    plain: float
    speculative: float
    ratio: float
    acceptance_rate: float
    tokens_per_call: float

    def in_words(self) -> str:
        """A line for the report."""
        return (
            f"With {self.draft} as its draft, {self.name} decodes {self.ratio:.2f}x as fast on "
            f"held-out text: {self.speculative:,.0f} tokens/s against {self.plain:,.0f}, "
            f"{self.acceptance_rate:.0%} of the guesses accepted, {self.tokens_per_call:.1f} "
            "tokens a call."
        )


def measure_draft(
    runtime: TFLiteGPT,
    draft: Any,
    prompts: Sequence[np.ndarray],
    tokens: int = 96,
    name: str = "model",
    **options: Any,
) -> DraftSpeed:
    """Let `runtime` complete each prompt plainly and with `draft`, in turn.

    Args:
        draft: see `Conversation.generate`.
        prompts: `(time,)` ids each; the first warms up as well.
        tokens: generated after each, at most as many as the context has room for.
        name: what the runtime is called.
        **options: of `generate`; greedy without any.
    """
    plain, drafted = runtime.new_conversation(), runtime.new_conversation()
    seconds, counts = np.zeros((len(prompts) + 1, 2)), np.zeros((len(prompts) + 1, 2))
    stats = DraftStats()
    for i, prompt in enumerate([prompts[0], *prompts]):
        calls = [(0, plain, None), (1, drafted, draft)]
        for column, conversation, guess in calls[:: 1 if i % 2 else -1]:
            conversation.reset()
            conversation.prefill(prompt)  # reading the prompt is not part of the time
            start = time.perf_counter()
            ids = conversation.generate(prompt.tolist(), tokens, draft=guess, **options)
            seconds[i, column] = time.perf_counter() - start
            counts[i, column] = len(ids) - len(prompt)
        if i:
            stats += drafted.draft_stats
    seconds, counts = seconds[1:], counts[1:]
    rates = counts.sum(0) / seconds.sum(0)
    each = counts / seconds
    return DraftSpeed(
        name=name,
        draft=Path(draft).name if isinstance(draft, (str, Path)) else type(draft).__name__,
        plain=float(rates[0]),
        speculative=float(rates[1]),
        ratio=float(np.median(each[:, 1] / each[:, 0])),
        acceptance_rate=stats.acceptance_rate,
        tokens_per_call=stats.tokens_per_call,
    )


def measure_speed(
    runtime: TFLiteGPT, prompt_tokens: int = 32, tokens: int = 64, repeats: int = 5
) -> Speed:
    """Time `repeats` prompts of random tokens and `tokens` decode steps in all.

    Medians, because a shared machine interrupts; the first prompt and steps warm up, uncounted.
    """
    context = runtime.config.max_sequence_length
    prompt_tokens = max(1, min(prompt_tokens, context // 2))
    steps = max(1, min(tokens, context - prompt_tokens) // repeats)
    prompt = np.random.default_rng(0).integers(0, runtime.config.vocab_size, prompt_tokens)
    prefill, decode = [], []
    for repeat in range(repeats + 1):
        runtime.reset()
        start = time.perf_counter()
        logits = runtime.prefill(prompt)
        elapsed = time.perf_counter() - start
        if repeat:
            prefill.append(elapsed)
        for _ in range(steps):
            token = int(logits.argmax())
            start = time.perf_counter()
            logits = runtime.decode(token)
            elapsed = time.perf_counter() - start
            if repeat:
                decode.append(elapsed)
    runtime.reset()
    return Speed(
        decode=1.0 / statistics.median(decode),
        prefill=prompt_tokens / statistics.median(prefill),
        prompt_tokens=prompt_tokens,
        threads=runtime.threads,
    )
