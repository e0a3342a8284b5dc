"""Prompts as they come in, what they may be, and completions as they go out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tf_gptopt._errors import UserError
from tf_gptopt._ids import as_ids
from tf_gptopt.models.gpt import GPTModel
from tf_gptopt.models.sampling import is_count
from tf_gptopt.models.text_stream import text_after

GiveBack = Callable[[list[list[int]], set[int], list[str]], Any]


def read_inputs(inputs: Any, tokenizer: Any) -> tuple[list[list[int]], GiveBack]:
    """Prompts as token ids, and the function that turns completions into what came in."""
    if isinstance(inputs, str) or _is_list_of(inputs, str):
        if tokenizer is None:
            raise UserError(
                "The model has no tokenizer, so it takes token ids. Set model.tokenizer, or load "
                "a folder that has a tokenizer.json."
            )
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        encode = getattr(tokenizer, "encode_prompt", tokenizer.encode)
        prompts = [[int(i) for i in encode(text)] for text in texts]

        def as_text(completions: list[list[int]], stop_ids: set[int], stops: list[str]) -> Any:
            found = [
                _text(tokenizer, *row, stop_ids, stops)
                for row in zip(texts, prompts, completions, strict=True)
            ]
            return found[0] if isinstance(inputs, str) else found

        return prompts, as_text

    if isinstance(inputs, (list, tuple)) and any(map(_has_axes, inputs)):
        prompts = [_ids(item) for item in inputs]

        def as_lists(completions: list[list[int]], *_: Any) -> Any:
            return [p + c for p, c in zip(prompts, completions, strict=True)]

        return prompts, as_lists

    array = as_ids(
        inputs,
        "Prompts are strings or token ids: (time,), (batch, time) or a list of lists. Token ids "
        "must be integers.",
        ndim=(1, 2),
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
    return text + text_after(tokenizer, prompt, completion, stop_strings)


def _is_list_of(inputs: Any, kind: type) -> bool:
    is_list = isinstance(inputs, (list, tuple)) and len(inputs) > 0
    return is_list and all(isinstance(item, kind) for item in inputs)


def _has_axes(item: Any) -> bool:
    return isinstance(item, (list, tuple)) or bool(getattr(item, "ndim", 0))


def _ids(values: Any) -> list[int]:
    expected = "The token ids of a prompt are one list, or strings; ids must be integers."
    return as_ids(values, expected).tolist()


def check_prompts(prompts: list[list[int]], model: GPTModel) -> None:
    """Refuse what the model cannot read."""
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


def length_limits(
    prompts: list[list[int]], context: int, max_length: int | None, max_new_tokens: int | None
) -> np.ndarray:
    """The final length of each sequence at most, `(batch,)`."""
    if max_length is not None and max_new_tokens is not None:
        raise UserError("Give max_length (prompt and completion) or max_new_tokens, not both.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and not is_count(value):
            raise UserError(f"{name} must be positive, a whole number. Received: {name}={value!r}.")
    if max_new_tokens is not None:
        return np.minimum(lengths + min(max_new_tokens, context), context)
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


def read_stop(stop: Any, tokenizer: Any, stop_at_eot: bool) -> tuple[set[int], list[str]]:
    """The token ids and the strings that end a completion."""
    try:
        items = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    except TypeError:  # a number, or an array that is one
        items = [stop[()] if isinstance(stop, np.ndarray) else stop]
    strings = [item for item in items if isinstance(item, str)]
    ids = [item for item in items if not isinstance(item, str)]
    if strings and tokenizer is None:
        raise UserError("Stop strings need a tokenizer. Set model.tokenizer, or stop at token ids.")
    if "" in strings:
        raise UserError("An empty stop string would stop everything. Leave it out.")
    if not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in ids):
        raise UserError(f"stop is one or more strings or token ids. Received: stop={stop!r}.")
    stop_ids = {int(i) for i in ids}
    if stop_at_eot and tokenizer is not None:
        ends = getattr(tokenizer, "eot_ids", None) or (getattr(tokenizer, "eot_id", None),)
        stop_ids.update(int(i) for i in ends if i is not None)
    return stop_ids, strings
