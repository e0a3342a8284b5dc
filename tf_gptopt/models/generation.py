"""Completing prompts: a prefill over whole prompts, then one token of every sequence a step.

The step is one `tf.function` per model, traced once for all batch sizes, prompt lengths and cache
capacities. The cache starts small and doubles, so a token's cost follows its position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gptopt._errors import UserError
from tf_gptopt.models.gpt import GPTModel, require_gpt
from tf_gptopt.models.kv_cache import cache_spec, cached_forward, create_cache, grow_cache
from tf_gptopt.models.sampling import Sampler, TextStream, get_sampler

_FIRST_CAPACITY = 64


def generate(
    model: GPTModel,
    inputs: Any,
    max_length: int | None = None,
    *,
    max_new_tokens: int | None = None,
    sampler: Any = None,
    seed: int | None = None,
    stop: str | int | Sequence[str | int] | None = None,
    stop_at_eot: bool = True,
) -> Any:
    """Complete one prompt or several at once, each with its own length.

    Args:
        model: any `GPTModel`, plain or wrapped.
        inputs: a string or list of strings (the model needs a tokenizer), or token ids: a list, a
            list of lists, or an integer array `(time,)` or `(batch, time)`.
        max_length: tokens of prompt and completion together; default the model's context.
        max_new_tokens: tokens of the completion at most; it ends earlier when the context is full.
        sampler: a name (`"greedy"`, `"random"`, `"top_k"`, `"top_p"`), a dictionary such as
            `{"name": "top_k", "k": 40}` or an object; default what `compile(sampler=...)` set, or
            greedy.
        seed: makes random samplers repeatable.
        stop: strings or token ids that end a completion.
        stop_at_eot: whether the tokenizer's end-of-text token ends a completion.

    Returns:
        What came in: strings (the prompt and its completion, without the stop string or end-of-text
        token) for strings; for ids the ids of both, the ending token included. In an array
        `(batch, time)` each sequence is filled up with its last token.

    Raises:
        UserError: for an empty prompt, one that is longer than the context, ids that are no
            integers or outside the vocabulary, and impossible lengths.
    """
    require_gpt(model)
    tokenizer = model.tokenizer
    prompts, give_back = _read_inputs(inputs, tokenizer)
    _check_prompts(prompts, model)
    limits = _limits(prompts, model.config.max_sequence_length, max_length, max_new_tokens)
    stop_ids, stop_strings = _read_stop(stop, tokenizer, stop_at_eot)
    sampler = get_sampler(model.sampler if sampler is None else sampler)

    streams = [
        TextStream(tokenizer.decode, stop_strings) if stop_strings else None for _ in prompts
    ]

    def ends(row: int, token: int) -> bool:
        if streams[row] is not None:
            streams[row].push(token)
            if streams[row].stopped:
                return True
        return token in stop_ids

    completions: list[list[int]] = [[] for _ in prompts]
    rng = np.random.default_rng(seed)
    for row, token in _decode(model, prompts, limits, sampler, rng, ends):
        completions[row].append(token)
    return give_back(completions, stop_ids, stop_strings)


def stream(
    model: GPTModel,
    prompt: str,
    max_new_tokens: int | None = None,
    *,
    sampler: Any = None,
    seed: int | None = None,
    stop: str | int | Sequence[str | int] | None = None,
) -> Iterator[str]:
    """What follows one prompt, in pieces as they become certain; arguments as `generate`."""
    require_gpt(model)
    prompts, _ = _read_inputs(prompt, model.tokenizer)
    _check_prompts(prompts, model)
    limits = _limits(prompts, model.config.max_sequence_length, None, max_new_tokens)
    stop_ids, stop_strings = _read_stop(stop, model.tokenizer, stop_at_eot=True)
    text = TextStream(model.tokenizer.decode, stop_strings)
    sampler = get_sampler(model.sampler if sampler is None else sampler)
    rng = np.random.default_rng(seed)
    tokens = _decode(model, prompts, limits, sampler, rng, lambda _, token: token in stop_ids)
    for _, token in tokens:
        if token not in stop_ids and (piece := text.push(token)):
            yield piece
        if text.stopped:
            return
    if rest := text.finish():
        yield rest


def _decode(
    model: GPTModel,
    prompts: list[list[int]],
    limits: np.ndarray,
    sampler: Sampler,
    rng: np.random.Generator,
    ends: Callable[[int, int], bool],
) -> Iterator[tuple[int, int]]:
    """Each new token with its row, until `ends(row, token)` or `limits` `(batch,)` of length."""
    step = _compiled_step(model)
    context = model.config.max_sequence_length
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    active = lengths < limits
    if not active.any():
        return

    token_ids = np.zeros((len(prompts), lengths.max()), np.int32)  # padded on the right
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    capacity = _bucket(lengths.max(), context)
    cache = create_cache(model, len(prompts), capacity)
    start = np.zeros_like(lengths)
    logits, cache = step(token_ids, cache, start, lengths - 1)

    while True:
        tokens = np.asarray(sampler(logits.numpy(), rng), np.int32)  # (batch,)
        for row in np.flatnonzero(active):
            token = int(tokens[row])
            lengths[row] += 1
            active[row] = lengths[row] < limits[row] and not ends(row, token)
            yield int(row), token
        if not active.any():
            return
        if lengths[active].max() > capacity:
            capacity = _bucket(lengths[active].max(), context)
            cache = grow_cache(cache, capacity)
        # a finished row computes on, at a position that exists, and nobody looks
        positions = np.minimum(lengths - 1, capacity - 1)
        logits, cache = step(tokens[:, None], cache, positions, start)


def _compiled_step(model: GPTModel) -> Callable[..., Any]:
    """`cached_forward` of this model as a `tf.function`, kept with the model."""
    step = model.__dict__.get("_cached_step")
    if step is None:
        many = tf.TensorSpec([None], tf.int32)
        signature = [tf.TensorSpec([None, None], tf.int32), cache_spec(model), many, many]

        @tf.function(input_signature=signature)
        def step(token_ids: Any, cache: Any, positions: Any, logits_at: Any) -> Any:
            return cached_forward(model, token_ids, cache, positions, logits_at)

        # past Keras's attribute tracking, which would save the function with the model
        model.__dict__["_cached_step"] = step
    return step


def _bucket(length: int, context: int) -> int:
    """The capacity for `length` tokens: few sizes, so that few are ever prepared."""
    capacity = _FIRST_CAPACITY
    while capacity < length:
        capacity *= 2
    return min(capacity, context)


# What comes in and goes out

GiveBack = Callable[[list[list[int]], set[int], list[str]], Any]


def _read_inputs(inputs: Any, tokenizer: Any) -> tuple[list[list[int]], GiveBack]:
    """Prompts as token ids, and the function that turns completions into what came in."""
    if isinstance(inputs, str) or _is_list_of(inputs, str):
        if tokenizer is None:
            raise UserError(
                "The model has no tokenizer, so it takes token ids. Set model.tokenizer, or load "
                "a folder that has a tokenizer.json."
            )
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        prompts = [[int(i) for i in tokenizer.encode(text)] for text in texts]

        def as_text(completions: list[list[int]], stop_ids: set[int], stops: list[str]) -> Any:
            found = [
                _text(tokenizer, *row, stop_ids, stops)
                for row in zip(texts, prompts, completions, strict=True)
            ]
            return found[0] if isinstance(inputs, str) else found

        return prompts, as_text

    if isinstance(inputs, (list, tuple)) and any(np.ndim(item) for item in inputs):
        prompts = [_ids(item) for item in inputs]

        def as_lists(completions: list[list[int]], *_: Any) -> Any:
            return [p + c for p, c in zip(prompts, completions, strict=True)]

        return prompts, as_lists

    array = np.asarray(inputs)
    if array.ndim not in (1, 2):
        raise UserError(
            "Token ids are (time,) or (batch, time), or a list of lists. Received: shape "
            f"{array.shape}."
        )
    prompts = [_ids(row) for row in np.atleast_2d(array)]

    def as_array(completions: list[list[int]], *_: Any) -> Any:
        rows = [p + c for p, c in zip(prompts, completions, strict=True)]
        if isinstance(inputs, (list, tuple)):
            return rows[0]
        longest = max(len(row) for row in rows)
        full = np.array([row + row[-1:] * (longest - len(row)) for row in rows], np.int32)
        return full if array.ndim == 2 else full[0]

    return prompts, as_array


def _text(
    tokenizer: Any,
    text: str,
    prompt: list[int],
    completion: list[int],
    stop_ids: set[int],
    stop_strings: list[str],
) -> str:
    if completion and completion[-1] in stop_ids:
        completion = completion[:-1]
    # decoded together, since some tokenizers drop a space at the beginning
    full = tokenizer.decode(prompt + completion)
    new = full[len(text) :] if full.startswith(text) else tokenizer.decode(completion)
    cuts = [at for at in (new.find(stop) for stop in stop_strings) if at >= 0]
    return text + (new[: min(cuts)] if cuts else new)


def _is_list_of(inputs: Any, kind: type) -> bool:
    is_list = isinstance(inputs, (list, tuple)) and len(inputs) > 0
    return is_list and all(isinstance(item, kind) for item in inputs)


def _ids(values: Any) -> list[int]:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"Token ids must be integers. Received: {array.dtype} values. Round and cast them "
            "yourself if they are ids, or hand over strings."
        )
    if array.ndim != 1:
        raise UserError(f"A prompt's token ids are one list. Received: shape {array.shape}.")
    return array.tolist()


def _check_prompts(prompts: list[list[int]], model: GPTModel) -> None:
    context, vocab_size = model.config.max_sequence_length, model.config.vocab_size
    if not prompts:
        raise UserError("There are no prompts. Hand over at least one.")
    for i, prompt in enumerate(prompts):
        which = f"Prompt {i}" if len(prompts) > 1 else "The prompt"
        if not prompt:
            raise UserError(
                f"{which} is empty. Begin with any text or token; the end-of-text token "
                "('<|endoftext|>') starts a fresh document."
            )
        if len(prompt) > context:
            raise UserError(
                f"{which} is {len(prompt)} tokens long and the model's context is {context}. "
                f"Keep its last {context - 1} tokens or fewer."
            )
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise UserError(
                f"{which} has token id {wrong[0]}, outside the vocabulary of {vocab_size}. Was it "
                "encoded with another model's tokenizer?"
            )


def _limits(
    prompts: list[list[int]], context: int, max_length: int | None, max_new_tokens: int | None
) -> np.ndarray:
    """The final length of each sequence at most, `(batch,)`."""
    if max_length is not None and max_new_tokens is not None:
        raise UserError("Give max_length (prompt and completion) or max_new_tokens, not both.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if max_new_tokens is not None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be positive. Received: {max_new_tokens}.")
        return np.minimum(lengths + max_new_tokens, context)
    if max_length is None:
        return np.full_like(lengths, context)
    if max_length > context:
        raise UserError(
            f"max_length={max_length} exceeds the model's context of {context}. Ask for at most "
            f"{context}."
        )
    if max_length < lengths.max():
        raise UserError(
            f"max_length={max_length} counts prompt and completion, and a prompt alone has "
            f"{lengths.max()} tokens. Raise it, or give max_new_tokens instead."
        )
    return np.full_like(lengths, max_length)


def _read_stop(stop: Any, tokenizer: Any, stop_at_eot: bool) -> tuple[set[int], list[str]]:
    items = [] if stop is None else [stop] if isinstance(stop, (str, int)) else list(stop)
    strings = [item for item in items if isinstance(item, str)]
    ids = [item for item in items if not isinstance(item, str)]
    if strings and tokenizer is None:
        raise UserError("Stop strings need a tokenizer. Set model.tokenizer, or stop at token ids.")
    if "" in strings:
        raise UserError("An empty stop string would stop everything. Leave it out.")
    stop_ids = set(_ids(ids))
    if stop_at_eot and tokenizer is not None and tokenizer.eot_id is not None:
        stop_ids.add(int(tokenizer.eot_id))
    return stop_ids, strings
