"""How fast a .tflite file reads a prompt (prefill) and writes (decode), in tokens per second."""

from __future__ import annotations

import dataclasses
import statistics
import time

import numpy as np

from tf_gptopt.tflite.runtime import TFLiteGPT


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
