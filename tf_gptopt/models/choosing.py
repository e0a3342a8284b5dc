"""The options by which every `generate` and `stream` chooses tokens, and the choice itself.

numpy only, no TensorFlow: Keras models and TFLite files choose alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from tf_gptopt._errors import UserError, suggest
from tf_gptopt.models.penalties import Penalties
from tf_gptopt.models.sampling import BeamSampler, Sampler, get_sampler, make_sampler


class SamplingOptions(TypedDict, total=False):
    """How the next token is chosen. All of it may be left out, and None is left out.

    Keys:
        sampler: a name (`"greedy"`, `"random"`, `"top_k"`, `"top_p"`, `"min_p"`; `"beam"` for the
            `generate` of a Keras model), a dictionary such as `{"name": "top_k", "k": 40}`, or a
            function of (logits, rng). The next four stand for one, so give these or that.
        temperature: divides the logits; 0 is greedy, default 1 beside `top_k`, `top_p` or `min_p`.
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach this probability.
        min_p: keep the tokens at least this many times as likely as the likeliest.
        repetition_penalty: what tokens lose that prompt or completion hold; see
            `models.penalties.Penalties`.
        frequency_penalty, presence_penalty: what tokens lose that the completion holds.
        penalty_window: how many of the last tokens these three look at; default as many as the
            model's context.
        logit_bias: `{token id: number}`, added to the logits; `-float("inf")` forbids a token.
    """

    sampler: Any
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    penalty_window: int | None
    logit_bias: Mapping[int, float] | None


_NUMBERS = ("temperature", "top_k", "top_p", "min_p")
_PENALTIES = tuple(field.name for field in dataclasses.fields(Penalties))


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Penalties, then a sampler; tokens that mean nothing are never chosen."""

    sampler: Sampler | BeamSampler
    penalties: Penalties
    forbidden: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))

    def adjust(
        self, logits: np.ndarray, histories: Sequence[Sequence[int]], prompts: Sequence[int]
    ) -> np.ndarray:
        """The logits to choose by, `(batch, vocab_size)` float32; `logits` change where they are.

        Args:
            logits: `(batch, vocab_size)` float32.
            histories: the ids of each row's sequence so far.
            prompts: how many of them are its prompt.
        """
        if len(self.forbidden):
            logits[:, self.forbidden] = -np.inf
        return self.penalties(logits, histories, out=logits, prompts=prompts)

    def __call__(
        self, logits: np.ndarray, history: np.ndarray, rng: np.random.Generator, prompt: int = 0
    ) -> int:
        """The next token of one sequence.

        Args:
            logits: `(vocab_size,)` float32; the penalties change them where they are.
            history: `(time,)` integers, the tokens of prompt and completion so far.
            rng: the sequence's own.
            prompt: how many tokens of the history are the prompt.
        """
        chosen = self.sampler(self.adjust(logits[None], [history], [prompt]), rng)
        token = np.asarray(chosen).reshape(-1)[:1]
        if token.dtype.kind not in "iu" or not token.size or not 0 <= token[0] < len(logits):
            raise UserError(
                f"The sampler must return a token id of the vocabulary of {len(logits)} for each "
                f"row of logits. It returned: {chosen!r}."
            )
        return int(token[0])


def read_options(
    options: Mapping[str, Any],
    default: Any = "greedy",
    *,
    beams: bool = False,
    window: int | None = None,
    forbidden: Sequence[int] = (),
) -> Chooser:
    """The chooser that `SamplingOptions` mean.

    Args:
        options: `SamplingOptions`.
        default: the sampler without any; anything that `get_sampler` takes.
        beams: whether the caller can search with beams.
        window: the penalties' window where the options name none.
        forbidden: ids that are never chosen, see `rows_without_token`.

    Raises:
        UserError: for unknown names, impossible values and a sampler beside numbers that mean one.
    """
    for name in options:
        if name not in SamplingOptions.__annotations__:
            hint = suggest(name, SamplingOptions.__annotations__)
            raise UserError(f"Unknown sampling option {name!r}.{hint}")
    given = {name: value for name, value in options.items() if value is not None}
    numbers = {name: given[name] for name in _NUMBERS if name in given}
    for name, value in numbers.items():
        if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
            raise UserError(f"{name} must be a number. Received: {name}={value!r}.")
    if numbers and "sampler" in given:
        raise UserError(f"Give a sampler, or {', '.join(numbers)}, but not both.")
    sampler = make_sampler(**numbers) if numbers else get_sampler(given.get("sampler", default))
    if isinstance(sampler, BeamSampler) and not beams:
        raise UserError(
            "Beam search knows its text at the end alone and needs several sequences at once: only "
            "generate() of a Keras model has it. Choose another sampler."
        )
    penalties = {name: given[name] for name in _PENALTIES if name in given}
    penalties.setdefault("penalty_window", window)
    return Chooser(sampler, Penalties(**penalties), np.asarray(forbidden, np.int64))


def rows_without_token(size: int, tokens: Any, missing: Sequence[int] | None = None) -> np.ndarray:
    """Rows of a token table of `size` rows that no token belongs to, `(n,)`.

    Tables are padded to a round number (50,304 for 50,257), and a text has no use for such a row.

    Args:
        size: rows of the table.
        tokens: one more than the tokenizer's largest id; anything else where it does not say.
        missing: ids below that which the tokenizer has no token for.
    """
    padding = np.arange(min(tokens, size) if isinstance(tokens, int) else size, size)
    return np.concatenate([np.asarray(missing or (), np.int64), padding])


def make_generators(seed: int | None, count: int) -> list[np.random.Generator]:
    """A random generator for each of `count` sequences: what one draws depends on the seed and on
    its place alone, never on the other sequences or their number.

    Raises:
        UserError: for a seed that is no integer of 0 or more.
    """
    wrong = not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0
    if seed is not None and wrong:
        raise UserError(f"seed must be an integer of 0 or more. Received: seed={seed!r}.")
    return [np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(count)]
