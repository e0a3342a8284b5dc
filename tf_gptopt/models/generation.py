"""Completing prompts: a prefill over whole prompts, then one token of every sequence a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from tf_gptopt.models.beam_search import beam_search
from tf_gptopt.models.choosing import (
    Chooser,
    SamplingOptions,
    make_generators,
    read_options,
    rows_without_token,
)
from tf_gptopt.models.decoding import CachedDecoding
from tf_gptopt.models.gpt import GPTModel, require_gpt
from tf_gptopt.models.prompts import check_prompts, length_limits, read_inputs, read_stop
from tf_gptopt.models.sampling import BeamSampler
from tf_gptopt.models.text_stream import open_stream, text_after


def generate(
    model: GPTModel,
    inputs: Any,
    max_length: int | None = None,
    *,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    stop: str | int | Sequence[str | int] | None = None,
    stop_at_eot: bool = True,
    **options: Unpack[SamplingOptions],
) -> Any:
    """Complete one prompt or several at once, each with its own length.

    Args:
        model: any `GPTModel`, plain or wrapped.
        inputs: a string or list of strings (the model needs a tokenizer), or token ids: a list, a
            list of lists, or an integer array `(time,)` or `(batch, time)`.
        max_length: tokens of prompt and completion together; default the model's context.
        max_new_tokens: tokens of the completion at most; it ends earlier when the context is full.
        seed: makes random samplers repeatable. Each sequence draws from numbers of its own, which
            its place in the batch decides: no other sequence changes what it says.
        stop: strings or token ids that end a completion.
        stop_at_eot: whether the tokenizer's end-of-text token ends a completion.
        **options: how tokens are chosen, see `models.choosing.SamplingOptions`; default the sampler
            that `compile(sampler=...)` set, or greedy. `sampler="beam"` or `{"name": "beam",
            "num_beams": 4, "length_penalty": 1.0}` searches for the likeliest completion.

    Returns:
        What came in: strings (the prompt and its completion, without the stop string or end-of-text
        token) for strings; for ids the ids of both, the ending token included. In an array
        `(batch, time)` each sequence is filled up with its last token.

    Raises:
        UserError: for an empty prompt, one that is longer than the context, ids that are no
            integers or outside the vocabulary, and impossible lengths or options.
    """
    require_gpt(model)
    tokenizer = model.tokenizer
    prompts, give_back = read_inputs(inputs, tokenizer)
    check_prompts(prompts, model)
    limits = length_limits(prompts, model.config.max_sequence_length, max_length, max_new_tokens)
    stop_ids, stop_strings = read_stop(stop, tokenizer, stop_at_eot)
    chooser = _chooser(model, options, beams=True)

    if isinstance(chooser.sampler, BeamSampler):

        def is_over(prompt: list[int], tokens: list[int]) -> bool:
            if tokens[-1] in stop_ids:
                return True
            said = text_after(tokenizer, prompt, tokens) if stop_strings else ""
            return any(s in said for s in stop_strings)

        completions = beam_search(model, prompts, limits, chooser, is_over, len(stop_ids))
        return give_back(completions, stop_ids, stop_strings)

    streams = [
        open_stream(tokenizer, stop_strings, prompt) if stop_strings else None for prompt in prompts
    ]

    def ends(row: int, token: int) -> bool:
        if streams[row] is not None:
            streams[row].push(token)
            if streams[row].stopped:
                return True
        return token in stop_ids

    completions = [[] for _ in prompts]
    for row, token in _decode(model, prompts, limits, chooser, seed, ends):
        completions[row].append(token)
    return give_back(completions, stop_ids, stop_strings)


def stream(
    model: GPTModel,
    prompt: str,
    max_new_tokens: int | None = None,
    *,
    seed: int | None = None,
    stop: str | int | Sequence[str | int] | None = None,
    **options: Unpack[SamplingOptions],
) -> Iterator[str]:
    """What follows one prompt, in pieces as they become certain; arguments as `generate`, without
    beam search."""
    require_gpt(model)
    prompts, _ = read_inputs(prompt, model.tokenizer)
    check_prompts(prompts, model)
    limits = length_limits(prompts, model.config.max_sequence_length, None, max_new_tokens)
    stop_ids, stop_strings = read_stop(stop, model.tokenizer, stop_at_eot=True)
    text = open_stream(model.tokenizer, stop_strings, prompts[0])
    chooser = _chooser(model, options)
    tokens = _decode(model, prompts, limits, chooser, seed, lambda _, token: token in stop_ids)
    for _, token in tokens:
        if token not in stop_ids and (piece := text.push(token)):
            yield piece
        if text.stopped:
            return
    if rest := text.finish():
        yield rest


def _chooser(model: GPTModel, options: SamplingOptions, beams: bool = False) -> Chooser:
    tokenizer, size = model.tokenizer, model.config.vocab_size
    known = (getattr(tokenizer, name, None) for name in ("vocab_size", "ids_without_token"))
    forbidden = rows_without_token(size, *known)
    return read_options(options, model.sampler, beams=beams, forbidden=forbidden)


def _decode(
    model: GPTModel,
    prompts: list[list[int]],
    limits: np.ndarray,
    chooser: Chooser,
    seed: int | None,
    ends: Callable[[int, int], bool],
) -> Iterator[tuple[int, int]]:
    """Each new token with its row, until `ends(row, token)` or `limits` `(batch,)` of length."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    active = lengths < limits
    if not active.any():
        return
    rngs = make_generators(seed, len(prompts))
    token_ids = np.zeros((len(prompts), limits.max()), np.int32)
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    decoding = CachedDecoding(model)
    logits = decoding.prefill(prompts)
    while True:
        for row in np.flatnonzero(active):
            history = token_ids[row, : lengths[row]]
            token = chooser(logits[row], history, rngs[row], len(prompts[row]))
            token_ids[row, lengths[row]] = token
            lengths[row] += 1
            active[row] = lengths[row] < limits[row] and not ends(int(row), token)
            yield int(row), token
        if not active.any():
            return
        newest = token_ids[np.arange(len(lengths)), lengths - 1]
        logits = decoding.step(newest, lengths)
